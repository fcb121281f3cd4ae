"""Near-duplicates by features: records whose cosine similarity is a threshold or more, and what is
linked through others (their connected components) are one group, of which one record stays.

Up to ``exact`` records all pairs are compared. Of more, k-means makes as many cells as the root of
their number, and a record is compared to those that have its cell among their ``probes`` nearest.
What that misses is measured: records drawn at random are compared to all, and ``recall`` is the
share of their true pairs that lie in one group.

=======================  =========================================================================
``selection.parquet``    ``shard``, ``record``, ``key`` of what stays
``groups.parquet``       of each record in a group: also ``group``, from 0, and ``kept``
``NNNNN.parquet``        as scores of the shards: ``group``, -1 of records in none; ``kept``, 1 or 0
``scores.json``          their ranges
``dedup.json``           the figures: records, groups, kept, dropped, without features, recall
``groups.png``           some members of groups, what stays first
``index.html``           the report: figures and pictures
``.plan/``               unit vectors and what was compared: the same command goes on from there
=======================  =========================================================================
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from webssl_jax.config import UserError
from webssl_jax.curation import clusters, engine, links, selecting, selection_page
from webssl_jax.curation.feature_pool import FeaturePool, unit
from webssl_jax.data.converter import plan, runners
from webssl_jax.files import write_json

SAMPLED = 1000  # records that the recall is measured on
_COLUMNS = 8192  # of a product
_SHOWN = 4  # records of a group


@dataclasses.dataclass(frozen=True)
class Rules:
    """threshold: of the cosine. exact: up to so many records all pairs are compared. probes: cells
    that a record is looked for in."""

    threshold: float
    exact: int = 50_000
    probes: int = 4
    seed: int = 0


def dedup(
    pool: FeaturePool,
    output: Path,
    rules: Rules,
    better: np.ndarray | None = None,
    progress: engine.Progress = engine.silent,
    runner: runners.Runner = runners.here,
) -> dict[str, Any]:
    """Finds the groups and writes what stays. Memory of each process: about 40 bytes a record; on
    disk 4 bytes for each number of its features.

    Args:
      better: (n,) of all records of the pool: of a group the largest stays, those with NaN last.
        By default, and of equal ones, the first.

    Returns:
      The figures, also in ``<output>/dedup.json``.

    Raises:
      UserError: for a folder begun with others or in use.
    """
    settings = {"features": pool.identity, **dataclasses.asdict(rules)}
    plan.prepare(output, settings, lambda: ({"shards": list(pool.shards)}, {}))
    with plan.lock(output):
        place = output / plan.PLAN_FOLDER
        vectors, rows = _vectors(pool, place)
        cells = _cells(vectors, place, rules)
        homes = np.bincount(cells[:, 0], minlength=int(cells.max()) + 1)
        tasks = [
            links.Task(
                str(output), first, rules.threshold, int(homes[first : first + links.COUNT].sum())
            )
            for first in range(0, len(homes), links.COUNT)
        ]
        engine.work(runner, links.link_cells, tasks, progress)
        groups = links.components((np.load(task.path) for task in tasks), len(rows))
        recall, pairs = _recall(vectors, groups, rules)
        kept = np.zeros(len(pool), bool)
        kept[rows[_best(groups, None if better is None else better[rows])]] = True
        sizes = np.bincount(groups)
        figures = {
            **settings,
            "records": len(pool),
            "without_features": len(pool) - len(rows),
            "groups": int((sizes > 1).sum()),
            "largest_group": int(sizes.max()),
            "kept": int(kept.sum()),
            "dropped": len(rows) - int(kept.sum()),
            "cells": int(cells.max()) + 1,
            "recall": recall,
            "recall_pairs": pairs,
        }
        group = np.full(len(pool), -1, np.int64)
        group[rows] = np.where(sizes > 1, np.cumsum(sizes > 1) - 1, -1)[groups]
        there = np.zeros(len(pool), bool)
        there[rows] = True
        pool.write_scores(output, there, {"group": group, "kept": kept.astype(np.int8)})
        selecting.write_selection(output / "selection.parquet", pool.records(), kept)
        _write_groups(output, pool, group, kept)
        selection_page.write(
            output, "Near-duplicates", figures, {"groups.png": "some records of each group"}
        )
        write_json(output / "dedup.json", figures)
        return figures


def _vectors(pool: FeaturePool, place: Path) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors of the records with features, (m, D), on disk, and their numbers (m,)."""
    path = place / links.VECTORS
    if not path.exists():
        rows = np.concatenate([numbers for numbers, _ in pool.blocks()])
        if not len(rows):
            raise UserError(f"--features {pool.folder}: no record has features")
        np.save(place / "rows.npy", rows)
        temporary, start, made = path.with_suffix(".tmp"), 0, None
        for numbers, block in pool.blocks():
            if made is None:
                shape = len(rows), block.shape[1]
                made = np.lib.format.open_memmap(temporary, "w+", np.float32, shape)
            made[start : start + len(numbers)] = unit(block)
            start += len(numbers)
        assert made is not None
        made.flush()
        os.replace(temporary, path)
    return np.load(path, mmap_mode="r"), np.load(place / "rows.npy")


def _cells(vectors: np.ndarray, place: Path, rules: Rules) -> np.ndarray:
    """(m, probes) int32: the cells nearest to each record, its own first; also in links.CELLS."""
    count, path = len(vectors), place / links.CELLS
    if not path.exists():
        nearest = np.zeros((count, 1), np.int32)
        if count > rules.exact:
            number = round(count**0.5)
            drawn = np.random.default_rng(rules.seed).permutation(count)[: 256 * number]
            found = clusters.kmeans(vectors[np.sort(drawn)], number, rules.seed)
            parts = (vectors[i : i + _COLUMNS] for i in range(0, count, _COLUMNS))
            nearest, _ = clusters.closest(parts, found.centroids, min(rules.probes, number))
        links.save(path, nearest)
    return np.load(path)


def _best(groups: np.ndarray, better: np.ndarray | None) -> np.ndarray:
    """One member of each group."""
    if better is None:
        return np.unique(groups, return_index=True)[1]
    # Last key first: by group, then the largest, NaN last, then the first.
    order = np.lexsort((-better, groups))
    return order[np.unique(groups[order], return_index=True)[1]]


def _recall(vectors: np.ndarray, groups: np.ndarray, rules: Rules) -> tuple[float | None, int]:
    """The share of true pairs of some records that are in one group, and their number; 1 where all
    were compared, None where the sample has none."""
    if len(vectors) <= rules.exact:
        return 1.0, 0
    drawn = np.random.default_rng(rules.seed + 1).permutation(len(vectors))[:SAMPLED]
    x, pairs, hits = vectors[np.sort(drawn)], 0, 0
    for start in range(0, len(vectors), _COLUMNS):
        a, b = np.nonzero(x @ vectors[start : start + _COLUMNS].T >= rules.threshold)
        a, b = np.sort(drawn)[a], start + b
        pairs += int((a != b).sum())
        hits += int(((groups[a] == groups[b]) & (a != b)).sum())
    return (hits / pairs if pairs else None), pairs


def _write_groups(output: Path, pool: FeaturePool, group: np.ndarray, kept: np.ndarray) -> None:
    """group: (n,), -1 of records that are in none."""
    parts, start = [], 0
    for part in pool.records():
        span = slice(start, start + len(part))
        part = part.append_column("group", pa.array(group[span]))
        part = part.append_column("kept", pa.array(kept[span]))
        parts.append(part.filter(pa.array(group[span] >= 0)))
        start += len(part)
    temporary = output / "groups.parquet.tmp"
    pq.write_table(pa.concat_tables(parts), temporary)
    os.replace(temporary, output / "groups.parquet")
    members = np.flatnonzero(group >= 0)
    members = members[np.lexsort((~kept[members], group[members]))]  # what stays comes first
    _, starts, sizes = np.unique(group[members], return_index=True, return_counts=True)
    place = np.arange(len(members)) - np.repeat(starts, sizes)
    shown = ((int(i), f"{group[i]}{' kept' if kept[i] else ''}") for i in members[place < _SHOWN])
    title = f"{len(sizes):,} groups of {len(members):,} records; up to {_SHOWN} of each"
    selecting.sheet(output / "groups.png", pool.shards, shown, title)
