"""Runs what is missing of a study, each run a process of its own, some at a time.

What is done is told by the workdirs alone: the checkpoint of the last step and the outcome of every
row there, made with the settings that the study asks for. So a study may be stopped or killed at
any moment, and started again, also with other cells; a run that was cut goes on from its
checkpoint. A run that fails is named, with its last words, and the others go on.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from webssl_jax import cli
from webssl_jax import config as configs
from webssl_jax.checkpoints import directory
from webssl_jax.config import UserError
from webssl_jax.evaluators import outcome
from webssl_jax.evaluators.features import SHARED
from webssl_jax.evaluators.seeds import but_for_the_seed
from webssl_jax.runs import read_config
from webssl_jax.study.cells import Run, Study
from webssl_jax.telemetry.progress import format_seconds
from webssl_jax.workdirs import WorkdirLock

_MOST_STARTS = 5  # in a row that save no further step
_POLL = 0.2  # seconds
_SPEAK = 30.0  # seconds between two lines
# A study that is killed leaves no run behind: they get a SIGTERM (15), save and end. Linux only.
_END_WITH_PARENT = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 15); os.execvp(sys.argv[1], sys.argv[1:])"
)
Command = Callable[[Run], list[str]]
log = logging.getLogger(__name__)


def command(run: Run) -> list[str]:
    """What trains a run on this machine."""
    return [sys.executable, "-m", "webssl_jax.train", *run.arguments()]


def end_with_parent(command: list[str]) -> list[str]:
    """The same command, in a process that does not outlive this one."""
    return [sys.executable, "-c", _END_WITH_PARENT, *command]


def is_done(run: Run) -> bool:
    """Whether its last step is saved, and all its rows were judged there.

    Raises:
      UserError: if they were, or its checkpoints were made, with other settings.
    """
    if not (run.workdir / "config.json").exists():
        return False
    then = but_for_the_seed(read_config(run.workdir))
    now = but_for_the_seed(configs.from_resolved(configs.resolved(run.cell.config)))
    if differs := configs.differences(then, now):
        words = ", ".join(f"config.{key}: {a} -> {b}" for key, a, b in differs[:4])
        raise UserError(f"{run.workdir}: was made with other settings ({words}); remove it")
    rows, steps = run.workdir / "eval", run.cell.steps
    saved = directory(run.workdir, run.cell.config.checkpoint.folder) / str(steps)
    judged = [outcome.step_path(rows / name, steps) for name in now["evals"]]
    return saved.exists() and all(path.exists() for path in judged)


def share_cache(cache: Path, folder: Path) -> None:
    """Links the parts of a run's cache that are of no model, such as the figures of trivial
    features and what a language model makes of captions, to ones that all runs of the study in
    ``folder`` use. Files there are written whole, so that two runs may write the same one. Where
    there are no links each run finds them by itself."""
    for name in SHARED:
        own, all_of_them = cache / name, folder / "cache" / name
        all_of_them.mkdir(parents=True, exist_ok=True)
        cache.mkdir(parents=True, exist_ok=True)
        try:
            if not own.exists():
                own.symlink_to(os.path.relpath(all_of_them, cache))
        except OSError as error:
            log.warning("%s: shares nothing with other runs (%s)", cache, error.strerror)


@dataclasses.dataclass
class _Child:
    run: Run
    process: subprocess.Popen
    from_step: int


@dataclasses.dataclass
class Progress:
    """What became of the runs. failed: {name: last words}."""

    done: list[str] = dataclasses.field(default_factory=list)
    failed: dict[str, str] = dataclasses.field(default_factory=dict)


def run_all(
    study: Study, folder: Path, jobs: int, say: Callable[[str], None], start: Command = command
) -> Progress:
    """Runs what is not done, ``jobs`` at a time.

    Args:
      say: gets a line now and then.
      start: the command of a run.

    Raises:
      UserError: if another process runs this study.
      KeyboardInterrupt: after Ctrl-C or SIGTERM, once all runs have saved their state.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = WorkdirLock(folder)
    progress, waiting = Progress(), collections.deque[Run]()
    for run in study.runs(folder):
        try:
            progress.done.append(run.name) if is_done(run) else waiting.append(run)
        except UserError as error:
            progress.failed[run.name] = str(error)
    runner = _Runner(progress, waiting, jobs, say, start, len(study.runs(folder)), folder)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        runner.work()
    finally:
        signal.signal(signal.SIGTERM, before)
        runner.stop()
        lock.release()
    return progress


class _Runner:
    def __init__(
        self,
        progress: Progress,
        waiting: collections.deque[Run],
        jobs: int,
        say: Callable[[str], None],
        start: Command,
        total: int,
        folder: Path,
    ):
        self._progress, self._waiting, self._jobs = progress, waiting, jobs
        self._say, self._command, self._total = say, start, total
        self._folder = folder
        self._children: list[_Child] = []
        self._useless: collections.Counter[str] = collections.Counter()
        self._images = sum(run.cell.images - _images(run) for run in waiting)
        self._begun, self._spoken = time.monotonic(), 0.0

    def work(self) -> None:
        for name, words in self._progress.failed.items():
            self._say(f"{name}: {words}")
        while self._waiting or self._children:
            while self._waiting and len(self._children) < self._jobs:
                self._start(self._waiting.popleft())
            for child in [c for c in self._children if c.process.poll() is not None]:
                self._children.remove(child)
                self._ended(child)
            if time.monotonic() > self._spoken + _SPEAK:
                self._speak()
            time.sleep(_POLL)

    def _start(self, run: Run) -> None:
        run.workdir.mkdir(parents=True, exist_ok=True)
        try:
            WorkdirLock(run.workdir).release()
        except UserError:  # one that an earlier study left behind saves its state now
            self._waiting.append(run)
            time.sleep(_POLL)
            return
        share_cache(run.workdir / "eval" / ".cache", self._folder)
        with open(run.workdir / "train.log", "ab") as log:
            command = end_with_parent(self._command(run))
            process = subprocess.Popen(command, stdout=log, stderr=log)
        self._children.append(_Child(run, process, _step(run)))

    def _ended(self, child: _Child) -> None:
        run, code = child.run, child.process.returncode
        try:
            if code == 0 and is_done(run):
                self._progress.done.append(run.name)
                self._say(f"{run.name}: done")
                self._speak()
                return
            words = _last_words(run.workdir / "train.log")
        except UserError as error:
            words = str(error)
        passes = code == cli.EXIT_RESTART or code < 0
        self._useless[run.name] = 0 if _step(run) > child.from_step else self._useless[run.name] + 1
        if passes and self._useless[run.name] < _MOST_STARTS:
            self._say(f"{run.name}: ended with {code} at step {_step(run):,}, started again")
            self._waiting.append(run)
            return
        self._progress.failed[run.name] = f"exit code {code}: {words}"
        self._say(f"{run.name}: failed, {self._progress.failed[run.name]}")

    def _speak(self) -> None:
        self._spoken = time.monotonic()
        runs = [*self._waiting, *(child.run for child in self._children)]
        left = sum(run.cell.images - _images(run) for run in runs)
        done, seconds = self._images - left, time.monotonic() - self._begun
        rest = f", {format_seconds(seconds * left / done)} left" if done > 0 and left else ""
        working = ", ".join(
            f"{child.run.name} {_step(child.run):,}/{child.run.cell.steps:,}"
            for child in self._children
        )
        failed = f", {len(self._progress.failed)} failed" * bool(self._progress.failed)
        self._say(
            f"{len(self._progress.done)} of {self._total} runs done{failed}{rest}"
            + (f" | {working}" if working else "")
        )

    def stop(self) -> None:
        """Asks what still runs to save and end, and waits for it."""
        for child in self._children:
            child.process.terminate()
        for child in self._children:
            child.process.wait()


def _step(run: Run) -> int:
    """The last step that the run has written; 0 before."""
    try:
        with open(run.workdir / "metrics.jsonl", "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 65536))
            lines = file.read().splitlines()
    except FileNotFoundError:
        return 0
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):  # the line that is just being written
            continue
    return 0


def _images(run: Run) -> int:
    return _step(run) * run.cell.config.global_batch


def _last_words(path: Path) -> str:
    lines: Sequence[str] = path.read_text("utf-8", "replace").splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or [line for line in lines if line.strip()] or ["it said nothing"])[-1]
