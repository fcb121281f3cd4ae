"""The plan of a conversion: which inputs go to which shard, written before any work."""

from __future__ import annotations

import bisect
import contextlib
import fcntl
import glob
import itertools
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from webssl_jax.config import UserError
from webssl_jax.data.converter import buckets
from webssl_jax.data.converter.items import Unit
from webssl_jax.data.records import shard_name
from webssl_jax.errors import DISK_FULL
from webssl_jax.files import write_text

PLAN_FOLDER = ".plan"
PLAN_VERSION = 3

Dealt = Mapping[str, Sequence[Sequence[Unit]]]  # split -> shard -> inputs


def size_of(unit: Unit) -> int:
    """A unit's share of the work: images, rows or kilobytes, as its kind counts."""
    return unit.get("size", 1)


def deal(units: Sequence[Unit], shards: int) -> list[list[Unit]]:
    """Contiguous slices of about equal size, none empty. With units of size 1 their lengths differ
    by at most one."""
    total = sum(map(size_of, units))
    bounds = [i * total // shards for i in range(shards)]
    starts = itertools.accumulate(map(size_of, units), initial=0)
    parts: list[list[Unit]] = [[] for _ in range(shards)]
    for unit, start in zip(units, starts, strict=False):
        parts[bisect.bisect_right(bounds, start) - 1].append(unit)
    return [part for part in parts if part]


def find_files(patterns: Sequence[str], what: str, remote: bool = False) -> tuple[Any, list[str]]:
    """Files that match any of the patterns: their common folder, and sorted paths below it.

    Args:
      remote: whether they may be addresses, ``gs://``, all of one bucket.

    Raises:
      UserError: if a pattern matches nothing, is an address instead of a path, or matches what is
        no regular file.
    """
    found: set[str] = set()
    if remote and all(pattern.startswith(buckets.SCHEME) for pattern in patterns):
        return _find_remote(patterns)
    for pattern in patterns:
        if "://" in pattern:
            allowed = "only paths" + (", or only gs://" if remote else "")
            raise UserError(
                f"--input {pattern}: give {allowed}; or mount a bucket (gcsfuse, for one)"
            )
        matches = [pattern] if os.path.exists(pattern) else glob.glob(pattern, recursive=True)
        if not matches:
            raise UserError(f"--input {pattern}: no such file, and no file matches it")
        found.update(os.path.abspath(match) for match in matches)
    for path in sorted(found):
        if os.path.isdir(path):
            raise UserError(f"--input {path}: is a folder; give {what}, '{path}/*' for example")
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise UserError(f"--input {path}: is not a regular file; give {what}")
    root = Path(os.path.commonpath([os.path.dirname(path) for path in found]))
    return root, sorted((os.path.relpath(path, root) for path in found), key=os.fsencode)


def _find_remote(patterns: Sequence[str]) -> tuple[epath.Path, list[str]]:
    found: set[str] = set()
    for pattern in patterns:
        if not (matches := buckets.find(pattern)):
            raise UserError(f"--input {pattern}: no such file, and no file matches it")
        found.update(one.removeprefix(buckets.SCHEME) for one in matches)
    root = os.path.commonpath([os.path.dirname(path) for path in found])
    if not root:
        raise UserError(f"--input {' '.join(patterns)}: name files of one bucket")
    paths = sorted((os.path.relpath(path, root) for path in found), key=os.fsencode)
    return epath.Path(buckets.SCHEME + root), paths


def stamp(path: Path) -> dict[str, Any]:
    """What tells a file that is replaced: fields of its units."""
    status = path.stat()
    return {"bytes": status.st_size, "mtime": status.st_mtime_ns}


def stamps(root: Path, paths: Sequence[str]) -> dict[str, dict[str, Any]]:
    """:func:`stamp` of each path below a root of :func:`find_files`."""
    if not str(root).startswith(buckets.SCHEME):
        return {path: stamp(root / path) for path in paths}
    listed = buckets.find(f"{root}/**")  # once for all
    return {path: listed[f"{root}/{path}"] for path in paths}


def prepare(
    output: Path, settings: Mapping[str, Any], make: Callable[[], tuple[dict[str, Any], Dealt]]
) -> tuple[dict[str, Any], bool]:
    """Writes the plan, or recognises the one that is there.

    Args:
      output: folder of the shards, made if missing.
      settings: plain JSON; whatever changes the output. Another run must bring the same.
      make: returns facts that the reader needs (plain JSON), and split -> shard -> inputs. Where
        there is a plan, it is compared with these inputs.

    Returns:
      The facts, and True if an earlier plan is continued.

    Raises:
      UserError: if the folder cannot be written, is in use by another process, holds a plan of
        other settings or inputs, or holds shards without a plan.
      Whatever ``make`` raises. Then the folder is left as it was. But inputs of a conversion that
        is finished may be gone.
    """
    settings = json.loads(json.dumps({"plan_version": PLAN_VERSION, **settings}))
    plan = output / PLAN_FOLDER
    new_plan, new_output = not plan.exists(), not output.exists()
    try:
        plan.mkdir(parents=True, exist_ok=True)
        _probe(plan)
    except OSError as error:
        if error.errno in DISK_FULL:
            raise
        raise UserError(f"--output {output}: cannot be written: {error.strerror}") from None
    with lock(output):  # a second command would write its plan among the lines of this one
        if (plan / "settings.json").exists():
            compare(output, json.loads((plan / "settings.json").read_text("utf-8")), settings)
            try:
                _, now = make()
            except UserError:
                if not _finished(output):
                    raise
            else:
                _compare_inputs(output, _planned_inputs(plan), _inputs(now))
            return json.loads((plan / "facts.json").read_text("utf-8")), True
        try:
            refuse_foreign(output)
            for old in plan.glob("*.json*"):
                old.unlink()  # of a plan that was never completed
            facts, dealt = make()
            _write(plan, settings, facts, dealt)
        except BaseException:
            if new_plan:  # what cannot be removed (NFS keeps open files) must not hide the error
                shutil.rmtree(plan, ignore_errors=True)
            if new_output and not any(output.iterdir()):
                output.rmdir()
            raise
        return facts, False


def _write(plan: Path, settings: Mapping[str, Any], facts: Mapping[str, Any], dealt: Dealt) -> None:
    sizes = {}
    for split, parts in dealt.items():
        sizes[split] = [sum(map(size_of, part)) for part in parts]
        for index, part in enumerate(parts):
            lines = "".join(json.dumps(unit) + "\n" for unit in part)
            (plan / f"{split}-{index:05d}.jsonl").write_text(lines, "utf-8")
    write_text(plan / "shards.json", json.dumps(sizes))
    write_text(plan / "facts.json", json.dumps(facts))
    write_text(plan / "settings.json", json.dumps(settings, indent=1))  # last: the plan is complete


def _inputs(dealt: Dealt) -> dict[str, Any]:
    """{path: what tells that the file is another, None if nothing does}."""
    units = (unit for parts in dealt.values() for part in parts for unit in part)
    return {
        u["path"]: [u["bytes"], u["mtime"]] if "bytes" in u else None
        for u in units
        if "count" not in u
    }


def _planned_inputs(plan: Path) -> dict[str, Any]:
    files = plan.glob("*-[0-9]*.jsonl")
    return _inputs({"": [[json.loads(line) for line in open(f, encoding="utf-8")] for f in files]})


def _compare_inputs(output: Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises UserError for inputs that are new, or are other files than they were. Those that are
    gone are noted when they are to be read."""
    new = sorted(set(now) - set(then))
    changed = sorted(path for path in set(now) & set(then) if now[path] != then[path])
    said = [
        f"{len(paths):,} {what} ({', '.join(paths[:3])}{', ...' if len(paths) > 3 else ''})"
        for paths, what in ((new, "new"), (changed, "changed"))
        if paths
    ]
    if said:
        raise UserError(
            f"--output {output}: was begun with {len(then):,} inputs; now there are "
            f"{' and '.join(said)}; convert new ones into another folder (training takes several, "
            "'make_records records' joins them), changed ones again into another folder"
        )


def _finished(output: Path) -> bool:
    return all(
        (output / shard_name(split, index, len(sizes))).exists()
        for split, sizes in planned(output).items()
        for index in range(len(sizes))
    )


def planned(output: Path) -> dict[str, list[int]]:
    """{split: size of each shard's inputs}."""
    return json.loads((output / PLAN_FOLDER / "shards.json").read_text("utf-8"))


def refuse_foreign(output: Path) -> None:
    """For a folder without settings of ours. Raises UserError if shards are in it."""
    if shards := sorted(path.name for path in output.glob("*.arrayrecord")):
        raise UserError(f"--output {output}: holds {shards[0]} from elsewhere; give another folder")


def compare(output: Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises UserError if two runs' settings, by flag, are not the same."""
    for name in sorted(set(then) | set(now)):
        if then.get(name) != now.get(name):
            flag = "--" + name.replace("_", "-")
            raise UserError(
                f"--output {output}: was begun with {flag} {then.get(name)}, now {now.get(name)}; "
                "give the same arguments to continue, or another folder"
            )


def _probe(folder: Path) -> None:
    path = folder / f"probe-{os.getpid()}"
    path.touch()
    path.unlink()


@contextlib.contextmanager
def lock(output: Path) -> Iterator[None]:
    """Holds the folder. The kernel frees the lock when the process dies, however it dies.

    Raises:
      UserError: if another process holds it.
    """
    with open(output / PLAN_FOLDER / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--output {output}: another conversion is writing there") from None
        yield
