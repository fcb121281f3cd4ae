"""The loader: batch ``k`` is a pure function of (source, view, seed, ``k``).

Row ``r`` of the endless stream is record ``shuffle(seed, r)``, reshuffled every epoch, seen through
the view with a generator seeded by ``(seed, r)``. Global batch ``k`` is rows ``[k G, (k+1) G)``,
and a host takes its rows from it. Nothing else enters: not the number of hosts, workers or threads,
and no saved iterator state. So a run resumes by its step number alone, on any topology.

Below the batch, work is cut into chunks of at most ``_CHUNK`` rows, which threads or worker
processes make in parallel: small enough that the first batch comes soon and all cores share one
batch, large enough that handing them over costs nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import logging
import os
import signal
import sys
import time
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any, Protocol

import grain
import numpy as np
import tenacity
from absl import flags

from webssl_jax.config import TransientError, UserError
from webssl_jax.data import processes, records
from webssl_jax.data.decode import DecodeError
from webssl_jax.data.mixture import Mixture, shuffled
from webssl_jax.data.sources import DamagedRecord
from webssl_jax.data.views import RecordView, Turns

Batch = dict[str, np.ndarray]
# of an encoded image; or of a whole record
TrainView = Callable[[bytes, np.random.Generator], Mapping[str, np.ndarray]] | RecordView
ImageView = Callable[[bytes], np.ndarray]

# What a record may do wrong. Anything else is a bug or a broken machine and stops the run.
DAMAGE = (DamagedRecord, records.RecordError, DecodeError)
_SUBSTITUTES = 20  # consecutive failures that no healthy data set produces
_CHUNK = 16
_JUDGED_FROM = 10_000  # images: among fewer the share of damaged ones is chance
_logger = logging.getLogger(__name__)


class _WorkerDied(TransientError):
    """A worker process was killed."""


class Source(Protocol):
    """Random access to encoded records; see ``sources.ArrayRecordSource``."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> bytes: ...

    def describe(self, index: int) -> str: ...


@dataclasses.dataclass
class Damage:
    """What this process met so far. ``by_row``: (rows of this process, parts of the mixture or 1)
    int32, how often each row of its batches was delivered with another image than the one that was
    due, which was of that part. ``records``: {record index: reason}."""

    by_row: np.ndarray
    records: dict[int, str] = dataclasses.field(default_factory=dict)

    @property
    def substituted(self) -> int:
        """Images replaced on this process. Hosts may share rows, so these do not add up: the sum
        over the global rows (``sharding.mesh.to_global``) does."""
        return int(self.by_row.sum())


class TrainLoader:
    """An endless iterator over the batches of a training run, from ``start_step`` on.

    A worker process that is killed, as for lack of memory, is started again: a batch is made anew
    from its number. ``restarts`` counts that.

    Each batch is a dict of arrays with ``len(rows)`` rows: what the view returns (``image``: (b, H,
    W, 3) uint8), ``record``: (b,) int64, the index of the record that was due, and ``substituted``:
    (b,) bool, True where that record is damaged and another stands in for it. The stand-in is a
    function of (seed, record) alone, so the order never shifts. Damaged records are counted in
    ``damage`` and named once each in the log: each process warns of those in its own rows.

    Args:
      source: see :class:`Source`. With workers it must pickle.
      view: from an encoded image (:class:`RecordView`: a record) and a generator to a dict of
        arrays; or several, of which each batch takes one. With workers it must pickle.
      global_batch: rows of a batch over all hosts.
      seed: 0 <= seed < 2**32.
      rows: the rows of each global batch that this process delivers (``sharding.mesh.local_rows``):
        integers in 0..global_batch - 1, ascending, not necessarily neighbours; by default all.
      start_step: the first batch to deliver.
      workers: processes that decode; 0 decodes in threads of this process, which is best on few
        cores.
      threads: decoding threads in each process. Pillow decodes without holding Python's lock.
      read_ahead: batches kept ready. Bounds the memory: about ``read_ahead + 1`` batches.
      max_damaged: the share of images that may be replaced for damage, judged from 10,000 images
        on; 0: the first is an error.
      worker_starts: how often workers that die are started before one batch.
      on_damage: called once with each damaged record's index and reason, in this process.

    Raises:
      UserError: for numbers that do not fit together; while iterating, when 20 substitutes in a row
        are damaged, more records than may be, or a shard has become another one.
      TransientError: while iterating, when storage failed for longer than the source has patience,
        or worker processes were killed again and again.
    """

    def __init__(
        self,
        source: Source,
        view: TrainView | Turns,
        *,
        global_batch: int,
        seed: int,
        rows: np.ndarray | None = None,
        start_step: int = 0,
        workers: int = 0,
        threads: int = 16,
        read_ahead: int = 2,
        max_damaged: float = 1.0,
        worker_starts: int = 5,
        on_damage: Callable[[int, str], None] | None = None,
    ):
        if len(source) < 1:
            raise UserError("the data source holds no record")
        if global_batch < 1:
            raise UserError(f"a global batch of {global_batch} images: need at least 1")
        rows = np.arange(global_batch) if rows is None else np.asarray(rows)
        if (
            rows.ndim != 1
            or not rows.size
            or rows.dtype.kind not in "iu"
            or rows[0] < 0
            or rows[-1] >= global_batch
            or (rows[1:] <= rows[:-1]).any()
        ):
            raise UserError(
                f"rows {np.array2string(rows, threshold=8)} of a global batch of {global_batch}: "
                f"need one or more integers in 0..{global_batch - 1}, each once, ascending"
            )
        if not 0 <= seed < 2**32:
            raise UserError(f"seed {seed} is outside 0 <= seed < 2**32")
        if start_step < 0 or workers < 0 or threads < 1 or read_ahead < 1:
            raise UserError(
                "loader: need start_step >= 0, workers >= 0, threads >= 1 and read_ahead >= 1, "
                f"got {start_step}, {workers}, {threads} and {read_ahead}"
            )
        if len(source) < global_batch:
            _logger.warning(
                "%d images are fewer than a batch of %d: each batch shows some of them more than "
                "once",
                len(source),
                global_batch,
            )
        self.step = start_step
        self.mixture = source if isinstance(source, Mixture) else None
        parts = len(self.mixture.names) if self.mixture else 1
        self.damage = Damage(np.zeros((len(rows), parts), np.int32))
        self.restarts = 0
        self._delivered, self._max_damaged, self._on_damage = 0, max_damaged, on_damage
        self._worker_starts = worker_starts
        self.wait_seconds = 0.0
        self._source = source
        turns = view if isinstance(view, Turns) else None
        views: tuple[TrainView, ...] = view.views if isinstance(view, Turns) else (view,)
        loads = [_Load(source, one, seed) for one in views]
        self._load = loads[0]
        order = shuffled(len(source), seed)
        if isinstance(source, Mixture):
            order = source.order(seed).seed(seed)
        streams = [order.random_map(load) for load in loads]
        number = functools.partial(turns.number, seed) if turns else None
        self._make_chunks = functools.partial(
            _Chunks, streams, number, global_batch=global_batch, rows=rows.tolist()
        )
        self._all_chunks = self._make_chunks(start_step=0)
        self._per_batch = self._all_chunks.per_batch
        self._workers, self._threads = workers, threads
        self._buffered = read_ahead * self._per_batch
        self._start()

    def _start(self) -> None:
        """Threads or workers that make the batches from ``step`` on."""
        chunks = self._make_chunks(start_step=self.step)
        self._iterator = _iterate(chunks, self._workers, self._threads, self._buffered)
        # Also when the loader is dropped without close(): a worker left behind would keep Python
        # from exiting.
        self._close = weakref.finalize(self, self._iterator.close)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        started = time.perf_counter()
        attempts = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(_WorkerDied),
            stop=tenacity.stop_after_attempt(self._worker_starts),
            wait=tenacity.wait_exponential(multiplier=0.5),
            before_sleep=self._restart,
            reraise=True,
        )
        batch = attempts(self._take)
        self.wait_seconds += time.perf_counter() - started
        self._delivered += len(batch["record"])
        self._note_damage(batch)
        self.step += 1
        return batch

    def _take(self) -> Batch:
        try:
            return _concatenate([next(self._iterator) for _ in range(self._per_batch)])
        except RuntimeError as error:
            if "process was terminated unexpectedly" not in str(error):
                raise
            raise _WorkerDied(
                f"a loader process died at step {self.step}, killed or for lack of memory; start "
                "the same command again, perhaps with fewer config.data.workers"
            ) from None

    def _restart(self, state: tenacity.RetryCallState) -> None:
        assert state.next_action is not None
        self.restarts += 1
        _logger.warning(
            "a loader process died at step %d, killed or for lack of memory; starting all of them "
            "again in %.1f s (%d in all)",
            self.step,
            state.next_action.sleep,
            self.restarts,
        )
        self._close()
        self._start()

    @property
    def lost_share(self) -> float:
        """Of the source's shards: those that are passed over."""
        return getattr(self._source, "lost_share", 0.0)

    def batch_at(self, step: int) -> Batch:
        """Batch ``step``, made on the spot, for replay and tests. Neither counted nor timed."""
        first = step * self._per_batch
        return _concatenate([self._all_chunks[first + i] for i in range(self._per_batch)])

    def close(self) -> None:
        """Ends threads and worker processes. Idempotent."""
        self._close()

    def __enter__(self) -> TrainLoader:
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    def _note_damage(self, batch: Batch) -> None:
        substituted = batch["substituted"]
        if not substituted.any():
            return
        for row in np.flatnonzero(substituted):
            index = int(batch["record"][row])
            self.damage.by_row[row, self.mixture.part_of(index) if self.mixture else 0] += 1
            if index not in self.damage.records:
                reason = self._load.explain(index)
                self.damage.records[index] = reason
                _logger.warning(
                    "damaged record replaced: %s: %s", self._source.describe(index), reason
                )
                if self._on_damage:
                    self._on_damage(index, reason)
        replaced, judged = self.damage.substituted, max(self._delivered, _JUDGED_FROM)
        if replaced > self._max_damaged * judged:
            raise UserError(
                f"{self._source.describe(index)}: {self.damage.records[index]}; with it "
                f"{replaced:,} of {self._delivered:,} images were replaced for damage, more than "
                f"the share of {self._max_damaged:g} that may be (config.data.max_damaged_records)"
            )


class _Load:
    """From a record index and a generator to one row. Runs in threads and worker processes."""

    def __init__(self, source: Source, view: TrainView, seed: int):
        self.source, self.view, self.seed = source, view, seed

    def __call__(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        for candidate in self._candidates(index):
            try:
                row = self._see(candidate, rng)
            except DAMAGE:
                continue
            return {**row, "record": np.int64(index), "substituted": np.bool_(candidate != index)}
        raise UserError(
            f"{self.source.describe(index)} and {_SUBSTITUTES} substitutes for it are all damaged; "
            f"the last reason: {self.explain(candidate)}. The shard set looks broken: check it, or "
            "copy it again"
        )

    def _see(self, index: int, rng: np.random.Generator) -> Mapping[str, np.ndarray]:
        record = records.decode(self.source[index])
        if isinstance(self.view, RecordView):
            return self.view(record, rng)
        return self.view(record.image, rng)

    def _candidates(self, index: int) -> Iterator[int]:
        yield index
        first, end = 0, len(self.source)
        if isinstance(self.source, Mixture):  # of the same part
            first, end = self.source.span(index)
        generator = np.random.default_rng([self.seed, index])
        yield from generator.integers(first, end, size=_SUBSTITUTES).tolist()

    def explain(self, index: int) -> str:
        """Why a record is damaged, found by trying it again."""
        try:
            self._see(index, np.random.default_rng(0))
        except DAMAGE as error:
            return " ".join(str(error).split())
        return "failed once, readable now"


class _Chunks(grain.MapDataset):
    """This host's rows of every global batch from ``start_step`` on, in ``per_batch`` stacks
    each; of batch ``k`` from stream ``number(k)``, where there are several."""

    def __init__(
        self,
        streams: Sequence[grain.MapDataset],
        number: Callable[[int], int] | None,
        *,
        global_batch: int,
        rows: list[int],
        start_step: int,
    ):
        super().__init__(streams)
        self._streams, self._number = streams, number
        self._global_batch, self._start_step, self._rows = global_batch, start_step, rows
        self.per_batch = -(-len(rows) // _CHUNK)

    def __len__(self) -> int:
        # The rows are endless (sys.maxsize of them); so are these.
        return (sys.maxsize // self._global_batch - self._start_step) * self.per_batch

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        step, piece = divmod(index, self.per_batch)
        step += self._start_step
        stream = self._streams[self._number(step) if self._number else 0]
        first = step * self._global_batch
        size = len(self._rows)
        rows = self._rows[piece * size // self.per_batch : (piece + 1) * size // self.per_batch]
        elements: list[Any] = [stream[first + row] for row in rows]  # no filter, so no None
        return {name: np.stack([element[name] for element in elements]) for name in elements[0]}


def _iterate(
    chunks: grain.MapDataset, workers: int, threads: int, buffered: int
) -> grain.DatasetIterator:
    """Iterates in order, with ``buffered`` chunks ready (or the least that the workers need)."""
    if not workers:
        options = grain.ReadOptions(
            num_threads=min(threads, buffered), prefetch_buffer_size=buffered
        )
        return iter(chunks.to_iter_dataset(options))
    if not flags.FLAGS.is_parsed():
        # grain reads its own flags here, and outside absl.app nobody has parsed any.
        flags.FLAGS.mark_as_parsed()
    # A chunk waits in one of three places: in the worker, in its queue, and in the thread that
    # empties the queue.
    each = max(1, buffered // (3 * workers))
    options = grain.ReadOptions(num_threads=min(threads, each), prefetch_buffer_size=each)
    return iter(
        chunks.to_iter_dataset(options).mp_prefetch(
            grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=each),
            worker_init_fn=_start_worker,
        )
    )


def _start_worker(index: int, count: int) -> None:
    """Runs first in every worker process."""
    del index, count
    processes.start_worker()
    # A scheduler's signal to the whole process group is the main process's to answer, as Ctrl-C is:
    # it finishes its step, saves, and closes the loader.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # A worker needs no accelerator, and must never take one away from the main process.
    os.environ["JAX_PLATFORMS"] = "cpu"


def _concatenate(chunks: Sequence[Batch]) -> Batch:
    if len(chunks) == 1:
        return dict(chunks[0])
    return {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}


def read_some(
    source: Source,
    see: Callable[[records.Record], Any],
    limit: int | None = None,
    threads: int = 16,
) -> list[tuple[int, Any]]:
    """(index, ``see(record)``) of those records of a source for which it is not None, in their
    order; at most ``limit``, drawn evenly from the whole source by a fixed shuffle (shards are
    often sorted by class). Damaged records as of :func:`read_each`."""
    order = grain.MapDataset.range(len(source))
    if limit is not None:
        order = order.shuffle(seed=0)
    # grain gives None for what a filter has dropped; there is no filter here
    indices = (index for i in range(len(order)) if (index := order[i]) is not None)
    with contextlib.closing(read_each(source, see, indices, threads)) as found:
        return sorted(itertools.islice(found, limit), key=lambda row: row[0])


def read_each(
    source: Source, see: Callable[[records.Record], Any], indices: Iterable[int], threads: int = 16
) -> Generator[tuple[int, Any], None, None]:
    """Yields (index, ``see(record)``) of the records ``indices``, in this order, a few ahead,
    without those for which it is None. Damaged ones are skipped, named in the log and counted
    there."""
    damaged = 0
    with contextlib.closing(read_all(source, see, indices, threads)) as found:
        try:
            for index, value, reason in found:
                if reason:
                    damaged += 1
                    _logger.warning(
                        "damaged record skipped: %s: %s", source.describe(index), reason
                    )
                elif value is not None:
                    yield index, value
        finally:
            if damaged:
                _logger.warning("%d damaged records skipped", damaged)


def read_all(
    source: Source, see: Callable[[records.Record], Any], indices: Iterable[int], threads: int = 16
) -> Generator[tuple[int, Any, str], None, None]:
    """Yields (index, ``see(record)``, "") of the records ``indices``, in this order, a few ahead;
    of a damaged one (index, None, the reason)."""

    def read(index: int) -> tuple[int, Any, str]:
        try:
            return index, see(records.decode(source[index])), ""
        except DAMAGE as error:
            return index, None, " ".join(str(error).split())

    indices = iter(indices)
    with futures.ThreadPoolExecutor(threads) as pool:
        while span := list(itertools.islice(indices, 16 * threads)):
            yield from pool.map(read, span)
