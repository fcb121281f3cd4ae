"""The shards of a pool: what a pass over records is cut into."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from concurrent import futures
from typing import Any

from array_record.python import array_record_module
from etils import epath

from webssl_jax.config import UserError
from webssl_jax.data.sources import ArrayRecordSource

_OPENING_THREADS = 64


@dataclasses.dataclass(frozen=True)
class Shard:
    """One shard of a pool, as it was when a pass over it began. number: in the pool."""

    number: int
    file: str
    bytes: int
    records: int

    def open(self) -> ArrayRecordSource:
        """Raises UserError if the shard is another one by now."""
        source = ArrayRecordSource((self.file,))  # a text would be split at commas
        if (epath.Path(self.file).stat().length, len(source)) != (self.bytes, self.records):
            raise UserError(
                f"{self.file}: is not the shard that was there when the pass over it began; begin "
                "again in another folder"
            )
        return source


def names_of(shards: Sequence[dict[str, Any]]) -> list[str]:
    """What a selection calls the shards of a pool: the names of their files, and where several have
    the same, as many of the folders before it as tell all apart."""
    places = [shard["file"].split("/") for shard in shards]
    for depth in range(1, max(map(len, places)) + 1):
        names = ["/".join(place[-depth:]) for place in places]
        if len(set(names)) == len(names):
            break
    return names


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
