"""A profile of a few steps, as the config asks for it, or at any time by a file in the workdir.

    --config.profile.start_step=100 --config.profile.steps=3     steps 101 to 103, on every host
    echo 5 > RUN/PROFILE                                         the next 5 steps, on the first host

Traces go to ``workdir/profile``. A profile that fails costs one line in the log, never the run.
"""

from __future__ import annotations

import logging
import pathlib

import jax
from ml_collections import ConfigDict

_LONGEST_REQUEST = 1000  # characters that are read; int() raises beyond 4,300 digits
log = logging.getLogger(__name__)


class Profiler:
    """Starts and stops traces between steps. As a context manager it ends one that is under way.

    Args:
      workdir: gets ``profile/``; the file ``PROFILE`` in it, empty or with a number of steps, asks
        for a profile and is removed.
      profile: ``config.profile``: ``start_step`` (0: none) and ``steps``.
    """

    def __init__(self, workdir: pathlib.Path, profile: ConfigDict):
        self._folder, self._request = workdir / "profile", workdir / "PROFILE"
        self._start, self._steps = profile.start_step, profile.steps
        self._is_first = jax.process_index() == 0
        self._stop_at: int | None = None

    def step_started(self, step: int, metrics: dict[str, jax.Array] | None, look: bool) -> None:
        """``step`` was started.

        Args:
          metrics: its results, which may still be computed.
          look: whether to look for the file ``PROFILE``, which is one call to the file system.
        """
        if self._stop_at is not None:
            if step >= self._stop_at:
                self.stop(metrics)
        elif self._start and step == self._start:
            self._begin(step, self._steps, metrics)
        elif look and self._is_first and (steps := self._requested()):
            self._begin(step, steps, metrics)

    def stop(self, metrics: dict[str, jax.Array] | None = None) -> None:
        """Ends a trace that is under way, once ``metrics`` are computed."""
        if self._stop_at is None:
            return
        self._stop_at = None
        try:
            jax.block_until_ready(metrics)
            jax.profiler.stop_trace()
        except Exception as error:  # of any type: a profile must not end the run
            log.warning("the profile failed: %s", _line(error))
            return
        log.info(
            "profile in %s; open it with: xprof --logdir %s (pip install xprof), or the newest "
            "trace.json.gz in it at ui.perfetto.dev",
            self._folder,
            self._folder,
        )

    def __enter__(self) -> Profiler:
        return self

    def __exit__(self, *unused: object) -> None:
        self.stop()

    def _begin(self, step: int, steps: int, metrics: dict[str, jax.Array] | None) -> None:
        try:
            jax.block_until_ready(metrics)  # so that the trace begins with a step
            jax.profiler.start_trace(self._folder)
        except Exception as error:
            log.warning("no profile: %s", _line(error))
            return
        self._stop_at = step + steps
        log.info("profiling steps %d to %d", step + 1, step + steps)

    def _requested(self) -> int:
        """The number of steps the file asks for; 0 when there is no file."""
        try:
            with open(self._request) as file:
                text = file.read(_LONGEST_REQUEST).strip()
            self._request.unlink()
        except FileNotFoundError:
            return 0
        except (OSError, UnicodeDecodeError) as error:
            log.warning("no profile: %s: %s", self._request, _line(error))
            return 0
        if text and not (text.isdecimal() and len(text) < 10 and int(text) > 0):
            log.warning("no profile: %s holds %r, not a number of steps", self._request, text[:40])
            return 0
        return int(text) if text else self._steps


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
