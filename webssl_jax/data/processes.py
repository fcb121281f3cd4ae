"""Manners of worker processes, and work in order by many of them."""

from __future__ import annotations

import collections
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

from webssl_jax.config import UserError


def start_worker() -> None:
    """Runs first in a worker process. Ctrl-C, which the whole group receives, is the parent's to
    answer. And the worker ends when its parent ends, however that ends: a killed parent cannot stop
    its workers, and they would wait for it for ever, or go on writing beside its successor."""
    parent = multiprocessing.parent_process()
    if parent is None:
        raise RuntimeError("start_worker() is for processes that multiprocessing has started")
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()


def end_workers(pool: futures.ProcessPoolExecutor) -> None:
    """Ends a pool at once, whatever its workers are doing."""
    for worker in list((pool._processes or {}).values()):
        worker.terminate()
    # Waits for the pool's thread too: else Python, at its exit, may wake it through a closed pipe.
    pool.shutdown(wait=True, cancel_futures=True)


def in_order(
    work: Callable[[Any], Any], tasks: Iterator[Any], workers: int
) -> Iterator[tuple[Any, Any]]:
    """(task, work(task)) in the order of the tasks, with a few in work, by so many processes; 1:
    in this one. ``work`` must pickle; it is sent once.

    Raises: UserError if a process dies.
    """
    if workers == 1:
        yield from ((task, work(task)) for task in tasks)
        return
    # Spawned, not forked: the record reader has threads.
    pool = futures.ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_start_to, initargs=(work,)
    )
    waiting: collections.deque[tuple[Any, futures.Future]] = collections.deque()
    try:
        for task in tasks:
            waiting.append((task, pool.submit(_do, task)))
            if len(waiting) == 4 * workers:
                task, future = waiting.popleft()
                yield task, future.result()
        while waiting:
            task, future = waiting.popleft()
            yield task, future.result()
    except futures.process.BrokenProcessPool:
        raise UserError(
            "a worker process died, perhaps for lack of memory; start the same command again with "
            "fewer --workers"
        ) from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


_WORK: Callable[[Any], Any] | None = None  # a worker's, sent once and not with every task


def _start_to(work: Callable[[Any], Any]) -> None:
    global _WORK
    _WORK = work
    start_worker()


def _do(task: Any) -> Any:
    assert _WORK is not None  # _start_to has set it
    return _WORK(task)
