"""What a process owes the others of its run: pauses at the same step, no waiting for ever, and no
compiling of what was compiled before.

``config.host``: Python's garbage collector pauses a process when it likes; with a hundred of them
somebody always pauses and all wait. So it is off in the loop and is run by all at the same step.
And what takes too long is ended, a step or a pause between steps: a peer may be dead, or alive and
stuck, which no heartbeat shows. Every process then prints the stacks of all its threads; the one
that differs is the culprit.
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
    """Keeps what is compiled from now on for later starts. "" leaves it to jax's own settings.

    Raises:
      UserError: for an address of a bucket.
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
    """Garbage collection while the loop runs, and time limits from now to :meth:`end`.

    Args:
      host: ``config.host``: ``gc_every_steps`` (0: Python decides), ``stuck_minutes`` of a step and
        ``stuck_pause_minutes`` of a pause (0: no limit).
    """

    def __init__(self, host: ConfigDict):
        self._gc_every, self._of_step = host.gc_every_steps, 60 * host.stuck_minutes
        self._of_pause = 60 * host.stuck_pause_minutes
        self._limit(self._of_pause)

    def begin(self) -> None:
        """The loop begins."""
        if self._gc_every:
            gc.collect()
            gc.disable()
        self._limit(self._of_step)

    def after(self, step: int) -> None:
        """``step`` was started: the one before it is done."""
        if self._gc_every and step % self._gc_every == 0:
            gc.collect()
        self._limit(self._of_step)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Within it the limit is that of a pause: a save, an evaluation."""
        self._limit(self._of_pause)
        try:
            yield
        finally:
            self._limit(self._of_step)

    def end(self) -> None:
        """The loop is over, however."""
        faulthandler.cancel_dump_traceback_later()
        gc.enable()

    def _limit(self, seconds: float) -> None:
        # Python's own watchdog, in C: it works while other code holds the interpreter. It prints
        # "Timeout", the stacks of all threads, and ends the process with 1.
        if seconds:  # takes the place of the limit before
            faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__)
        else:
            faulthandler.cancel_dump_traceback_later()
