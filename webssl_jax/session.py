"""What surrounds a training loop, set up and torn down in one place: the processes, the lock of the
workdir, time limits, requests to stop, and the record of where the time went."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import jax
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from webssl_jax import cli, cpu_memory, workdirs
from webssl_jax.files import write_bytes
from webssl_jax.sharding import distributed
from webssl_jax.telemetry.goodput import Goodput
from webssl_jax.telemetry.host import Watchdog, use_compilation_cache

_LOOK_SECONDS = 1.0  # between two looks for trouble: each costs a request where a bucket is mounted


class Session:
    """Joins the processes of a run and starts the time limits. Everything ends with the context:

        with Session(args, config.host) as session:
            session.open(workdir, began)
            ...
            session.start_loop()

    Args:
      args: has the flags of ``rendezvous.add_flags``.
      host: ``config.host``.

    Raises:
      UserError: if the processes do not find each other.
    """

    goodput: Goodput  # from ``open`` on
    _workdir: Path

    def __init__(self, args: argparse.Namespace, host: ConfigDict):
        cpu_memory.keep()
        distributed.initialize(args)
        self.watchdog = Watchdog(host)
        # Each host reports its own damaged records. All else is logged by the first process alone.
        level = logging.INFO if jax.process_index() == 0 else logging.WARNING
        cli.log_to_stderr(level, timed=True)
        use_compilation_cache(host.compilation_cache)
        self._lock: workdirs.WorkdirLock | None = None

    def open(self, workdir: Path, config: ConfigDict, began: float) -> None:
        """Makes and locks the workdir. From now on a signal asks the run to stop.

        Args:
          began: when the program started, of ``time.time()``.

        Raises:
          UserError, TransientError: if a folder that the run needs cannot be made or written.
          UserError: if another run uses the workdir, or not all processes see it.
        """
        with distributed.error_barrier():
            workdirs.check_places(workdir)
            workdirs.check_writable(workdir, config)
            if jax.process_index() == 0:
                self._lock = workdirs.WorkdirLock(workdir)
        distributed.check_shared(workdir)
        self._workdir = workdir
        self._stop_request = _StopRequest(self._trouble)
        self.goodput = Goodput(workdir, began, enabled=jax.process_index() == 0)

    def start_loop(self) -> None:
        """From now on time counts as steps, and each step has a time limit."""
        if self._lock:
            self._identity = {
                path: path.read_bytes()
                for path in workdirs.identity(self._workdir)
                if path.exists()
            }
        self.goodput.enter("step")
        self.watchdog.start()

    @contextlib.contextmanager
    def pause(self, kind: str) -> Iterator[None]:
        """Within it the loop does not train: time is of ``kind`` (``goodput.KINDS``), and has the
        limit of a pause."""
        with self.goodput.of(kind), self.watchdog.pause():
            yield

    def stop_requested(self, step: int) -> str:
        """Why all processes must stop after ``step``, in words for the log, such as "SIGTERM"; else
        empty."""
        return self._stop_request.received(step)

    def _trouble(self) -> str:
        """Why a run that nobody stopped should save and end; else empty."""
        if reason := cli.log_failure():
            return f"the loss of its log ({reason})"
        if self._lock and self._lock.is_gone():
            # Made again, the folder can take a checkpoint. If another run has it by now, or a disk
            # is no more mounted there, this raises, and nothing is written in the wrong place.
            removed = not (self._workdir / "config.json").exists()
            self._lock = self._lock.again()
            if not removed:  # but for the lock
                return ""
            for path, content in self._identity.items():
                write_bytes(path, content)
            return f"the removal of {self._workdir} (figures and pictures of before are lost)"
        return ""

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, *unused: object) -> None:
        self.watchdog.stop()
        # After an error the process ends, and the kernel drops the lock then: until then threads
        # may still write to the workdir.
        if self._lock and kind is None:
            self._lock.release()


class _StopRequest:
    """Turns SIGTERM, SIGHUP (its terminal is closed) and Ctrl-C into a save at the end of the step,
    and so what ``trouble`` tells. A second Ctrl-C ends at once.

    With several processes a request may reach only some of them. There jax's preemption service
    listens for SIGTERM and agrees on the step, and all else is passed on to it as SIGTERM.
    """

    def __init__(self, trouble: Callable[[], str]) -> None:
        self._name, self._trouble, self._looked = "", trouble, 0.0
        if jax.process_count() == 1:
            signal.signal(signal.SIGTERM, self._handle)
        signal.signal(signal.SIGINT, self._handle)
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup sets it
            signal.signal(signal.SIGHUP, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._name and number == signal.SIGINT:
            signal.default_int_handler(number, frame)
        self._name = signal.Signals(number).name
        if jax.process_count() > 1:
            self._name = "SIGTERM"
            os.kill(os.getpid(), signal.SIGTERM)

    def received(self, step: int) -> str:
        """As :meth:`Session.stop_requested`."""
        several = jax.process_count() > 1
        if not self._name and time.monotonic() - self._looked > _LOOK_SECONDS:
            self._looked = time.monotonic()
            if trouble := self._trouble():
                self._name = trouble
                if several:
                    os.kill(os.getpid(), signal.SIGTERM)
        if several:
            stops = multihost_utils.reached_preemption_sync_point(step)
            return (self._name or "SIGTERM") if stops else ""
        return self._name
