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
``.plan/``               unit vectors and what was compared: the same command goes on from there
=======================  =========================================================================
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy import sparse
from scipy.sparse import csgraph

from webssl_jax.config import UserError
from webssl_jax.curation import clusters, engine, scores, selecting
from webssl_jax.curation.feature_pool import FeaturePool, unit
from webssl_jax.data.converter import plan, runners
from webssl_jax.data.converter.items import no_progress
from webssl_jax.files import write_json

SAMPLED = 1000  # records that the recall is measured on
_ROWS, _COLUMNS = 1024, 8192  # of a product
VECTORS, CELLS = "vectors.npy", "cells.npy"  # in the plan
_SHOWN = 4  # records of a group
_CELLS = 64  # whose links are one file: what a kill costs, at most


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
            Task(str(output), first, rules.threshold, int(homes[first : first + _CELLS].sum()))
            for first in range(0, len(homes), _CELLS)
        ]
        engine.work(runner, link_cells, tasks, progress)
        groups = _components((np.load(task.path) for task in tasks), len(rows))
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
        _write_scores(pool, output, rows, group, kept)
        selecting.write_selection(output / "selection.parquet", pool.records(), kept)
        _write_groups(output, pool, group, kept)
        write_json(output / "dedup.json", figures)
        return figures


def _vectors(pool: FeaturePool, place: Path) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors of the records with features, (m, D), on disk, and their numbers (m,)."""
    path = place / VECTORS
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
    """(m, probes) int32: the cells nearest to each record, its own first; also in CELLS."""
    count, path = len(vectors), place / CELLS
    if not path.exists():
        nearest = np.zeros((count, 1), np.int32)
        if count > rules.exact:
            number = round(count**0.5)
            drawn = np.random.default_rng(rules.seed).permutation(count)[: 256 * number]
            found = clusters.kmeans(vectors[np.sort(drawn)], number, rules.seed)
            parts = (vectors[i : i + _COLUMNS] for i in range(0, count, _COLUMNS))
            nearest, _ = clusters.closest(parts, found.centroids, min(rules.probes, number))
        _save(path, nearest)
    return np.load(path)


def _save(path: Path, array: np.ndarray) -> None:
    with path.with_suffix(".tmp").open("wb") as file:
        np.save(file, array)
    os.replace(path.with_suffix(".tmp"), path)


@dataclasses.dataclass(frozen=True)
class Task:
    """The links of the records of some cells. first: of the cells. size: records in them."""

    output: str
    first: int
    threshold: float
    size: int

    needs: ClassVar[tuple] = tuple(("output", f"{plan.PLAN_FOLDER}/{n}") for n in (VECTORS, CELLS))

    @property
    def place(self) -> Path:
        return Path(self.output) / plan.PLAN_FOLDER

    @property
    def path(self) -> Path:
        return self.place / f"links-{self.first:08d}.npy"


def link_cells(task: Task, progress: Callable[[int], None] = no_progress) -> None:
    """Writes (k, 2) numbers of vectors that are near-duplicates, enough of them to hold each group
    together."""
    if not task.path.exists():
        index = _index(str(task.place), (task.place / CELLS).stat().st_mtime_ns)
        span = range(task.first, min(task.first + _CELLS, len(index.homes)))
        found = [
            part
            for cell in span
            for part in _compare(
                index.vectors, index.homes[cell], index.visitors[cell], task.threshold
            )
        ]
        _save(task.path, np.concatenate([np.zeros((0, 2), np.int64), *found]))
    progress(task.size)


class _Index(NamedTuple):
    """vectors (m, D). Of each cell: homes, the vectors that lie in it; visitors, those that have it
    among their nearest."""

    vectors: np.ndarray
    homes: list[np.ndarray]
    visitors: list[np.ndarray]


@functools.lru_cache(1)
def _index(place: str, written: int) -> _Index:
    """Once in a worker. written: when the cells were, of which a process may see several."""
    cells = np.load(Path(place) / CELLS)
    number = int(cells.max()) + 1
    homes = _grouped(cells[:, 0], number)
    visitors = _grouped(cells.ravel(), number, cells.shape[1])
    return _Index(np.load(Path(place) / VECTORS, mmap_mode="r"), homes, visitors)


def _grouped(labels: np.ndarray, number: int, each: int = 1) -> list[np.ndarray]:
    """For each label the places that have it, sorted; ``each`` labels in a row are one place's."""
    order = np.argsort(labels, kind="stable")
    ends = np.cumsum(np.bincount(labels, minlength=number))
    return np.split(order // each, ends[:-1])


def _compare(
    vectors: np.ndarray, home: np.ndarray, visitors: np.ndarray, threshold: float
) -> Iterator[np.ndarray]:
    """For each block of products the links that hold its groups together."""
    for i in range(0, len(home), _ROWS):
        ours = home[i : i + _ROWS]
        x = vectors[ours]
        for j in range(0, len(visitors), _COLUMNS):
            theirs = visitors[j : j + _COLUMNS]
            a, b = np.nonzero(x @ vectors[theirs].T >= threshold)
            pairs = np.stack([ours[a], theirs[b]], 1)
            pairs = pairs[pairs[:, 0] != pairs[:, 1]]
            if len(pairs):
                yield _spanning(pairs)


def _spanning(pairs: np.ndarray) -> np.ndarray:
    """As few pairs as join the same: many that are all alike would else be as many as squares."""
    names, flat = np.unique(pairs, return_inverse=True)
    group = _components([flat.reshape(-1, 2)], len(names))
    _, first = np.unique(group, return_index=True)
    links = np.stack([names[first[group]], names], 1)
    return links[links[:, 0] != links[:, 1]]


def _components(links: Iterable[np.ndarray], count: int) -> np.ndarray:
    """(count,) the group of each, numbered by their first members."""
    pairs = np.concatenate([np.zeros((0, 2), np.int64), *links])
    graph = sparse.coo_array((np.ones(len(pairs), bool), pairs.T), (count, count))
    found = csgraph.connected_components(graph, directed=False)[1]
    _, first, back = np.unique(found, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[back]


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


def _write_scores(
    pool: FeaturePool, output: Path, rows: np.ndarray, group: np.ndarray, kept: np.ndarray
) -> None:
    missing = np.ones(len(pool), bool)
    missing[rows] = False
    columns = {
        "group": pa.array(group, mask=missing),
        "kept": pa.array(kept.astype(np.int8), mask=missing),
    }
    problems = pa.array(np.full(len(pool), "no features"), pa.string(), mask=~missing)
    scores.write(output, pool.records(), columns, problems)


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
