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
import hashlib
import json
import logging
import os
import pathlib
import platform
import re
import sys
from collections.abc import Iterator

import jax
from ml_collections import ConfigDict

from webssl_jax.config import UserError
from webssl_jax.files import try_writing, write_json

log = logging.getLogger(__name__)


def use_compilation_cache(folder: str) -> None:
    """Stores what is compiled from now on for later starts.

    folder: "" for a folder of the user's (``~/.cache/webssl_jax``, or below XDG_CACHE_HOME), unless
      JAX_COMPILATION_CACHE_DIR names another; "none" for nowhere; or a path.

    Raises:
      UserError: if ``folder`` is the address of a bucket.
    """
    if "://" in folder:
        raise UserError(
            f"config.host.compilation_cache = {folder}: must be a folder; mount the bucket "
            "(gcsfuse) and give that path"
        )
    if folder == "none":
        jax.config.update("jax_compilation_cache_dir", None)
    elif folder:
        path = pathlib.Path(folder).expanduser().resolve()
        jax.config.update("jax_compilation_cache_dir", str(path))
    elif not _current() and (own := _users_folder()):
        jax.config.update("jax_compilation_cache_dir", str(own))


def _current() -> str | None:
    """Where jax keeps what it compiles."""
    return jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]  # made at run time


def _users_folder() -> pathlib.Path | None:
    """Where the user's compiled programs lie, by the CPU: a home may be shared by machines, and a
    program for one CPU need not run on another. None where nothing can be written there."""
    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    try:
        cpu = pathlib.Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
        features = "".join(re.findall(r"^(?:flags|Features)\s*:.*$", cpu, re.M))
    except OSError:  # no Linux
        features = platform.processor()
    name = f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:8]}"
    folder = pathlib.Path(home) / "webssl_jax" / "compiled" / name
    try:
        try_writing(folder)
    except OSError as error:
        log.warning("compiled programs are not kept: %s (%s)", folder, error.strerror)
        return None
    return folder


class CompileTimes:
    """How long compiling took last time, by what is compiled: a file beside the compiled programs,
    so that a start can say what to wait for. Without a folder for these nothing is known."""

    def __init__(self) -> None:
        folder = _current()
        self._file = pathlib.Path(folder) / "seconds.json" if folder else None

    def last(self, what: str) -> float | None:
        """Seconds, or None if ``what`` was not compiled here before."""
        return self._read().get(what)

    def store(self, what: str, seconds: float) -> None:
        """Of one process at a time: the last that writes wins. A file that cannot be written costs
        a later start one line, so it ends nothing."""
        if self._file:
            with contextlib.suppress(OSError):
                write_json(self._file, self._read() | {what: round(seconds, 1)})

    def _read(self) -> dict[str, float]:
        try:
            return json.loads(self._file.read_text()) if self._file else {}
        except (OSError, ValueError):  # not there yet, or damaged
            return {}


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
