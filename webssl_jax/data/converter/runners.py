"""Who does the work on shards: this process, processes of this machine, or Apache Beam.

A runner is a context manager that gives ``do(function, shards, progress)``: it calls the function
with each shard, in any order, anywhere, and returns when all are done. All run the same functions,
of ``work`` and of ``webssl_jax.curation``; only they know of processes or pipelines.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from webssl_jax.config import UserError
from webssl_jax.data import processes
from webssl_jax.data.converter import duplicates, plan, stats, work
from webssl_jax.data.converter.items import Reader, Rules, no_progress
from webssl_jax.errors import DISK_FULL
from webssl_jax.files import write_json

Progress = Callable[[int], None]
Pass = Callable[[Any, Progress], None]  # over one shard, whose ``size`` is its share of the work
Do = Callable[[Pass, Sequence[Any], Progress], None]
Runner = Callable[[], contextlib.AbstractContextManager[Do]]


def convert(
    output: Path,
    reader: Reader,
    rules: Rules,
    runner: Runner,
    progress: Progress = no_progress,
    workers: int = 1,
    wave: int = 1 << 30,
) -> dict[str, dict[str, Any]]:
    """Does what is not done of a plan.

    Args:
      output: a folder that :func:`plan.prepare` has seen.
      progress: called with the size of the inputs done since the last call, several times a second;
        first with those of the shards that were staged before.
      workers: processes for the duplicates.
      wave: shards of the first wave; see :func:`waves`.

    Returns:
      {split: statistics}, also written to ``<output>/<split>.summary.json`` (but ``listed``).

    Raises:
      UserError: if the disk is full, a worker dies, or another process writes there. What is
        staged or finished stays.
    """
    with plan.lock(output):
        sizes = plan.planned(output)
        _remove_temporaries(output)
        shards = [
            work.Shard(str(output), split, index, len(mine), reader, rules, size)
            for split, mine in sizes.items()
            for index, size in enumerate(mine)
        ]
        progress(sum(shard.size for shard in shards if shard.staged))
        try:
            if not all(shard.finished for shard in shards):
                with runner() as do:
                    for begin, end in waves(len(shards), wave):
                        new, known = shards[begin:end], shards[:end]
                        do(work.stage_shard, [s for s in new if not s.staged], progress)
                        mark_duplicates(known, rules, workers)
                        do(work.finish_shard, [s for s in known if not s.finished], no_progress)
        except BrokenProcessPool:
            raise UserError(
                f"a worker process died, perhaps for lack of memory ({_done(shards)}); start the "
                "same command again with fewer --workers"
            ) from None
        except (OSError, RuntimeError) as error:
            if not (getattr(error, "errno", 0) in DISK_FULL or work.means_disk_full(error)):
                raise
            raise UserError(
                f"--output {output}: No space left on device ({_done(shards)}); make room and "
                "start the same command again"
            ) from None
        finally:
            _remove_temporaries(output)
        summaries = {}
        for split in sizes:
            parts = [
                read_json(shard.aside(".stats.json")) for shard in shards if shard.split == split
            ]
            summary = {"split": split, "shards": len(parts), **stats.total_stats(parts)}
            # As long as a list of the user's: for the caller, who has it.
            told = {name: value for name, value in summary.items() if name != "listed"}
            write_json(output / f"{split}.summary.json", told)
            summaries[split] = summary
        return summaries


def waves(count: int, first: int) -> list[tuple[int, int]]:
    """Shards are staged and finished in waves, each four times what came before: a duplicate is
    what came earlier in the plan, so the first shards do not wait for the last."""
    ends = [0]
    while ends[-1] < count:
        ends.append(min(count, ends[-1] * 5 or max(1, first)))
    return list(itertools.pairwise(ends))


def mark_duplicates(shards: Sequence[work.Shard], rules: Rules, workers: int = 1) -> None:
    """Writes, for every shard that is not finished, which of its records come again. Of the shards
    of a plan these must be the first.

    Keys are unique in any case; images may come again if the rules say so.
    """
    if all(shard.finished for shard in shards):
        return
    keys = duplicates.find([shard.aside(".keys") for shard in shards], workers=workers)
    images = [np.zeros(0, np.uint32)] * len(shards)
    if not rules.keep_duplicates:
        images = duplicates.find([shard.aside(".images") for shard in shards], workers=workers)
    for shard, image_places, key_places in zip(shards, images, keys, strict=True):
        if not shard.finished:
            np.savez(shard.aside(".repeats.npz"), images=image_places, keys=key_places)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def _done(shards: Sequence[work.Shard]) -> str:
    done = sum(shard.staged for shard in shards)
    return f"{done} of {len(shards)} shards are done and stay"


def _remove_temporaries(output: Path) -> None:
    for path in (*output.glob("*.tmp"), *(output / plan.PLAN_FOLDER).glob("*.tmp")):
        path.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------ this machine


@contextlib.contextmanager
def here() -> Iterator[Do]:
    """This process, one shard after the other."""

    def do(function: Pass, shards: Sequence[Any], progress: Progress) -> None:
        for shard in shards:
            function(shard, progress)

    yield do


_COUNTER: Any = None  # a worker's share of the progress, set once in each process


@contextlib.contextmanager
def pool(workers: int) -> Iterator[Do]:
    """Processes of this machine."""
    # Spawned, not forked: the record writer has threads.
    context = get_context("spawn")
    counter = context.Value("q", 0)
    executor = futures.ProcessPoolExecutor(
        workers, context, initializer=_start_worker, initargs=(counter,)
    )

    def do(function: Pass, shards: Sequence[Any], progress: Progress) -> None:
        seen = counter.value
        waiting = {executor.submit(_work, function, shard) for shard in shards}
        while waiting:
            done, waiting = futures.wait(waiting, timeout=0.2, return_when=futures.FIRST_EXCEPTION)
            now = counter.value
            if now > seen:
                progress(now - seen)
                seen = now
            for future in done:
                future.result()

    try:
        yield do
    finally:
        processes.end_workers(executor)  # without waiting for shards in work: they are redone


def _start_worker(counter: Any) -> None:
    global _COUNTER
    _COUNTER = counter
    processes.start_worker()


def _work(function: Pass, shard: Any) -> None:
    def progress(size: int) -> None:
        with _COUNTER.get_lock():
            _COUNTER.value += size

    function(shard, progress)


# -------------------------------------------------------------------------------------------- Beam


@contextlib.contextmanager
def beam(options: str) -> Iterator[Do]:
    """An Apache Beam pipeline for each pass; ``options`` are Beam's own flags.

    Every worker must see the input and the output under the same paths: a file system that they
    share, or a bucket (:mod:`remote`). Progress is told when a pass is done; Beam tells its own.

    Raises:
      UserError: if apache-beam is not installed, or does not take the options.
    """
    try:
        import apache_beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError:
        raise UserError(
            "--runner beam: apache-beam is not installed; pip install '.[beam]' in an environment "
            "of its own (it needs older packages than tools/constraints.txt pins)"
        ) from None

    def do(function: Pass, shards: Sequence[Any], progress: Progress) -> None:
        if not shards:
            return
        try:
            pipeline = apache_beam.Pipeline(options=PipelineOptions(shlex.split(options)))
        except ValueError as error:
            raise UserError(f"--beam-options {options}: {error}") from None
        try:
            with pipeline:
                tasks = pipeline | "Shards" >> apache_beam.Create(shards, reshuffle=True)
                tasks | function.__name__ >> apache_beam.Map(
                    lambda shard: function(shard, no_progress)
                )
        except Exception as error:  # a type of Beam's own, around what a worker has raised
            told = re.search(
                r"(?:User|Transient)Error: (.+?)(?: \[while running|$)", str(error), re.M
            )
            if told is None:
                raise
            raise UserError(told[1]) from None
        progress(sum(shard.size for shard in shards))

    yield do
