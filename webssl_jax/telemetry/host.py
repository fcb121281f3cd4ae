"""Settings of each process of a run (``config.host``): garbage collection, time limits, and the
cache of compiled programs.

Python's garbage collector pauses a process at any moment. Among a hundred processes one is then
nearly always paused, and all wait for it. So it is switched off in the loop, and all processes run
it after the same steps.

A step or a pause between steps that takes too long ends the process. Another process may be dead,
or alive and hanging, which no heartbeat shows. Every process then prints the stacks of all its
threads: the process whose stacks differ is the cause.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import logging
import pathlib
import sys
from collections.abc import Iterator

import jax
from ml_collections import ConfigDict

from webssl_jax.config import UserError

log = logging.getLogger(__name__)


def use_compilation_cache(folder: str) -> None:
    """Stores what is compiled from now on in ``folder``, for later starts. Empty: as jax is set.

    Raises:
      UserError: if ``folder`` is the address of a bucket.
    """
    if "://" in folder:
        raise UserError(
            f"config.host.compilation_cache = {folder}: must be a folder; mount the bucket "
            "(gcsfuse) and give that path"
        )
    if folder:
        path = pathlib.Path(folder).expanduser().resolve()
        jax.config.update("jax_compilation_cache_dir", str(path))


class Watchdog:
    """Time limits, from now until :meth:`stop`, and garbage collection in the loop.

    Args:
      host: ``config.host``: ``gc_every_steps`` (0: Python decides), the time limits
        ``stuck_minutes`` of a step and ``stuck_pause_minutes`` of a pause and of all before the
        loop (0: no limit).
    """

    def __init__(self, host: ConfigDict):
        self._gc_every = host.gc_every_steps
        self._step_seconds = 60 * host.stuck_minutes
        self._pause_seconds = 60 * host.stuck_pause_minutes
        self._set_limit(self._pause_seconds)

    def start(self) -> None:
        """The loop starts: the limit is that of a step."""
        if self._gc_every:
            gc.collect()
            gc.disable()
        self._set_limit(self._step_seconds)

    def step_started(self, step: int) -> None:
        """``step`` was started, so the one before it is done: the limit counts from now."""
        if self._gc_every and step % self._gc_every == 0:
            gc.collect()
        self._set_limit(self._step_seconds)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Within it the limit is that of a pause, such as a save or an evaluation."""
        self._set_limit(self._pause_seconds)
        try:
            yield
        finally:
            self._set_limit(self._step_seconds)

    def stop(self) -> None:
        """No limit any more."""
        faulthandler.cancel_dump_traceback_later()
        gc.enable()

    def _set_limit(self, seconds: float) -> None:
        """Replaces the limit before."""
        # Python's own watchdog, in C: it works while other code holds the interpreter. It prints
        # "Timeout" and the stacks of all threads, and ends the process with 1.
        if seconds:
            stderr = sys.__stderr__ or sys.stderr
            faulthandler.dump_traceback_later(seconds, exit=True, file=stderr)
        else:
            faulthandler.cancel_dump_traceback_later()
