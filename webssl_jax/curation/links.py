"""The links of near-duplicates: which vectors, of those that an index brings together, are alike.
What the workers of ``near_duplicates`` do; it needs numpy and scipy alone."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
from scipy import sparse
from scipy.sparse import csgraph

from webssl_jax.data.converter import plan
from webssl_jax.data.converter.items import no_progress

VECTORS, CELLS = "vectors.npy", "cells.npy"  # in the plan
COUNT = 64  # cells whose links are one file: what a kill costs, at most
_ROWS, _COLUMNS = 1024, 8192  # of a product


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
        span = range(task.first, min(task.first + COUNT, len(index.homes)))
        found = [
            part
            for cell in span
            for part in _compare(
                index.vectors, index.homes[cell], index.visitors[cell], task.threshold
            )
        ]
        save(task.path, np.concatenate([np.zeros((0, 2), np.int64), *found]))
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
    group = components([flat.reshape(-1, 2)], len(names))
    _, first = np.unique(group, return_index=True)
    links = np.stack([names[first[group]], names], 1)
    return links[links[:, 0] != links[:, 1]]


def components(links: Iterable[np.ndarray], count: int) -> np.ndarray:
    """(count,) the group of each, numbered by their first members."""
    pairs = np.concatenate([np.zeros((0, 2), np.int64), *links])
    graph = sparse.coo_array((np.ones(len(pairs), bool), pairs.T), (count, count))
    found = csgraph.connected_components(graph, directed=False)[1]
    _, first, back = np.unique(found, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[back]


def save(path: Path, array: np.ndarray) -> None:
    with path.with_suffix(".tmp").open("wb") as file:
        np.save(file, array)
    os.replace(path.with_suffix(".tmp"), path)
