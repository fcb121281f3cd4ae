"""Exact duplicates across a whole conversion, in bounded memory and in a defined order.

Each staged shard leaves sorted files of digests: one of its images' bytes as they were found, one
of its keys. They are merged by ranges of the digest: a range holds about ``BUDGET`` digests of all
shards, is sorted by (digest, shard, place in the shard), and every row that equals the row before
it is a duplicate. So the first in the order of the plan stays, whatever ran when and where.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from webssl_jax.data import processes

BUDGET = 1 << 22  # digests in memory at once: some 250 MB with the sort
ROW = np.dtype([("high", "<u8"), ("low", "<u8"), ("place", "<u4")])


def digest(data: bytes) -> bytes:
    """16 bytes of BLAKE2b: of a billion images two collide by chance with p = 1e-21."""
    return hashlib.blake2b(data, digest_size=16).digest()


def write_digests(path: Path, digests: Sequence[bytes]) -> None:
    """Writes the digests of a shard's records, in their order, sorted for :func:`find`."""
    rows = np.zeros(len(digests), ROW)
    halves = np.frombuffer(b"".join(digests), ">u8").reshape(-1, 2)
    rows["high"], rows["low"], rows["place"] = halves[:, 0], halves[:, 1], np.arange(len(rows))
    with open(path, "wb") as file:
        rows[np.lexsort((rows["place"], rows["low"], rows["high"]))].tofile(file)
        file.flush()
        os.fsync(file.fileno())


def read_digests(path: Path) -> list[bytes]:
    """What :func:`write_digests` was given."""
    rows = np.fromfile(path, ROW)
    rows = rows[np.argsort(rows["place"])]
    data = np.stack([rows["high"], rows["low"]], axis=1).astype(">u8").tobytes()
    return [data[i : i + 16] for i in range(0, len(data), 16)]


def find(paths: Sequence[Path], budget: int = BUDGET, workers: int = 1) -> list[np.ndarray]:
    """For each shard's file of digests the places, ascending, of records that come again.

    Args:
      workers: processes that the ranges are shared by.
    """
    total = sum(path.stat().st_size for path in paths) // ROW.itemsize
    ranges = max(1, -(-total // budget))
    edges = [i * 2**64 // ranges for i in range(ranges + 1)]
    found: list[list[np.ndarray]] = [[] for _ in paths]
    work = functools.partial(_find_range, tuple(paths))
    tasks = zip(edges, edges[1:], strict=False)
    for _, (places, owner) in processes.in_order(work, tasks, min(workers, ranges)):
        for index in np.unique(owner):
            found[index].append(places[owner == index])
    empty = np.zeros(0, np.uint32)
    return [np.sort(np.concatenate([empty, *parts])) for parts in found]


def _find_range(paths: Sequence[Path], edges: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """(places, numbers of their files) of the records that come again, of one range of digests."""
    parts, owners = [], []
    for index, path in enumerate(paths):
        # Mapped, so that a range costs its own bytes and not a pass over all of them.
        rows = np.memmap(path, ROW, "r") if path.stat().st_size else np.zeros(0, ROW)
        first = bisect.bisect_left(rows["high"], edges[0])
        last = bisect.bisect_left(rows["high"], edges[1], first)
        parts.append(np.array(rows[first:last]))
        owners.append(np.full(last - first, index, np.uint32))
    rows, owner = np.concatenate(parts), np.concatenate(owners)
    order = np.lexsort((rows["place"], owner, rows["low"], rows["high"]))
    rows, owner = rows[order], owner[order]
    again = (rows["high"][1:] == rows["high"][:-1]) & (rows["low"][1:] == rows["low"][:-1])
    return rows["place"][1:][again], owner[1:][again]
