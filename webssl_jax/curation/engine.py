"""How a pass over shards is done: a task a shard, by a runner of the converter (this process,
processes of this machine, Apache Beam). A task is done when its file is there, whole; so a pass
that was killed goes on with what is left."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Protocol

from webssl_jax.config import UserError
from webssl_jax.data.converter.runners import Runner

# Called with the records done since the last call; first with (those done before, all there are).
Progress = Callable[..., None]


class Task(Protocol):
    """Pickles, and is all that the work needs to know. output: the folder of the pass. path: the
    file that it makes. size: its records, for the progress. needs: (field, names in the folder that
    the field names) of what it reads, where these are in a bucket."""

    @property
    def output(self) -> str: ...

    @property
    def path(self) -> Path: ...

    @property
    def size(self) -> int: ...

    @property
    def needs(self) -> Sequence[tuple[str, str]]: ...


def silent(records: int, total: int | None = None) -> None:
    """For callers that show no progress."""


def work(
    runner: Runner, function: Callable[..., None], tasks: Sequence[Any], progress: Progress
) -> None:
    """Does the tasks whose files are not there.

    Args:
      function: called with a :class:`Task` and a progress function, anywhere.

    Raises:
      UserError: what it raised, or that a worker died.
    """
    left = [task for task in tasks if not task.path.exists()]
    total = sum(task.size for task in tasks)
    progress(total - sum(task.size for task in left), total)
    if not left:
        return
    try:
        with runner() as do:
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
