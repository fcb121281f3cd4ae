"""Goodput: how much of a run's time, over all its starts, trained the network.

Every second of a start belongs to one kind. ``WORKDIR/goodput.json`` holds one entry for each
start. The first process writes it and keeps it up to date during the run, so that a run that is
killed is counted too. Goodput is the time of steps whose result was kept, divided by all time. The
idea and the kinds are those of Google's ml-goodput-measurement.
"""

from __future__ import annotations

import contextlib
import json
import logging
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import TypedDict

from webssl_jax.files import write_json
from webssl_jax.telemetry.progress import format_seconds

# lost: steps that were trained again, because the run ended after its last checkpoint
KINDS = ("step", "data", "compile", "checkpoint", "evaluation", "init", "lost")
_LARGEST_SHARE = 0.01  # of the time may go to writing the file
log = logging.getLogger(__name__)


class Start(TypedDict):
    """An entry of the file: when a start began, from which step it went on, its last step, and
    {kind: seconds} of its time."""

    began: float
    start_step: int
    step: int
    seconds: dict[str, float]


class Goodput:
    """The time of this start of a run, and of those before it.

    Args:
      workdir: has ``goodput.json``.
      began: when this start began, of ``clock``. Until :meth:`enter` time is "init".
      enabled: whether this process writes the file.
      clock: seconds since a moment that is the same for all starts.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        began: float,
        *,
        enabled: bool = True,
        clock: Callable[[], float] = time.time,
    ):
        self._path, self._clock, self._enabled = workdir / "goodput.json", clock, enabled
        self._starts = _read(self._path)
        seconds = dict.fromkeys(KINDS[:-1], 0.0)
        self._this: Start = {"began": began, "start_step": 0, "step": 0, "seconds": seconds}
        self._kind, self._since, self._waited = "init", began, 0.0
        self._saved, self._save_seconds = 0.0, 0.0

    def begin(self, step: int) -> None:
        """The run goes on from the checkpoint of ``step``. From now on this start is in the file,
        so that one that is killed before its first step is counted too."""
        self._this |= {"start_step": step, "step": step}
        self._starts.append(self._this)
        self.save()

    def enter(self, kind: str) -> None:
        """From now on time is of this kind."""
        now = self._clock()
        self._this["seconds"][self._kind] += max(now - self._since, 0.0)  # clocks are set back
        self._kind, self._since = kind, now

    @contextlib.contextmanager
    def of(self, kind: str) -> Iterator[None]:
        """Within it time is of this kind. Afterwards it is of the kind before."""
        before = self._kind
        self.enter(kind)
        try:
            yield
        finally:
            self.enter(before)

    def step_done(self, step: int, wait_seconds: float) -> None:
        """``step`` is done.

        Args:
          wait_seconds: how long the loop has waited for the loader in all since this start. This
            part of the time is counted as data.
        """
        self.enter(self._kind)
        seconds, waited = self._this["seconds"], wait_seconds - self._waited
        waited = min(waited, seconds[self._kind])
        seconds[self._kind] -= waited
        seconds["data"] += waited
        self._waited, self._this["step"] = wait_seconds, step
        if self._clock() - self._saved >= self._save_seconds / _LARGEST_SHARE:
            self.save()

    def save(self) -> None:
        """Brings the file up to date. A failure is logged once and is no error: the file is only a
        record, and the other processes must not wait for this one."""
        self.enter(self._kind)
        self._saved = self._clock()
        if not self._enabled:
            return
        began = time.perf_counter()
        try:
            write_json(self._path, self._starts)
        except OSError as error:
            log.warning("%s is not kept any more: %s", self._path, error.strerror)
            self._enabled = False
        self._save_seconds = time.perf_counter() - began

    def finish(self, step: int, wait_seconds: float) -> None:
        """The run ends after ``step``: brings the file up to date and logs the report."""
        self.step_done(step, wait_seconds)
        self.save()
        log.info("%s", self.report())

    def totals(self) -> dict[str, float]:
        """{kind: seconds} over all starts."""
        self.enter(self._kind)
        return totals(self._starts)

    def seconds(self, kind: str) -> float:
        """How long this start has spent on a kind."""
        self.enter(self._kind)
        return self._this["seconds"][kind]

    def fraction(self) -> float:
        """Time of steps whose result was kept, divided by all time of all starts."""
        seconds = self.totals()
        return seconds["step"] / max(sum(seconds.values()), 1e-9)

    def report(self) -> str:
        """One line for the log."""
        seconds = self.totals()
        whole = max(sum(seconds.values()), 1e-9)
        parts = [f"{name} {100 * value / whole:.1f}%" for name, value in seconds.items()]
        time_taken = f"{format_seconds(whole)} in {len(self._starts)} start(s)"
        return f"goodput {100 * self.fraction():.1f}% of {time_taken}: {', '.join(parts)}"


def totals(starts: list[Start]) -> dict[str, float]:
    """{kind of :data:`KINDS`: seconds}. The steps of a start beyond the step that a later start
    began from are lost. They count with the mean time of a step in their start."""
    out = dict.fromkeys(KINDS, 0.0)
    for number, start in enumerate(starts, 1):
        for kind, value in start["seconds"].items():
            out[kind] += value
        done = start["step"] - start["start_step"]
        if number == len(starts) or done <= 0:
            continue
        again_from = min(later["start_step"] for later in starts[number:])
        again = min(max(start["step"] - again_from, 0), done)
        lost = start["seconds"]["step"] * again / done
        out["step"] -= lost
        out["lost"] += lost
    return out


def seconds_of(workdir: pathlib.Path) -> dict[str, float]:
    """{kind of :data:`KINDS`: seconds} of a run, over all its starts; 0 where it wrote none."""
    return totals(_read(workdir / "goodput.json"))


def _read(path: pathlib.Path) -> list[Start]:
    """What earlier starts wrote; empty if it cannot be read, because it is only a record."""
    try:
        starts = json.loads(path.read_text())
        totals(starts)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []
    return starts
