"""Manners of worker processes."""

from __future__ import annotations

import multiprocessing
import os
import threading


def end_with_parent() -> None:
    """Ends this worker process when its parent ends, however that ends: a killed parent cannot stop
    its workers, and they would wait for it for ever."""

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()
