"""Several sources as one: which of them each row of the stream comes from, and which record it is.

    config.mixture = {
        "web": {"train": "gs://bucket/web/train-*.arrayrecord", "share": 3.0},
        "text": {"train": "gs://bucket/web/train-*.arrayrecord", "selection": "heavy.parquet"},
    }

Row ``r`` is a function of (mixture, seed, ``r``) alone, as with one source. Shares are kept to the
row: in every 10,000 rows each source has its exact number, spread evenly, so that no batch is by
chance all of one kind. Each source is shuffled by itself and shuffled anew whenever it has been
seen whole; a small one with a large share is seen more often.
"""

from __future__ import annotations

import bisect
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from webssl_jax.config import ConfigError, UserError
from webssl_jax.data.sources import ArrayRecordSource, Shard
from webssl_jax.errors import suggest

BLOCK = 10_000  # rows in which shares are exact; a smaller share than one row of it is none


def shuffled(count: int, seed: int) -> grain.MapDataset:
    """The endless order of ``count`` records: each once an epoch, every epoch in another order."""
    return grain.MapDataset.range(count).seed(seed).shuffle().repeat(None)


@dataclasses.dataclass(frozen=True)
class Part:
    """One row of ``config.mixture``.

    train: shards, as ``config.data.train`` names them. share: how many of the images, relative to
    the other parts'; or ((percent, share), ...), the share from that percent of the run on, the
    first from 0. selection: a parquet file with the columns ``shard`` (a file's name, with as many
    of its folders as tell it apart) and ``record`` (its number there, from 0): only these are seen;
    empty: all. cap: at most so many records are seen, the same ones in every epoch and run, drawn
    at random; 0: all. Cambrian-1 has 350,000 of each of its sources.
    """

    name: str
    train: str
    share: tuple[tuple[float, float], ...] = ((0.0, 1.0),)
    selection: str = ""
    cap: int = 0


def parts(rows: Mapping[str, Mapping[str, Any]]) -> list[Part]:
    """The rows of ``config.mixture``, checked.

    Raises:
      ConfigError: naming the key.
    """
    found = []
    known = {field.name for field in dataclasses.fields(Part)} - {"name"}
    for name, row in rows.items():
        for key in row:
            if key not in known:
                raise ConfigError(f"config.mixture.{name}.{key}: {suggest(key, sorted(known))}")
        if not row.get("train"):
            raise ConfigError(f"config.mixture.{name}.train: name the shards of this source")
        share = _steps(f"config.mixture.{name}.share", row.get("share", 1.0))
        cap = row.get("cap", 0)
        if type(cap) is not int or cap < 0:
            raise ConfigError(
                f"config.mixture.{name}.cap = {cap}: must be a number from 0 (all) on"
            )
        found.append(Part(name, row["train"], share, row.get("selection", ""), cap))
    for percent in {percent for part in found for percent, _ in part.share}:
        if not any(_share_at(part, percent) for part in found):
            raise ConfigError(f"config.mixture: at {percent:g} % of the run all shares are 0")
    return found


def shards_of(part: Part, known: Sequence[Shard]) -> list[Shard]:
    """Of :attr:`Mixture.shards`: those of one part, as its source has them; none where a selection
    or a cap leaves some out, as they do not tell the shards' sizes."""
    if part.selection or part.cap:
        return []
    own = [shard for shard in known if shard.name.startswith(f"{part.name}/")]
    return [shard._replace(name=shard.name.removeprefix(f"{part.name}/")) for shard in own]


def _steps(key: str, share: Any) -> tuple[tuple[float, float], ...]:
    steps = share if isinstance(share, (tuple, list)) else ((0, share),)
    try:
        steps = tuple((float(percent), float(value)) for percent, value in steps)
    except (TypeError, ValueError):
        steps = ()
    places = [percent for percent, _ in steps]
    if (
        places[:1] != [0]
        or any(a >= b for a, b in zip(places, [*places[1:], 100], strict=True))
        or not all(0 <= value < float("inf") for _, value in steps)
    ):
        raise ConfigError(
            f"{key} = {share}: must be a number from 0 on, or ((0, share), (percent, share), ...) "
            "with percents that rise and stay below 100"
        )
    return steps


def _share_at(part: Part, percent: float) -> float:
    return [share for start, share in part.share if start <= percent][-1]


class _Phase(NamedTuple):
    """From row ``start`` of the stream on. seen: (parts,) rows of each part before it. which:
    (BLOCK,) the part of each row of a block. before: (BLOCK,) how many rows of its part come before
    it in the block. each: (parts,) rows of each part in a block."""

    start: int
    seen: np.ndarray
    which: np.ndarray
    before: np.ndarray
    each: np.ndarray

    def seen_at(self, row: int) -> np.ndarray:
        blocks, rest = divmod(row - self.start, BLOCK)
        parts = len(self.each)
        return self.seen + blocks * self.each + np.bincount(self.which[:rest], minlength=parts)


class Schedule:
    """Which part each row comes from. Phases begin at whole batches.

    Args:
      parts: of the mixture.
      global_batch, total_steps: of the run.

    Raises:
      ConfigError: for a share too small to have one row in a block.
    """

    def __init__(self, parts: Sequence[Part], global_batch: int, total_steps: int):
        self._phases: list[_Phase] = []
        seen = np.zeros(len(parts), np.int64)
        for percent in sorted({percent for part in parts for percent, _ in part.share}):
            start = round(percent / 100 * total_steps) * global_batch
            if self._phases:
                seen = self._phases[-1].seen_at(start)
            shares = np.array([_share_at(part, percent) for part in parts])
            each = _apportion(shares)
            for part, share, rows in zip(parts, shares, each, strict=True):
                if share and not rows:
                    raise ConfigError(
                        f"config.mixture.{part.name}.share: {share:g} of {shares.sum():g} is less "
                        f"than one image in {BLOCK:,}; give it more, or 0"
                    )
            # the k-th of n rows of a part lies at (k + 1/2) / n of the block
            which = np.repeat(np.arange(len(parts)), each)
            before = np.concatenate([np.arange(n) for n in each])
            order = np.argsort((before + 0.5) / each[which], kind="stable")
            self._phases.append(_Phase(start, seen, which[order], before[order], each))
        self._starts = [phase.start for phase in self._phases]

    def at(self, row: int) -> tuple[int, int]:
        """(part, how many rows of that part came before) of a row of the stream."""
        phase = self._phase(row)
        block, place = divmod(row - phase.start, BLOCK)
        part = phase.which[place]
        return int(part), int(phase.seen[part] + block * phase.each[part] + phase.before[place])

    def seen(self, rows: int) -> np.ndarray:
        """(parts,) int64: how many of the first ``rows`` rows are each part's."""
        return self._phase(rows).seen_at(rows)

    def _phase(self, row: int) -> _Phase:
        return self._phases[bisect.bisect_right(self._starts, row) - 1]


def _apportion(shares: np.ndarray) -> np.ndarray:
    """(parts,) int64 of sum BLOCK, by largest remainders."""
    exact = shares / shares.sum() * BLOCK
    each = np.floor(exact).astype(np.int64)
    for i in np.argsort(each - exact, kind="stable")[: BLOCK - each.sum()]:
        each[i] += 1
    return each


class Mixture:
    """A :class:`~webssl_jax.data.pipeline.Source` of several, whose records are numbered one part
    after the other. Pickles.

    Args:
      parts: see :func:`parts`.
      sources: of each part, opened.
      global_batch, total_steps: of the run.

    Raises:
      UserError: for a selection that cannot be read or does not fit its shards.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        sources: Sequence[ArrayRecordSource],
        global_batch: int,
        total_steps: int,
    ):
        self.names = tuple(part.name for part in parts)
        self._sources = tuple(sources)
        self._selections = [
            _chosen(part, source) for part, source in zip(parts, sources, strict=True)
        ]
        self.counts = [
            len(source) if chosen is None else len(chosen)
            for source, chosen in zip(self._sources, self._selections, strict=True)
        ]
        self._ends = np.cumsum(self.counts).tolist()
        self.schedule = Schedule(parts, global_batch, total_steps)

    def order(self, seed: int) -> grain.MapDataset:
        """The endless stream of record numbers."""
        seeds = np.random.SeedSequence(seed).generate_state(len(self.counts))
        orders = [shuffled(n, int(s)) for n, s in zip(self.counts, seeds, strict=True)]
        firsts = [end - n for end, n in zip(self._ends, self.counts, strict=True)]
        return _Order(orders, firsts, self.schedule)

    def part_of(self, index: int) -> int:
        """The number of the part that a record belongs to."""
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        return bisect.bisect_right(self._ends, index)

    def span(self, index: int) -> tuple[int, int]:
        """The first record of its part, and the one after the last."""
        part = self.part_of(index)
        return self._ends[part] - self.counts[part], self._ends[part]

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> bytes:
        """As :class:`ArrayRecordSource`."""
        source, record = self._locate(index)
        return source[record]

    def locate(self, index: int) -> tuple[str, int]:
        source, record = self._locate(index)
        return source.locate(record)

    def describe(self, index: int) -> str:
        source, record = self._locate(index)
        return source.describe(record)

    def _locate(self, index: int) -> tuple[ArrayRecordSource, int]:
        part = self.part_of(index)
        place = index - self.span(index)[0]
        chosen = self._selections[part]
        return self._sources[part], place if chosen is None else int(chosen[place])

    @property
    def shards(self) -> list[Shard]:
        """Of all parts, named ``PART/SHARD``. records: those that are seen."""
        found = []
        for name, source, chosen in zip(self.names, self._sources, self._selections, strict=True):
            shards = source.shards
            if chosen is not None:
                ends = np.cumsum([shard.records for shard in shards])
                seen = np.bincount(np.searchsorted(ends, chosen, "right"), minlength=len(shards))
                shards = [one._replace(records=int(n)) for one, n in zip(shards, seen, strict=True)]
            found += [shard._replace(name=f"{name}/{shard.name}") for shard in shards]
        return found

    @property
    def lost_files(self) -> dict[str, str]:
        """As of :class:`ArrayRecordSource`."""
        return {file: why for source in self._sources for file, why in source.lost_files.items()}

    @property
    def lost_share(self) -> float:
        """Of the shards of all parts: those that this process passes over."""
        return len(self.lost_files) / sum(len(source.files) for source in self._sources)

    def close(self) -> None:
        for source in self._sources:
            source.close()

    def __enter__(self) -> Mixture:
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    def __str__(self) -> str:
        parts = [
            f"{name}: {n:,} of {source}" if n < len(source) else f"{name}: {source}"
            for name, n, source in zip(self.names, self.counts, self._sources, strict=True)
        ]
        return f"{len(self):,} records of {len(parts)} sources ({'; '.join(parts)})"


class _Order(grain.MapDataset):
    """The parts' own orders, one row from that whose turn it is."""

    def __init__(self, orders: Sequence[grain.MapDataset], firsts: list[int], schedule: Schedule):
        super().__init__(orders)
        self._orders, self._firsts, self._schedule = orders, firsts, schedule

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        part, place = self._schedule.at(index)
        record = self._orders[part][place]
        assert record is not None  # grain gives None for what a filter has dropped; there is none
        return self._firsts[part] + record


def _chosen(part: Part, source: ArrayRecordSource) -> np.ndarray | None:
    """(n,) int64, ascending: the numbers, in the source, of the records that are seen; None for
    all."""
    chosen = _read_selection(part, source) if part.selection else None
    count = len(source) if chosen is None else len(chosen)
    if not 0 < part.cap < count:
        return chosen
    drawn = np.random.default_rng(0).choice(count, part.cap, replace=False, shuffle=False)
    drawn.sort()
    return drawn if chosen is None else chosen[drawn]


def _read_selection(part: Part, source: ArrayRecordSource) -> np.ndarray:
    """(n,) int64, ascending: the numbers, in the source, of the records that are selected."""
    import pyarrow as pa  # which no run and no loader process without a selection should wait for
    import pyarrow.parquet as pq

    where = f"config.mixture.{part.name}.selection = {part.selection}"
    try:
        table = pq.read_table(part.selection, columns=["shard", "record"])
        records = table["record"].cast(pa.int64())  # refuses halves and texts
        if table["shard"].null_count + records.null_count:
            raise pa.ArrowInvalid("rows without a shard or a record")
    except (OSError, pa.ArrowException, KeyError) as error:
        raise UserError(
            f"{where}: cannot be read as parquet with the columns shard and record "
            f"({' '.join(str(error).split())})"
        ) from None
    if not len(table):
        raise UserError(f"{where}: selects no record")
    shards = source.shards
    named = table["shard"].combine_chunks().dictionary_encode()
    try:
        places = np.array(_numbers(named.dictionary.to_pylist(), source.files))
    except LookupError as error:
        raise UserError(f"{where}: names the shard {error.args[0]} {part.train}") from None
    sizes = np.array([shard.records for shard in shards])
    shard = places[named.indices.to_numpy()]
    record = records.to_numpy()
    outside = (record < 0) | (record >= sizes[shard])
    if outside.any():
        i = int(np.argmax(outside))
        raise UserError(
            f"{where}: names record {record[i]} of {shards[shard[i]].name}, which has "
            f"{sizes[shard[i]]:,}"
        )
    chosen = np.sort((np.cumsum(sizes) - sizes)[shard] + record)
    if (twice := chosen[1:] == chosen[:-1]).any():
        raise UserError(f"{where}: names {source.describe(int(chosen[np.argmax(twice)]))} twice")
    return chosen


def _numbers(names: Sequence[Any], files: Sequence[str]) -> list[int]:
    """Which of the files each name is the end of.

    Raises:
      LookupError: if it is that of none, or of several; with the words before the files' pattern.
    """
    ends: dict[int, dict[str, list[int]]] = {}  # by their number of parts
    numbers = []
    for name in map(str, names):
        depth = name.count("/") + 1
        if depth not in ends:
            ends[depth] = {}
            for i, file in enumerate(files):
                end = "/".join(file.split("/")[-depth:])
                ends[depth].setdefault(end, []).append(i)
        found = ends[depth].get(name, [])
        if len(found) != 1:
            which = "which is that of several of" if found else "which is not in"
            raise LookupError(f"{name!r}, {which}")
        numbers += found
    return numbers
