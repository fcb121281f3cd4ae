"""Balancing without captions: hierarchical k-means over features, and a sample shared evenly among
its clusters, as Vo et al. (2024) curate by.

=======================  =========================================================================
``NNNNN.parquet``        as scores of the shards, for ``webssl curate select --scores``: ``level1``,
                         ``level2``, ... (the record's cluster there) and ``distance``, to the
                         centroid of its cluster of level 1
``scores.json``          their ranges
``selection.parquet``    ``shard``, ``record``, ``key`` of what was sampled
``clusters.json``        the figures: records, kept, dropped, without features; of each level
                         clusters, empty ones, sizes, what was kept of the largest and the smallest
``clusters.png``         the largest, the median and the smallest cluster of level 1: eight nearest
``index.html``           the report: figures and pictures
``.plan/``               centroids: the same command goes on from there
=======================  =========================================================================
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from webssl_jax.config import UserError
from webssl_jax.curation import clusters, selecting, selection_page
from webssl_jax.curation.feature_pool import FeaturePool, unit
from webssl_jax.data.converter import plan
from webssl_jax.files import write_json

ROWS_A_CLUSTER = 256  # that level 1 is fitted on, at most
_SHOWN = 8  # records of a cluster


def cluster(
    pool: FeaturePool, output: Path, levels: Sequence[int], budget: int, seed: int = 0
) -> dict[str, Any]:
    """Clusters all records and writes a sample. Memory: the features of the records that fit
    (``ROWS_A_CLUSTER``), and about 40 bytes a record.

    Args:
      levels: clusters of each, the lowest first, so the numbers fall.
      budget: records to keep.

    Returns:
      The figures, also in ``<output>/clusters.json``.

    Raises:
      UserError: for numbers that do not fit the records, a folder begun with others or in use.
    """
    levels = list(levels)
    if not levels or levels != sorted(levels, reverse=True) or len(set(levels)) < len(levels):
        raise UserError(f"--levels {','.join(map(str, levels))}: must fall, as in 1000,50")
    if budget < 1:
        raise UserError("--share: is of so few records that none would be kept")
    settings = {"features": pool.identity, "levels": levels, "seed": seed}
    plan.prepare(output, settings, lambda: ({"shards": list(pool.shards)}, {}))
    with plan.lock(output):
        rows = np.concatenate([numbers for numbers, _ in pool.blocks()])
        if len(rows) < levels[0]:
            raise UserError(f"--levels: {len(rows):,} records cannot be {levels[0]:,} clusters")
        centroids = _centroids(pool, rows, levels, output / plan.PLAN_FOLDER, seed)
        label, distance = clusters.closest((unit(x) for _, x in pool.blocks()), centroids[0])
        labels = [label[:, 0]]
        for below, above in zip(centroids, centroids[1:], strict=False):
            labels.append(clusters.closest([below], above)[0][labels[-1], 0])
        kept = np.zeros(len(pool), bool)
        kept[rows] = clusters.sample(labels, budget, seed)
        figures = {
            **settings,
            "records": len(pool),
            "without_features": len(pool) - len(rows),
            "kept": int(kept.sum()),
            "dropped": len(rows) - int(kept.sum()),
            "mean_distance": float(distance.mean()),
            "by_level": [_sizes(one, kept[rows], k) for one, k in zip(labels, levels, strict=True)],
        }
        _write_scores(pool, output, rows, labels, distance[:, 0])
        selecting.write_selection(output / "selection.parquet", pool.records(), kept)
        _draw(pool, output / "clusters.png", rows, labels[0], distance[:, 0])
        selection_page.write(
            output,
            "Sampled by clusters",
            figures,
            {"clusters.png": "the nearest to three centroids"},
        )
        write_json(output / "clusters.json", figures)
        return figures


def _centroids(
    pool: FeaturePool, rows: np.ndarray, levels: Sequence[int], place: Path, seed: int
) -> list[np.ndarray]:
    """Of each level (K, D): of level 1 from the features, of the others from the level below."""
    found: list[np.ndarray] = []
    for number, count in enumerate(levels, 1):
        path = place / f"level-{number}.npy"
        if not path.exists():
            points = found[-1] if found else _drawn(pool, rows, count, seed)
            made = clusters.kmeans(points, count, seed).centroids
            with path.with_suffix(".tmp").open("wb") as file:
                np.save(file, made)
            os.replace(path.with_suffix(".tmp"), path)
        found.append(np.load(path))
    return found


def _drawn(pool: FeaturePool, rows: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Unit vectors of at most ``ROWS_A_CLUSTER`` records for each of ``count`` clusters."""
    used = np.zeros(len(pool), bool)
    used[np.random.default_rng(seed).permutation(rows)[: ROWS_A_CLUSTER * count]] = True

    def parts() -> Iterator[np.ndarray]:
        for numbers, block in pool.blocks():
            yield unit(block[used[numbers]])

    return np.concatenate(list(parts()))


def _sizes(labels: np.ndarray, kept: np.ndarray, count: int) -> dict[str, Any]:
    sizes, left = (np.bincount(x, minlength=count) for x in (labels, labels[kept]))
    order = np.argsort(sizes, kind="stable")
    smallest = order[np.searchsorted(sizes[order], 1)]
    return {
        "clusters": count,
        "empty": int((sizes == 0).sum()),
        "median": float(np.median(sizes)),
        "largest": int(sizes[order[-1]]),
        "largest_kept": int(left[order[-1]]),
        "smallest": int(sizes[smallest]),
        "smallest_kept": int(left[smallest]),
    }


def _write_scores(
    pool: FeaturePool,
    output: Path,
    rows: np.ndarray,
    labels: Sequence[np.ndarray],
    distance: np.ndarray,
) -> None:
    there = np.zeros(len(pool), bool)
    there[rows] = True
    columns = {f"level{i}": one.astype(np.int32) for i, one in enumerate(labels, 1)}
    columns["distance"] = distance.astype(np.float32)
    whole = {name: np.zeros(len(pool), values.dtype) for name, values in columns.items()}
    for name, values in columns.items():
        whole[name][rows] = values
    pool.write_scores(output, there, whole)


def _draw(
    pool: FeaturePool, path: Path, rows: np.ndarray, labels: np.ndarray, distance: np.ndarray
) -> None:
    """A row of pictures for each of three clusters."""
    sizes = np.bincount(labels)
    order = np.argsort(sizes, kind="stable")
    order = order[sizes[order] > 0]
    shown = []
    for found in dict.fromkeys(int(order[i]) for i in (-1, len(order) // 2, 0)):
        members = np.flatnonzero(labels == found)
        nearest = members[np.argsort(distance[members], kind="stable")][:_SHOWN]
        shown += [(int(rows[i]), f"{found}: {distance[i]:.3f}") for i in nearest]
    title = "the largest, the median and the smallest cluster: number, distance to its centroid"
    selecting.sheet(path, pool.shards, shown, title)
