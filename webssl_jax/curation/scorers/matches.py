"""Which entries of a list the captions of a record hold: what balancing samples by."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa

from webssl_jax.config import UserError
from webssl_jax.curation import matching
from webssl_jax.data.records import Record


@dataclasses.dataclass(frozen=True)
class Matches:
    """Of each caption the numbers of the entries that it holds, each once; and 64 bits that name
    the caption, wherever its record lies.

    entries: a file as :func:`matching.read_entries` takes it. digest: of its content.
    """

    entries: str = dataclasses.field(
        default="", repr=False
    )  # the same list in another file will do
    digest: str = dataclasses.field(init=False)

    version: ClassVar[int] = 1
    columns: ClassVar[Mapping[str, pa.DataType]] = {
        "matches": pa.list_(pa.list_(pa.uint32())),
        "digests": pa.list_(pa.uint64()),
    }

    def __post_init__(self) -> None:
        if not self.entries:
            raise UserError("--scorer matches: give a list of entries, matches:entries=FILE")
        entries = matching.read_entries(Path(self.entries))
        object.__setattr__(self, "digest", matching.digest(entries))

    def __call__(self, records: Sequence[Record]) -> list[dict[str, Any]]:
        matcher = _matcher(self.entries, self.digest)
        return [
            {
                "matches": [matcher.match(caption) for caption in record.captions],
                "digests": [text_digest(record, caption) for caption in record.captions],
            }
            for record in records
        ]


@functools.lru_cache(1)
def _matcher(path: str, digest: str) -> matching.Matcher:
    """Once in a worker."""
    entries = matching.read_entries(Path(path))
    if matching.digest(entries) != digest:
        raise UserError(f"--entries {path}: has changed since matching began; put it back")
    return matching.Matcher(entries)


def text_digest(record: Record, caption: str) -> int:
    """64 bits that name a caption of a record, wherever the record lies."""
    named = f"{record.source}\0{record.key}\0{caption}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(named, digest_size=8).digest(), "little")
