"""The first pass: which entries the captions of each shard hold, and how often each entry occurs.

A shard's file in the index, ``<index>/.plan/00000.matches.npz``, has a row for each caption that
holds an entry:

=============  ====  ==========================================================================
array          type  meaning
=============  ====  ==========================================================================
places         u4    the record in its shard, (captions,)
captions       u4    the caption in its record, (captions,)
digests        u8    of source, key and caption: what the second pass draws by, (captions,)
lengths        u4    entries in the caption, at least 1, (captions,)
matches        u4    ids of these entries, caption after caption, (sum of lengths,)
ids, counts    u4    the entries that occur and the number of captions they occur in
stats          str   JSON: records, captions, what of them matched, damaged records by place
=============  ====  ==========================================================================

Each caption counts once for each of its entries, as in MetaCLIP; captions that several records
share count each time. The work needs memory for the largest shard's index, not for its images.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from array import array
from collections.abc import Callable, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python import array_record_module
from etils import epath

from webssl_jax.config import UserError
from webssl_jax.curation.matching import Matcher
from webssl_jax.data import records
from webssl_jax.data.converter.items import no_progress
from webssl_jax.data.converter.plan import PLAN_FOLDER
from webssl_jax.data.sources import ArrayRecordSource, DamagedRecord

ENTRIES = "entries.json"
MAX_NAMED = 1000  # damaged records in a summary; the count is of all
_OPENING_THREADS = 64
EVERY = 500  # records between two words about progress
_SUMS = ("records", "uncaptioned", "matched_records", "captions", "matched_captions")


@dataclasses.dataclass(frozen=True)
class Shard:
    """One shard of the pool, and its place in the index; :func:`match_shard` needs no more."""

    index: str  # the index's folder
    number: int
    file: str
    bytes: int
    records: int

    @property
    def path(self) -> Path:
        return Path(self.index) / PLAN_FOLDER / f"{self.number:05d}.matches.npz"

    def open(self) -> ArrayRecordSource:
        """Raises UserError if the shard is not what it was when the index was begun."""
        source = ArrayRecordSource((self.file,))  # a text would be split at commas
        if (epath.Path(self.file).stat().length, len(source)) != (self.bytes, self.records):
            raise UserError(
                f"{self.file}: is not the shard that was there when matching began; match into "
                "another folder"
            )
        return source


def list_shards(pattern: str | Sequence[str]) -> list[dict[str, Any]]:
    """File, bytes and records of each shard, in the order of :class:`ArrayRecordSource`.

    Raises:
      UserError: as :class:`ArrayRecordSource`.
    """
    files = ArrayRecordSource(pattern).files  # refuses what is missing, truncated or no shard

    def measure(file: str) -> dict[str, Any]:
        reader = array_record_module.ArrayRecordReader(file)
        count = reader.num_records()
        reader.close()
        return {"file": file, "bytes": epath.Path(file).stat().length, "records": count}

    with futures.ThreadPoolExecutor(min(_OPENING_THREADS, len(files))) as pool:
        return list(pool.map(measure, files))


def text_digest(record: records.Record, caption: str) -> int:
    """64 bits that name a caption of a record, wherever the record lies."""
    named = f"{record.source}\0{record.key}\0{caption}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(named, digest_size=8).digest(), "little")


def match_shard(shard: Shard, progress: Callable[[int], None] = no_progress) -> None:
    """Writes a shard's file of the index, unless it is there.

    Args:
      progress: called with the records read since the last call.

    Raises:
      UserError: if the shard has changed.
      OSError: if the file cannot be written.
    """
    if shard.path.exists():
        return
    stats: dict[str, Any] = dict.fromkeys(_SUMS, 0) | {"damaged": []}
    places, captions, lengths, matches = (array("I") for _ in range(4))
    digests = array("Q")
    if shard.records:  # an empty one cannot be opened alone
        source = shard.open()
    matcher = _matcher(str(Path(shard.index) / ENTRIES))
    for place in range(shard.records):
        if place % EVERY == EVERY - 1:
            progress(EVERY)
        stats["records"] += 1
        try:
            record = records.decode(source[place])
        except (DamagedRecord, records.RecordError) as error:
            stats["damaged"].append(f"{source.describe(place)}: {' '.join(str(error).split())}")
            continue
        stats["uncaptioned"] += not record.captions
        stats["captions"] += len(record.captions)
        before = len(places)
        for number, caption in enumerate(record.captions):
            found = matcher.match(caption)
            if found:
                places.append(place)
                captions.append(number)
                digests.append(text_digest(record, caption))
                lengths.append(len(found))
                matches.extend(found)
        stats["matched_captions"] += len(places) - before
        stats["matched_records"] += len(places) > before
    ids, counts = np.unique(np.array(matches, np.uint32), return_counts=True)
    write_arrays(
        shard.path,
        places=np.array(places, np.uint32),
        captions=np.array(captions, np.uint32),
        digests=np.array(digests, np.uint64),
        lengths=np.array(lengths, np.uint32),
        matches=np.array(matches, np.uint32),
        ids=ids,
        counts=counts.astype(np.uint32),
        stats=np.array(json.dumps(stats)),
    )
    progress(shard.records % EVERY)


@functools.lru_cache(1)
def _matcher(path: str) -> Matcher:
    """Once in a worker."""
    return Matcher(json.loads(Path(path).read_text("utf-8")))


def total(paths: Sequence[Path], entries: int) -> tuple[np.ndarray, dict[str, Any]]:
    """The sum over files with ``ids``, ``counts`` and ``stats``: counts of each entry, (entries,)
    int64, and the sums of the figures; of the damaged records the count and the first names."""
    counts = np.zeros(entries, np.int64)
    sums: dict[str, Any] = {}
    damaged: list[str] = []
    count = 0
    for path in paths:
        with np.load(path) as part:
            counts[part["ids"]] += part["counts"]
            stats = json.loads(str(part["stats"]))
        mine = stats.pop("damaged")
        count += len(mine)
        damaged += mine[: MAX_NAMED - len(damaged)]
        for name, value in stats.items():
            sums[name] = sums.get(name, 0) + value
    return counts, sums | {"damaged": {"count": count, "records": damaged}}


def write_arrays(path: Path, **arrays: np.ndarray) -> None:
    """An npz file that is there completely or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        np.savez(file, allow_pickle=False, **arrays)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
