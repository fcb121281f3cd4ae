"""How a pass over shards is done: a task a shard, by processes of this machine. A task is done when
its file is there, whole; so a pass that was killed goes on with what is left."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Protocol

from webssl_jax.config import UserError
from webssl_jax.data.converter import runners

# Called with the records done since the last call; first with (those done before, all there are).
Progress = Callable[..., None]


class Task(Protocol):
    """path: the file that it makes. records: its size, for the progress."""

    @property
    def path(self) -> Path: ...

    @property
    def records(self) -> int: ...


def silent(records: int, total: int | None = None) -> None:
    """For callers that show no progress."""


def work(
    workers: int, function: Callable[..., None], tasks: Sequence[Any], progress: Progress
) -> None:
    """Does the tasks whose files are not there.

    Args:
      function: called with a :class:`Task` and a progress function, in another process.

    Raises:
      UserError: what it raised, or that a worker died.
    """
    left = [task for task in tasks if not task.path.exists()]
    records = sum(task.records for task in tasks)
    progress(records - sum(task.records for task in left), records)
    if not left:
        return
    try:
        with runners.pool(min(workers, len(left))) as do:
            do(function, left, progress)
    except BrokenProcessPool:
        raise UserError(
            "a worker process died, perhaps for lack of memory; what is done stays: start the same "
            "command again with fewer --workers"
        ) from None


def absolute(pattern: Sequence[str]) -> list[str]:
    """The same from whatever folder the command is given."""
    return [
        one if "://" in one or one.startswith("corpus:") else os.path.abspath(one)
        for one in pattern
    ]
