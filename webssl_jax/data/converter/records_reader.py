"""Records as input of the converter: to merge sets of them, to select from them, to remove some.

What is compared with a list or a limit is a *field* of a record: ``key``, ``source``, ``label``, or
``NAME.FIELD`` of an annotation that is a JSON object, such as ``meta.url``. A unit is a span of a
shard. Everything of a record stays, annotations and source among it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Set
from pathlib import Path
from typing import Any

from array_record.python import array_record_module

from webssl_jax.config import UserError
from webssl_jax.data import annotations as annotation
from webssl_jax.data import records
from webssl_jax.data.converter.fields import key_of_value, plain
from webssl_jax.data.converter.items import Candidate, Dropped, Item, Unit, no_progress
from webssl_jax.data.converter.plan import stamp
from webssl_jax.data.sources import ArrayRecordSource

SPAN = 1000  # records of a unit
OWN = ("key", "source", "label")
_NAMES = {"keys": "--keys", "without": "--without"}


@dataclasses.dataclass(frozen=True)
class Choice:
    """Which records stay. ``keys``, ``without``: files with a value of the field ``by`` a line;
    "" for none. ``least``, ``most``: pairs of a field and the limit that it must not pass."""

    keys: str = ""
    without: str = ""
    by: str = "key"
    least: tuple[tuple[str, float], ...] = ()
    most: tuple[tuple[str, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class RecordsReader:
    """Reads the spans that :func:`list_records` found. See ``items.Reader``. ``source``: what
    records name as theirs from now on; "" for what they do."""

    source: str
    choice: Choice

    def read(self, unit: Unit, advance: Callable[[int], None] = no_progress) -> Iterator[Item]:
        path, first = unit["path"], unit["first"]
        files = {"keys": self.choice.keys, "without": self.choice.without}
        lists = {name: read_list(file) for name, file in files.items() if file}
        options = "readahead_buffer_size:0,max_parallelism:0"
        reader = array_record_module.ArrayRecordReader(path, options)
        try:
            for place in range(first, first + unit["size"]):
                try:
                    record = records.decode(reader.read(place, place + 1)[0])
                except (RuntimeError, IndexError, records.RecordError):
                    yield Dropped(f"{path} record {place}", "damaged record")
                else:
                    yield self._item(record, lists)
                advance(1)
        finally:
            reader.close()

    def _item(self, record: records.Record, lists: Mapping[str, Set[str]]) -> Item:
        choice = self.choice
        value = key_of_value(value_of(record, choice.by))
        listed = ""
        for name, wanted in (("keys", True), ("without", False)):
            if name not in lists:
                continue
            there = value is not None and value in lists[name]
            listed = value if there and value is not None else listed
            if there != wanted:
                reason = f"{'' if there else 'not '}in {_NAMES[name]}"
                return Dropped(record.key, reason, listed)
        for limits, sign, word in (
            (choice.least, 1, "below --min"),
            (choice.most, -1, "above --max"),
        ):
            for field, limit in limits:
                found = plain(value_of(record, field))
                if isinstance(found, bool) or not isinstance(found, int | float):
                    return Dropped(record.key, f"no number {field!r}", listed)
                if sign * found < sign * limit:
                    return Dropped(record.key, f"{word} {field}", listed)
        return Candidate(
            record.key,
            record.image,
            record.captions,
            record.label,
            annotations=record.annotations,
            source=self.source or record.source,
            listed=listed,
        )


def value_of(record: records.Record, field: str) -> Any:
    """A field of a record, see above; None if it has none."""
    if field in OWN:
        return getattr(record, field)
    name, *path = field.split(".")
    try:
        value = annotation.json_value(record, name)
    except annotation.AnnotationError:
        return None
    while path and isinstance(value, dict):
        rest = ".".join(path)
        if rest in value:  # a name may have dots itself
            return value[rest]
        value = value.get(path.pop(0))
    return None if path else value


def read_list(file: str) -> frozenset[str]:
    """The lines of a text file, without blank ones.

    Raises: UserError if it cannot be read, or has none.
    """
    return _read_list(file, os.stat(file).st_mtime_ns if os.path.exists(file) else 0)


@functools.lru_cache(maxsize=4)
def _read_list(file: str, _: int) -> frozenset[str]:
    try:
        lines = Path(file).read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise UserError(f"{file}: no list can be read from it ({reason})") from None
    found = frozenset(line.strip() for line in lines) - {""}
    if not found:
        raise UserError(f"{file}: is empty; give one value a line")
    return found


def list_digest(file: str) -> str:
    """What tells a list that has changed."""
    return hashlib.sha256("\n".join(sorted(read_list(file))).encode()).hexdigest()[:12]


def list_records(patterns: list[str]) -> list[Unit]:
    """Spans of all shards that match, in the order of the patterns.

    Raises: UserError as ``ArrayRecordSource``, and for an address instead of a path.
    """
    for pattern in patterns:
        if "://" in pattern:
            raise UserError(f"--input {pattern}: only paths; mount a bucket (gcsfuse, for one)")
    source = ArrayRecordSource(patterns)
    units: list[Unit] = []
    for file, shard in zip(source.files, source.shards, strict=True):
        path = os.path.abspath(file)
        marks = stamp(Path(path))
        for first in range(0, shard.records, SPAN):
            units.append(
                {"path": path, "first": first, "size": min(SPAN, shard.records - first), **marks}
            )
    return units
