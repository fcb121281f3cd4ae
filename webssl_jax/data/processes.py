"""Manners of worker processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from concurrent import futures


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
