"""What a process owes the others of its run: pauses at the same step, no waiting for ever, and no
compiling of what was compiled before.

``config.host``: Python's garbage collector pauses a process when it likes; with a hundred of them
somebody always pauses and all wait. So it is off in the loop and is run by all at the same step.
And a step that takes too long is ended: a peer may be dead, or alive and stuck, which no heartbeat
shows. Every process then prints the stacks of all its threads; the one that differs is the culprit.
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


class HostManners:
    """Garbage collection and the time limit of a step, while the loop runs.

    Args:
      host: ``config.host``: ``gc_every_steps`` (0: Python decides) and ``stuck_minutes`` (0: no
        limit).
    """

    def __init__(self, host: ConfigDict):
        self._gc_every, self._limit = host.gc_every_steps, 60 * host.stuck_minutes
        self._began = False

    def begin(self) -> None:
        """The loop begins."""
        self._began = True
        if self._gc_every:
            gc.collect()
            gc.disable()
        self._rearm()

    def after(self, step: int) -> None:
        """``step`` was started: the one before it is done."""
        if self._gc_every and step % self._gc_every == 0:
            gc.collect()
        self._rearm()

    @contextlib.contextmanager
    def unhurried(self) -> Iterator[None]:
        """Within it there is no limit: an evaluation takes what it takes."""
        faulthandler.cancel_dump_traceback_later()
        try:
            yield
        finally:
            self._rearm()

    def end(self) -> None:
        """The loop is over, however."""
        self._began = False
        faulthandler.cancel_dump_traceback_later()
        gc.enable()

    def _rearm(self) -> None:
        # Python's own watchdog, in C: it works while other code holds the interpreter. It prints
        # "Timeout", the stacks of all threads, and ends the process with 1.
        if self._began and self._limit:
            faulthandler.dump_traceback_later(self._limit, exit=True, file=sys.__stderr__)
