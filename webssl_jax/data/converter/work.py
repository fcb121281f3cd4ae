"""The work on one shard, a function of its plan alone: any process on any machine can do it."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from array_record.python import array_record_module

from webssl_jax.data import records
from webssl_jax.data.converter import stats as counts
from webssl_jax.data.converter.duplicates import digest, read_digests, write_digests
from webssl_jax.data.converter.items import (
    Candidate,
    Dropped,
    Note,
    Reader,
    Rules,
    make_record,
    no_progress,
)
from webssl_jax.data.converter.plan import PLAN_FOLDER, size_of
from webssl_jax.errors import DISK_FULL
from webssl_jax.files import write_text


@dataclasses.dataclass(frozen=True)
class Shard:
    """One shard's whole task; ``stage_shard`` and ``finish_shard`` need nothing else."""

    output: str
    split: str
    index: int
    total: int
    reader: Reader
    rules: Rules
    size: int = 1  # of all its units

    @property
    def path(self) -> Path:
        """The finished shard."""
        return Path(self.output) / records.shard_name(self.split, self.index, self.total)

    def aside(self, suffix: str) -> Path:
        """A file about this shard in the plan: ``.jsonl`` its inputs, ``.staged`` its records
        before duplicates are known, ``.images`` and ``.keys`` their digests, ``.repeats.npz`` the
        places of duplicates, ``.staged.json`` and ``.stats.json`` the counts."""
        return Path(self.output) / PLAN_FOLDER / f"{self.split}-{self.index:05d}{suffix}"

    @property
    def needs(self) -> tuple[tuple[str, str], ...]:
        """For :mod:`remote`: (field, names in the folder that it names) of what the work reads."""
        return (("output", f"{PLAN_FOLDER}/{self.aside('.*').name}"),)

    @property
    def staged(self) -> bool:
        return self.finished or self.aside(".staged").exists()

    @property
    def finished(self) -> bool:
        return self.path.exists() and self.aside(".stats.json").exists()


def stage_shard(shard: Shard, progress: Callable[[int], None] = no_progress) -> None:
    """Reads a shard's inputs and leaves its records, counts and digests beside the plan.

    Args:
      progress: called with sizes of units, or of their parts, that are done.

    Raises:
      OSError: with ENOSPC if the disk is full; the temporary file is removed.
    """
    if shard.staged:
        return
    stats = counts.new_stats()
    images: list[bytes] = []
    keys: list[bytes] = []

    def write(writer: array_record_module.ArrayRecordWriter) -> int:
        with open(shard.aside(".jsonl"), encoding="utf-8") as plan:
            for line in plan:
                unit = json.loads(line)
                left = size_of(unit)

                def advance(size: int) -> None:
                    nonlocal left
                    size = min(size, left)
                    left -= size
                    progress(size)

                for item in shard.reader.read(unit, advance):
                    outcome: records.Record | Dropped | None = None
                    notes: list[Note] = []
                    if isinstance(item, Dropped):
                        outcome = item
                    elif isinstance(item, Candidate):
                        outcome, notes = make_record(item, shard.reader.source, shard.rules)
                    counts.count_item(stats, item, outcome)
                    for note in notes:
                        counts.count_item(stats, note, None)
                    if isinstance(item, Candidate) and isinstance(outcome, records.Record):
                        writer.write(records.encode(outcome))
                        images.append(digest(item.data))
                        keys.append(digest(item.identity.encode()))
                advance(left)
        return stats["kept"]

    with temporary_shard(shard.path, write) as temporary:
        write_digests(shard.aside(".images"), images)
        write_digests(shard.aside(".keys"), keys)
        write_text(shard.aside(".staged.json"), json.dumps(stats))
        os.replace(temporary, shard.aside(".staged"))  # last: it says that all of these are there


def finish_shard(shard: Shard, progress: Callable[[int], None] = no_progress) -> None:
    """Moves a staged shard into place, without the records that are duplicates.

    Raises: as :func:`stage_shard`.
    """
    if shard.finished:
        return
    stats = json.loads(shard.aside(".staged.json").read_text("utf-8"))
    repeats = np.load(shard.aside(".repeats.npz"))
    doubles = {int(place): "duplicate" for place in repeats["images"]}
    doubles |= {int(place): "duplicate key" for place in repeats["keys"]}
    if not doubles:
        # Counts first: a finished shard has its own.
        write_text(shard.aside(".stats.json"), json.dumps(stats))
        os.replace(shard.aside(".staged"), shard.path)
        _sync(shard.path.parent)
        return
    found = read_digests(shard.aside(".images"))

    def write(writer: array_record_module.ArrayRecordWriter) -> int:
        reader = array_record_module.ArrayRecordReader(str(shard.aside(".staged")))
        for place in range(reader.num_records()):
            data = reader.read([place])[0]
            if place not in doubles:
                writer.write(data)
                continue
            record = records.decode(data)
            reencoded = digest(record.image) != found[place]
            counts.drop_record(stats, record, reencoded, doubles[place])
        reader.close()
        return stats["kept"]

    with temporary_shard(shard.path, write) as temporary:
        write_text(shard.aside(".stats.json"), json.dumps(stats))
        os.replace(temporary, shard.path)
    shard.aside(".staged").unlink(missing_ok=True)


@contextlib.contextmanager
def temporary_shard(path: Path, write: Callable[..., int]) -> Iterator[Path]:
    """Writes records with ``write``, which returns their number, and yields the complete file
    ``<path>.<...>.tmp``, for the caller to rename.

    The name is unique everywhere: Beam may try a shard on two machines at once. Both write the same
    bytes, so it does not matter whose rename comes last.

    Raises:
      OSError: with ENOSPC if the disk is full, with EIO if fewer records can be read back than were
        written. The temporary file is removed.
    """
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        writer = array_record_module.ArrayRecordWriter(str(temporary), records.WRITER_OPTIONS)
        kept = write(writer)
        writer.close()
        _sync(temporary)
        _check(temporary, kept)
        yield temporary
        _sync(path.parent)
    except Exception as error:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        if not isinstance(error, OSError) and means_disk_full(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(temporary)) from None
        raise


def _check(path: Path, count: int) -> None:
    """The writer reports some failures late or not at all: trust what can be read back."""
    reader = array_record_module.ArrayRecordReader(str(path))
    found = reader.num_records()
    reader.close()
    if found != count:
        raise OSError(errno.EIO, f"{found} records arrived of {count}", str(path))


def means_disk_full(error: BaseException) -> bool:
    """Whether an exception of a library that knows no errno says that there is no space."""
    return any(os.strerror(code) in str(error) for code in DISK_FULL)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
