"""The second pass: captions are sampled so that frequent entries lose their excess (MetaCLIP,
arXiv 2309.16671, Algorithm 1).

An entry with ``count`` captions and threshold ``t`` asks for a caption with probability ``p = t /
max(count, t)``, independently of the caption's other entries; the caption stays if one of its
entries asks for it, so with probability ``1 - prod(1 - p)``. That is drawn here at once, by one
uniform number, which is a function of the seed and of the caption's digest (source, key, text)
alone: not of workers, restarts, or of how the pool is cut into shards. And because the number does
not depend on the threshold, a larger threshold keeps what a smaller one keeps.

A record stays if one of its captions does, with these captions only: MetaCLIP samples texts.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from array_record.python import array_record_module

from webssl_jax.config import UserError
from webssl_jax.curation import scores
from webssl_jax.curation.scorers.matches import text_digest
from webssl_jax.curation.shards import Shard
from webssl_jax.data import records
from webssl_jax.data.converter.items import no_progress
from webssl_jax.data.converter.plan import PLAN_FOLDER
from webssl_jax.data.converter.work import temporary_shard
from webssl_jax.data.sources import DamagedRecord
from webssl_jax.files import write_bytes

PROBABILITIES = "probabilities.npy"
EVERY = 500  # records between two words about progress


@dataclasses.dataclass(frozen=True)
class Task:
    """One shard of the pool and the shard that is made of it. index: the folder of the matches."""

    output: str
    index: str
    shard: Shard
    split: str
    total: int
    seed: int

    @property
    def size(self) -> int:
        return self.shard.records

    @property
    def needs(self) -> tuple[tuple[str, str], ...]:
        scored = scores.file_of(Path(self.index), self.shard.number).name
        return ("output", f"{PLAN_FOLDER}/{PROBABILITIES}"), ("index", scored)

    @property
    def path(self) -> Path:
        return Path(self.output) / records.shard_name(self.split, self.shard.number, self.total)

    @property
    def counts(self) -> Path:
        """What is in the shard, for :func:`total`; written before it."""
        return Path(self.output) / PLAN_FOLDER / f"{self.shard.number:05d}.counts.npz"


class Matched(NamedTuple):
    """The captions of a shard that hold an entry: (captions,) the record of each, its number in the
    record, and its entries, at least one; and these entries, caption after caption."""

    places: np.ndarray
    numbers: np.ndarray
    lengths: np.ndarray
    matches: np.ndarray
    digests: np.ndarray | None = None

    @classmethod
    def of(cls, table: pa.Table) -> Matched:
        """Of a shard's scores: ``matches`` and, if it has them, ``digests``."""
        column = table["matches"].combine_chunks()
        texts = pc.fill_null(pc.list_value_length(column), 0).to_numpy()  # of each record
        captions = column.flatten()
        lengths = pc.list_value_length(captions).to_numpy()
        places = np.repeat(np.arange(len(texts)), texts)
        numbers = np.arange(len(places)) - np.repeat(np.cumsum(texts) - texts, texts)
        there = lengths > 0
        digests = None
        if "digests" in table.column_names:
            digests = table["digests"].combine_chunks().flatten().to_numpy()[there]
        matches = captions.flatten().to_numpy()
        return cls(places[there], numbers[there], lengths[there], matches, digests)


def probabilities(counts: np.ndarray, threshold: int) -> np.ndarray:
    """``t / max(count, t)`` for each entry, float64: 1 for the tail."""
    return threshold / np.maximum(counts, threshold)


def threshold_of_tail(counts: np.ndarray, share: float) -> int:
    """The threshold at which entries of at most so many captions hold nearest to ``share`` of all
    matches; as MetaCLIP carries a threshold over to a pool of another size."""
    found = np.unique(counts[counts > 0], return_counts=True)
    sizes = found[0]
    held = np.cumsum(sizes * found[1]) / (sizes * found[1]).sum()
    return int(sizes[np.abs(held - share).argmin()])


def uniform(digests: np.ndarray, seed: int) -> np.ndarray:
    """Numbers in [0, 1), float64: a function of the seed and each digest (splitmix64's finaliser,
    Steele et al. 2014)."""
    x = digests ^ np.random.SeedSequence(seed).generate_state(1, np.uint64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return (x >> np.uint64(11)) * 2.0**-53


def sample(
    lengths: np.ndarray,
    matches: np.ndarray,
    digests: np.ndarray,
    probability: np.ndarray,
    seed: int,
) -> np.ndarray:
    """Which captions stay, (captions,) bool.

    Args:
      lengths: entries in each caption, all positive, (captions,).
      matches: their ids, caption after caption.
      digests: names of the captions, (captions,) uint64.
      probability: of each entry, as :func:`probabilities` gives it.
    """
    if not len(lengths):
        return np.zeros(0, bool)
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    nobody = np.multiply.reduceat(1 - probability[matches], starts)
    return uniform(digests, seed) < 1 - nobody


def balance_shard(task: Task, progress: Callable[[int], None] = no_progress) -> None:
    """Writes a shard's sampled records and their counts, unless they are there.

    Args:
      progress: called with the records done since the last call.

    Raises:
      UserError: if the shard has changed since it was matched.
      OSError: with ENOSPC if the disk is full.
    """
    if task.path.exists():
        return
    file = scores.file_of(Path(task.index), task.shard.number)
    found = Matched.of(pq.read_table(file, columns=["matches", "digests"]))
    places, numbers, lengths, matches, digests = found
    assert digests is not None
    asked = _probability(str(task.counts.parent / PROBABILITIES))
    kept = sample(lengths, matches, digests, asked, task.seed)
    stats: dict[str, Any] = {"records": 0, "captions": 0, "bytes": 0, "damaged": []}
    chosen = np.flatnonzero(kept)
    # Of the captions that stay, those of one record follow each other.
    groups = np.split(chosen, np.flatnonzero(np.diff(places[chosen])) + 1) if len(chosen) else []

    def write(writer: array_record_module.ArrayRecordWriter) -> int:
        if groups:  # an empty shard cannot be opened alone
            source = task.shard.open()
        done = 0
        for group in groups:
            place = int(places[group[0]])
            if place - done >= EVERY:
                progress(place - done)
                done = place
            try:
                data = source[place]
                record = records.decode(data)
            except (DamagedRecord, records.RecordError) as error:  # since it was matched
                why = " ".join(str(error).split())
                stats["damaged"].append(f"{source.describe(place)}: {why}")
                kept[group] = False
                continue
            captions = _captions(task, record, numbers[group], digests[group])
            if captions != record.captions:
                data = records.encode(dataclasses.replace(record, captions=captions))
            writer.write(data)
            stats["records"] += 1
            stats["captions"] += len(captions)
            stats["bytes"] += len(record.image)
        progress(task.size - done)
        return stats["records"]

    with temporary_shard(task.path, write) as temporary:
        ids, counts = np.unique(matches[np.repeat(kept, lengths)], return_counts=True)
        save(task.counts, ids=ids, counts=counts, stats=np.array(json.dumps(stats)))
        os.replace(temporary, task.path)


def _captions(
    task: Task, record: records.Record, numbers: np.ndarray, digests: np.ndarray
) -> tuple[str, ...]:
    """The captions of those numbers, if they are what was matched."""
    captions = tuple(record.captions[n] for n in numbers if n < len(record.captions))
    if [text_digest(record, caption) for caption in captions] != digests.tolist():
        raise UserError(
            f"{task.shard.file}: record {record.key!r} is not the one that was matched; match "
            "into another folder"
        )
    return captions


@functools.lru_cache(1)
def _probability(path: str) -> np.ndarray:
    """Once in a worker."""
    return np.load(path)


def total(paths: Sequence[Path], entries: int) -> tuple[np.ndarray, dict[str, Any]]:
    """The sum over the counts of shards: captions that are left of each entry, (entries,) int64,
    and the sums of the figures; of the damaged records the count and the names."""
    counts = np.zeros(entries, np.int64)
    sums: dict[str, Any] = {}
    damaged: list[str] = []
    for path in paths:
        with np.load(path) as part:
            counts[part["ids"]] += part["counts"]
            stats = json.loads(str(part["stats"]))
        damaged += stats.pop("damaged")
        for name, value in stats.items():
            sums[name] = sums.get(name, 0) + value
    return counts, sums | {"damaged": {"count": len(damaged), "records": damaged}}


def save(path: Path, array: np.ndarray | None = None, **arrays: np.ndarray) -> None:
    """One array as npy or several as npz, in a file that is there completely or not at all."""
    file = io.BytesIO()
    if array is None:
        np.savez(file, allow_pickle=False, **arrays)
    else:
        np.save(file, array)
    write_bytes(path, file.getvalue())
