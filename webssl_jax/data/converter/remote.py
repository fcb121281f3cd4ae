"""Passes over ``gs://``: they read and write files, so they get a folder of files.

Who plans a pass works in a mirror of its folder, in which large files are empty: their names say
what is done. A task works, wherever its runner puts it, in a folder of its own, to which what it
needs is copied, and from which what it has made is copied back, what it is named after last. So
both run the functions of local passes, and what is in the bucket is what local passes write.

Nothing locks a folder of a bucket: two commands at once do the same work twice, and write the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from webssl_jax.config import TransientError, UserError
from webssl_jax.data.converter.buckets import storage, told
from webssl_jax.data.converter.plan import PLAN_FOLDER
from webssl_jax.data.converter.runners import Do, Runner

_LARGE = (".arrayrecord", ".staged")


class Mirror:
    """A folder here that is kept like one of a bucket."""

    def __init__(self, address: str, folder: Path):
        self.address, self.folder = address, folder
        self._known: dict[str, tuple[int, int]] = {}  # what was alike: {name: size and time here}

    def pull(self, patterns: Sequence[str] = (), large: bool = False) -> None:
        """Takes what is new in the bucket, and removes what is gone from it.

        Args:
          patterns: of names; all by default. large: the content of large files, too.
        """
        system, root = storage(self.address)
        with told(self.address):
            if patterns:
                listed = {
                    n: f
                    for p in patterns
                    for n, f in system.glob(f"{root}/{p}", detail=True).items()
                }
            else:
                listed = system.find(root, detail=True)
            names = [n.removeprefix(root + "/") for n, f in listed.items() if f["type"] == "file"]
            for name in set(self._known) - set(names):
                (self.folder / name).unlink(missing_ok=True)
                del self._known[name]
            for name in set(names) - set(self._known):
                path = self.folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                if name.endswith(_LARGE) and not large:
                    path.touch()
                else:
                    system.get_file(f"{root}/{name}", str(path))
                self._known[name] = _mark(path)

    def push(self, last: Path | None = None) -> None:
        """Gives what is new here, the oldest first, large files and ``last``, which say that the
        others are there, at the end; removes what is gone from here."""
        system, root = storage(self.address)
        files = [path for path in self.folder.rglob("*") if path.is_file()]
        files = [p for p in files if p.suffix != ".tmp" and p.name != "lock"]
        files.sort(key=lambda p: (p == last or p.name.endswith(_LARGE), p.stat().st_mtime_ns))
        marks = {str(path.relative_to(self.folder)): _mark(path) for path in files}
        with told(self.address):
            for name, mark in marks.items():
                if self._known.get(name) != mark:
                    system.put_file(str(self.folder / name), f"{root}/{name}")
            for name in set(self._known) - set(marks):
                system.rm_file(f"{root}/{name}")
        self._known = marks

    def runner(self, inner: Runner, others: Sequence[Mirror] = ()) -> Runner:
        """``inner``, whose tasks work on the bucket. others: folders that tasks read, besides."""
        addresses = {str(mirror.folder): mirror.address for mirror in (self, *others)}

        @contextlib.contextmanager
        def away() -> Iterator[Do]:
            with inner() as do:

                def do_there(function: Any, tasks: Sequence[Any], progress: Any) -> None:
                    self.push()
                    try:
                        do(OnCopy(function, addresses), tasks, progress)
                    finally:
                        self.pull()

                yield do_there

        return away


def _mark(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


@dataclasses.dataclass(frozen=True)
class OnCopy:
    """A pass whose tasks name mirrors: each is done in copies of what it needs (``task.needs``: a
    field that names a folder, a pattern of names in it). addresses: of the mirrors, by folder."""

    function: Callable[..., None]
    addresses: Mapping[str, str]

    @property
    def __name__(self) -> str:
        return self.function.__name__

    def __call__(self, task: Any, progress: Callable[[int], None]) -> None:
        with tempfile.TemporaryDirectory(prefix="webssl-") as aside:
            copies = {}
            for field in dataclasses.fields(task):
                address = self.addresses.get(str(getattr(task, field.name)))
                if address is not None:
                    copies[field.name] = Mirror(address, Path(aside, field.name))
                    Path(aside, field.name, PLAN_FOLDER).mkdir(parents=True)
            for name, copy in copies.items():
                patterns = [pattern for field, pattern in task.needs if field == name]
                if patterns:
                    copy.pull(patterns, large=True)
            moved = dataclasses.replace(task, **{n: str(c.folder) for n, c in copies.items()})
            self.function(moved, progress)
            copies["output"].push(moved.path)


@contextlib.contextmanager
def opened(where: Path | str) -> Iterator[tuple[Path, Mirror | None]]:
    """A folder to work in; with a mirror if it is an address. What is done there without an error
    is given to the bucket at the end.

    Raises:
      UserError: if the bucket cannot be used; what is raised within, by the name of the address.
    """
    if isinstance(where, Path):
        yield where, None
        return
    with tempfile.TemporaryDirectory(prefix="webssl-") as aside:
        mirror = Mirror(where, Path(aside, where.rstrip("/").rpartition("/")[2]))
        mirror.folder.mkdir()
        mirror.pull()
        try:
            yield mirror.folder, mirror
        except UserError as error:
            if not isinstance(error, TransientError):
                mirror.push()
            raise type(error)(str(error).replace(str(mirror.folder), where)) from None
        mirror.push()
