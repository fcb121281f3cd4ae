"""The progress line of everything that takes long: how much is done, how fast, how long it still
takes.

On a terminal the line is rewritten in place. Elsewhere, as in a log file, a new line appears every
few seconds.
"""

from __future__ import annotations

import collections
import sys
import time
from typing import TextIO

from webssl_jax.cli import TIME


def format_seconds(seconds: float) -> str:
    """``59s``, ``12:05``, ``3:12:05`` or ``2d 03:12``."""
    seconds = max(0, round(seconds))
    days, rest = divmod(seconds, 86400)
    hours, rest = divmod(rest, 3600)
    minutes, secs = divmod(rest, 60)
    if days:
        return f"{days}d {hours:02d}:{minutes:02d}"
    if hours:
        return f"{hours}:{minutes:02d}:{secs:02d}"
    return f"{minutes}:{secs:02d}" if minutes else f"{secs}s"


class Progress:
    """Counts ``unit``s of work up to ``total`` (None if it is not known) and prints a line.

    The rate is that of the last ``window`` updates, so that it follows a machine that slows down.
    Pauses after which the caller calls :meth:`resume`, such as evaluations, do not count. ``timed``
    lines in a log file begin with the time, as those of ``cli.log_to_stderr``.
    """

    def __init__(
        self,
        total: int | None,
        label: str,
        unit: str,
        stream: TextIO | None = None,
        *,
        done: int = 0,
        window: int = 50,
        plain_every_seconds: float = 10.0,
        timed: bool = False,
    ):
        self.total, self.label, self.unit = total, label, unit
        self.done = done
        self._stream = stream or sys.stderr
        self._live, self._timed = self._stream.isatty(), timed
        self._every = 0.1 if self._live else plain_every_seconds
        self._marks: collections.deque[tuple[float, int]] = collections.deque(maxlen=window)
        self._printed_at, self._printed_done = 0.0, -1
        self._width = 0
        self.resume()

    def resume(self) -> None:
        """The rate counts from now: call this after work that is not counted."""
        self._marks.clear()
        self._marks.append((time.monotonic(), self.done))

    @property
    def rate(self) -> float:
        """Units per second over the window; 0 if that is shorter than 0.01 s."""
        (start, first), (end, last) = self._marks[0], self._marks[-1]
        return (last - first) / (end - start) if end - start > 0.01 else 0.0

    @property
    def seconds_left(self) -> float | None:
        """Seconds until ``total`` at the present rate; None if unknown."""
        if self.total is None or self.rate <= 0:
            return None
        return (self.total - self.done) / self.rate

    def update(self, n: int = 1, note: str = "", force: bool = False) -> None:
        """Counts ``n`` more units, and prints if the last line is old enough, or with ``force``."""
        self.done += n
        now = time.monotonic()
        self._marks.append((now, self.done))
        if force or now - self._printed_at >= self._every:
            self._printed_at = now
            self._print(note)

    def close(self, note: str = "") -> None:
        """Prints the last state, unless it was printed, and ends the line."""
        if self._live or self.done != self._printed_done:
            self._print(note)
        if self._live:
            self._stream.write("\n")
            self._stream.flush()

    def _speed(self) -> str:
        if self.rate < 1:
            return f"{1 / self.rate:,.1f} s/{self.unit.removesuffix('s')}"
        return f"{self.rate:,.1f}/s" if self.rate < 100 else f"{self.rate:,.0f}/s"

    def _print(self, note: str) -> None:
        if self.total:
            share = f" ({100 * self.done / self.total:.0f}%)"
            parts = [f"{self.label} {self.done:,}/{self.total:,} {self.unit}{share}"]
        else:
            parts = [f"{self.label} {self.done:,} {self.unit}"]
        if self.rate:
            parts.append(self._speed())
        left = self.seconds_left
        if left is not None and left > 0:
            parts.append(f"{format_seconds(left)} left")
        if note:
            parts.append(note)
        line = " | ".join(parts)
        self._printed_done = self.done
        if self._live:
            self._stream.write("\r" + line.ljust(self._width))
            self._width = len(line)
        else:
            stamp = time.strftime(TIME) if self._timed else ""
            self._stream.write(f"{stamp}{line}\n")
        self._stream.flush()
