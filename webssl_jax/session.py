"""What surrounds a training loop, set up and torn down in one place: the processes, the lock of the
workdir, time limits, requests to stop, and the record of where the time went."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import jax
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from webssl_jax import cli, runs
from webssl_jax.config import UserError
from webssl_jax.sharding import distributed
from webssl_jax.telemetry.goodput import Goodput
from webssl_jax.telemetry.host import Watchdog, use_compilation_cache


class Session:
    """Joins the processes of a run and starts the time limits. Everything ends with the context:

        with Session(args, config.host) as session:
            session.open(workdir, began)
            ...
            session.start_loop()

    Args:
      args: has the flags of ``distributed.add_flags``.
      host: ``config.host``.

    Raises:
      UserError: if the processes do not find each other.
    """

    goodput: Goodput  # from ``open`` on

    def __init__(self, args: argparse.Namespace, host: ConfigDict):
        distributed.initialize(args)
        self.watchdog = Watchdog(host)
        # Each host reports its own damaged records. All else is logged by the first process alone.
        cli.log_to_stderr(logging.INFO if jax.process_index() == 0 else logging.WARNING)
        use_compilation_cache(host.compilation_cache)
        self._lock: runs.WorkdirLock | None = None

    def open(self, workdir: Path, began: float) -> None:
        """Makes and locks the workdir. From now on a signal asks the run to stop.

        Args:
          began: when the program started, of ``time.time()``.

        Raises:
          UserError: if it cannot be made, another run uses it, or not all processes see it.
        """
        with distributed.error_barrier():
            try:
                workdir.mkdir(parents=True, exist_ok=True)
                if jax.process_index() == 0:
                    self._lock = runs.WorkdirLock(workdir)
            except OSError as error:
                reason = error.strerror
                raise UserError(f"--workdir {workdir}: cannot be made ({reason})") from error
        distributed.check_shared(workdir)
        self._stop_request = _StopRequest()
        self.goodput = Goodput(workdir, began, enabled=jax.process_index() == 0)

    def start_loop(self) -> None:
        """From now on time counts as steps, and each step has a time limit."""
        self.goodput.enter("step")
        self.watchdog.start()

    @contextlib.contextmanager
    def pause(self, kind: str) -> Iterator[None]:
        """Within it the loop does not train: time is of ``kind`` (``goodput.KINDS``), and has the
        limit of a pause."""
        with self.goodput.of(kind), self.watchdog.pause():
            yield

    def stop_requested(self, step: int) -> str:
        """The name of the signal after which all processes must stop after ``step``; else empty."""
        return self._stop_request.received(step)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, *unused: object) -> None:
        self.watchdog.stop()
        # After an error the process ends, and the kernel drops the lock then: until then threads
        # may still write to the workdir.
        if self._lock and kind is None:
            self._lock.release()


class _StopRequest:
    """Turns SIGTERM and Ctrl-C into a save at the end of the step. A second Ctrl-C ends at once.

    With several processes the signal may reach only some of them. There jax's preemption service
    listens for SIGTERM and agrees on the step, and Ctrl-C is passed on to it as SIGTERM.
    """

    def __init__(self) -> None:
        self._name = ""
        if jax.process_count() == 1:
            signal.signal(signal.SIGTERM, self._handle)
        signal.signal(signal.SIGINT, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._name and number == signal.SIGINT:
            signal.default_int_handler(number, frame)
        self._name = signal.Signals(number).name
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def received(self, step: int) -> str:
        """As :meth:`Session.stop_requested`."""
        if jax.process_count() > 1:
            return "SIGTERM" if multihost_utils.reached_preemption_sync_point(step) else ""
        return self._name
