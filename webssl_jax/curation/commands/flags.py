"""Flags and words that the commands share."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

from webssl_jax import cli
from webssl_jax.data.converter import buckets, remote, runners
from webssl_jax.data.converter import flags as converter
from webssl_jax.data.converter.flags import (
    add_runner,
    amount,
    name,
    natural,
    numbers,
    positive,
    share,
)
from webssl_jax.telemetry.progress import Progress

__all__ = ["add_runner", "amount", "name", "natural", "numbers", "positive", "share"]  # also here
_FOLDERS = ("output", "index", "scores", "features", "targets")


@dataclasses.dataclass(frozen=True)
class Command:
    """help: what it does. add_flags: all but --output. run: from the arguments to an exit code.
    resumable: the same command goes on after a kill. output: type of --output, a folder unless it
    says otherwise; None: there is none."""

    help: str
    add_flags: Callable[[cli.ArgumentParser], None]
    run: Callable[[Any], int]
    resumable: bool = True
    output: Callable[[str], Any] | None = buckets.place


def add_input(parser: cli.ArgumentParser) -> None:
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="PATTERN",
        help="shards: globs, files, folders, or corpus:train",
    )


@contextlib.contextmanager
def folders(args: Any) -> Iterator[None]:
    """Folders of the arguments that are in a bucket, as folders here. ``args.address`` is the
    output as it was given, ``args.named`` the scores."""
    args.address, args.others = getattr(args, "output", None), []
    args.named = (
        list(map(str, many)) if isinstance(many := getattr(args, "scores", 0), list) else []
    )
    with contextlib.ExitStack() as stack:
        for name in _FOLDERS:
            given = getattr(args, name, None)
            if given is None:
                continue
            several = given if isinstance(given, list) else [given]
            here, mirrors = zip(*(stack.enter_context(remote.opened(one)) for one in several))
            setattr(args, name, list(here) if isinstance(given, list) else here[0])
            if name == "output":
                args.mirror = mirrors[0]
            else:
                args.others += [mirror for mirror in mirrors if mirror is not None]
        yield


def runner_of(args: Any, workers: int | None = None) -> runners.Runner:
    """workers: unless the user says."""
    count = args.workers or workers or os.cpu_count() or 1
    runner = converter.runner_of(args, count)
    if args.runner == "pool" and count == 1:
        runner = runners.here
    return args.mirror.runner(runner, args.others) if args.mirror else runner


class ProgressLine:
    """A progress line from what passes call: first (done, total), then records more."""

    def __init__(self, label: str, unit: str = "records"):
        self._label, self._unit = label, unit
        self._line: Progress | None = None

    def __call__(self, records: int, total: int | None = None) -> None:
        if total is not None:
            self.close()  # of the pass before
            self._line = Progress(total, self._label, self._unit, done=records)
        elif self._line is not None:
            self._line.update(records)

    def close(self) -> None:
        if self._line is not None:
            self._line.close()


def tell_damaged(damaged: dict, where: str) -> None:
    if count := damaged["count"]:
        records = "1 damaged record" if count == 1 else f"{count:,} damaged records"
        named = damaged["records"][0] + (", ..." if count > 1 else "")
        print(f'{records} left out ({named}); see "damaged" in {where}', file=sys.stderr)


def tell_selection(args: Any) -> int:
    print(f"  {args.address}/selection.parquet  for config.mixture.NAME.selection")
    print(f"  {args.address}/index.html  the report")
    return 0
