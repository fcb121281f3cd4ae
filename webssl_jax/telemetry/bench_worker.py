"""Workers of a benchmark: processes that run in turns, and the statistics of their figures."""

from __future__ import annotations

import multiprocessing
import signal
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from webssl_jax.config import UserError


class BenchWorker:
    """A process that works only on request.

    Args:
      serve: ``serve(pipe, *arguments)`` runs in the process. It sends one object when it is ready,
        and one for every number that it receives, until that is 0.
    """

    def __init__(self, serve: Callable[..., None], *arguments: Any):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_run, args=(serve, theirs, arguments))
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        pid = self._process.pid
        assert pid is not None  # it was started
        return pid

    def receive(self) -> Any:
        """The next object that it sends.

        Raises:
          UserError: what ``serve`` raised of that kind.
          RuntimeError: if the process died otherwise.
        """
        try:
            answer = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError("a worker of the benchmark died; see above") from None
        if isinstance(answer, UserError):
            self._process.join()
            raise answer
        return answer

    def ask(self, number: int) -> Any:
        """Sends ``number``, above 0, and returns the answer; raises as :meth:`receive`."""
        self._pipe.send(number)
        return self.receive()

    def stop(self) -> None:
        """Ends the process. Idempotent."""
        if self._process.is_alive():
            self._pipe.send(0)
        self._process.join()


def _run(serve: Callable[..., None], pipe: Any, arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process handles Ctrl-C
    try:
        serve(pipe, *arguments)
    except UserError as error:
        pipe.send(error)


def median_range(values: Sequence[float]) -> dict[str, float]:
    """Median, lowest and highest, to four digits."""
    found = {"median": statistics.median(values), "low": min(values), "high": max(values)}
    return {key: float(f"{value:.4g}") for key, value in found.items()}


def format_range(values: dict[str, float]) -> str:
    """A :func:`median_range` as text: ``MEDIAN (LOW to HIGH)``."""
    return f"{values['median']:g} ({values['low']:g} to {values['high']:g})"
