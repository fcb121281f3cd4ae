"""What the records of a source are, cheaply: so that a run that goes on, and all of its hosts, can
tell whether they have the records that the run began with."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Set
from concurrent import futures
from pathlib import Path

import numpy as np

from webssl_jax.config import UserError
from webssl_jax.data.mixture import Mixture
from webssl_jax.data.pipeline import Source
from webssl_jax.data.sources import ArrayRecordSource, DamagedRecord, Shard
from webssl_jax.files import write_text

_SAMPLED = 256  # records whose bytes are compared
_NAMED = 3  # shards named of each kind of change


def sampled(count: int) -> np.ndarray:
    """(at most 256,) int: places among ``count``, evenly spaced, with the first and the last."""
    return np.unique(np.linspace(0, count - 1, _SAMPLED).astype(int))


def bytes_of(source: Source, index: int) -> bytes:
    """A record as it lies in its shard; empty if it is damaged."""
    try:
        return source[index]
    except DamagedRecord:
        return b""


@dataclasses.dataclass(frozen=True)
class Identity:
    """The shards, without their folders: records are the same wherever they lie. ``samples``: 16
    hexadecimal digits each of the records at ``sampled``; empty for a damaged one, which equals
    any."""

    shards: tuple[Shard, ...]
    samples: tuple[str, ...]

    @classmethod
    def of(cls, source: ArrayRecordSource | Mixture, threads: int = 16) -> Identity:
        """Reads 256 records, whatever the number of shards.

        Raises:
          UserError, TransientError: as reading them.
        """
        with futures.ThreadPoolExecutor(threads) as pool:
            data = pool.map(lambda i: bytes_of(source, int(i)), sampled(len(source)))
            samples = [hashlib.sha256(one).hexdigest()[:16] if one else "" for one in data]
        return cls(tuple(source.shards), tuple(samples))

    @property
    def records(self) -> int:
        return sum(shard.records for shard in self.shards)

    def __str__(self) -> str:
        digest = hashlib.sha256(repr((self.shards, self.samples)).encode()).hexdigest()[:8]
        return f"{self.records:,} records in {len(self.shards):,} shards, fingerprint {digest}"

    def write(self, path: Path) -> None:
        """Writes it as JSON."""
        shards = ",\n".join(json.dumps(shard) for shard in self.shards)
        samples = json.dumps(self.samples)
        text = f'{{"records": {self.records}, "samples": {samples}, "shards": [\n{shards}\n]}}\n'
        write_text(path, text)

    @classmethod
    def read(cls, path: Path) -> Identity | None:
        """What :meth:`write` has written; None if there is no such file.

        Raises:
          UserError: if it is another file.
        """
        try:
            values = json.loads(path.read_text("utf-8"))
            shards = tuple(Shard(str(n), int(s), int(r)) for n, s, r in values["shards"])
            return cls(shards, tuple(map(str, values["samples"])))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}: cannot be read as what a run's records are ({error}); remove it to go on "
                "without the check that they are still the same"
            ) from None

    def changes(self, now: Identity) -> list[str]:
        """In words and numbers, how the records ``now`` differ from these. Empty if they do not, or
        in nothing that was looked at."""
        if self.shards == now.shards:
            pairs = zip(self.samples, now.samples, strict=True)
            differ = sum(bool(a and b) and a != b for a, b in pairs)
            many = f"{differ} of {len(now.samples)} records that were compared have another content"
            return [many] if differ else []
        before, after = _by_name(self.shards), _by_name(now.shards)
        more, fewer = after.keys() - before.keys(), before.keys() - after.keys()
        other = {key for key in before.keys() & after.keys() if before[key] != after[key]}
        words = [
            _named(more, "more", lambda key: f"{after[key].records:,} records"),
            _named(fewer, "fewer", lambda key: f"{before[key].records:,} records"),
            _named(other, "replaced", lambda key: _change(before[key], after[key])),
        ]
        if not any(words):
            words = ["the same shards in another order"]
        return [f"{self.records:,} -> {now.records:,} records", *filter(None, words)]


def _by_name(shards: Iterable[Shard]) -> dict[tuple[str, int], Shard]:
    """By name and how often it came before: several folders may have shards of one name."""
    seen: collections.Counter[str] = collections.Counter()
    found = {}
    for shard in shards:
        found[shard.name, seen[shard.name]] = shard
        seen[shard.name] += 1
    return found


def _named(
    keys: Set[tuple[str, int]], what: str, describe: Callable[[tuple[str, int]], str]
) -> str:
    if not keys:
        return ""
    some = [f"{key[0]}: {describe(key)}" for key in sorted(keys)[:_NAMED]]
    rest = ["..."] if len(keys) > _NAMED else []
    return f"{len(keys):,} shard{'s' * (len(keys) > 1)} {what} ({'; '.join([*some, *rest])})"


def _change(before: Shard, after: Shard) -> str:
    what, a, b = "records", before.records, after.records
    if a == b:
        what, a, b = "bytes", before.size, after.size
    return f"{a:,} -> {b:,} {what}"
