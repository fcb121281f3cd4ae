"""Converts collections of images to ArrayRecord shards: plan first, then work that can be killed.

Three stages, so that any runner can do the middle one:

1. *Plan.* The inputs are listed in a fixed order and dealt to shards. The plan is written to
   ``<output>/.plan`` before any work: one file of inputs a shard, and ``settings.json`` last. From
   then on it is the truth: the same command again continues it, another command is refused.
2. *Work.* ``convert_shard`` is a function of one shard's plan alone. A process pool runs it here.
3. *Finalise.* A shard is written under a temporary name, synced, and renamed. The name without
   ``.tmp`` therefore means "complete"; it is never written again. What is half-written never
   counts.

A new kind of input is a ``Reader`` (what one line of the plan holds) and a function that lists its
lines; everything else stays.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import io
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol

from array_record.python import array_record_module
from PIL import Image

from webssl_jax.config import UserError
from webssl_jax.data import records, views
from webssl_jax.files import write_json, write_text

PLAN_FOLDER = ".plan"
PLAN_VERSION = 1
EXAMPLES = 5  # names kept for each reason of dropping
JPEG_QUALITY = 92  # of what --max-side re-encodes, without chroma subsampling: text stays legible
SIDE_EDGES = (32, 64, 128, 224, 256, 384, 512, 768, 1024, 2048)
ASPECT_EDGES = (1.1, 1.34, 1.5, 1.78, 2.0, 3.0, 4.0)
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

Unit = Mapping[str, Any]  # one line of a plan, plain JSON
Dealt = Mapping[str, Sequence[Sequence[Unit]]]  # split -> shard -> inputs


@dataclasses.dataclass(frozen=True)
class Candidate:
    """An image found in an input, before any rule. ``data`` is the encoded file."""

    key: str
    data: bytes
    captions: tuple[str, ...] = ()
    label: str | None = None


@dataclasses.dataclass(frozen=True)
class Dropped:
    """An image that will not be in the shards. ``reason`` is a short fixed phrase: it is
    counted."""

    key: str
    reason: str


class Reader(Protocol):
    """Opens one input. Must pickle, and must depend on nothing but its fields and the input."""

    source: str

    def read(self, unit: Unit) -> Iterator[Candidate | Dropped]:
        """Yields what is in one line of the plan. Bad input is a ``Dropped``, not an exception."""


@dataclasses.dataclass(frozen=True)
class Rules:
    """What an image must be. Sides in pixels after EXIF rotation; ``max_side`` 0 keeps every size.

    Larger images than ``max_side`` are shrunk and encoded as JPEG; the bytes of all others stay.
    """

    max_side: int = 0
    min_side: int = 32
    max_aspect: float = 8.0


# ---------------------------------------------------------------------------------------- the plan


def deal(units: Sequence[Unit], shards: int) -> list[list[Unit]]:
    """Contiguous slices whose lengths differ by at most one."""
    bounds = [i * len(units) // shards for i in range(shards + 1)]
    return [list(units[a:b]) for a, b in zip(bounds, bounds[1:], strict=False)]


def prepare(output: Path, settings: Mapping[str, Any], make: Callable[[], Dealt]) -> bool:
    """Writes the plan, or recognises the one that is there.

    Args:
      output: folder of the shards, made if missing.
      settings: plain JSON; whatever changes the output. Another run must bring the same.
      make: returns split -> shard -> inputs. Called only when there is no plan yet.

    Returns:
      True if an earlier plan is continued.

    Raises:
      UserError: if the folder cannot be written, holds a plan of other settings, or holds shards
        of these splits without a plan.
    """
    settings = json.loads(json.dumps({"plan_version": PLAN_VERSION, **settings}))
    plan = output / PLAN_FOLDER
    try:
        plan.mkdir(parents=True, exist_ok=True)
        _probe(plan)
    except OSError as error:
        if error.errno in _DISK_FULL:
            raise
        raise UserError(f"--output {output}: cannot be written: {error.strerror}") from None
    if (plan / "settings.json").exists():
        _compare(output, json.loads((plan / "settings.json").read_text("utf-8")), settings)
        return True
    shards = sorted(path.name for path in output.glob("*.arrayrecord"))
    if shards:
        raise UserError(f"--output {output}: holds {shards[0]} from elsewhere; give another folder")
    for old in plan.glob("*.json*"):
        old.unlink()  # of a plan that was never completed
    counts = {}
    for split, parts in make().items():
        counts[split] = [len(part) for part in parts]
        for index, part in enumerate(parts):
            lines = "".join(json.dumps(unit) + "\n" for unit in part)
            (plan / f"{split}-{index:05d}.jsonl").write_text(lines, "utf-8")
    write_text(plan / "shards.json", json.dumps(counts))
    write_text(plan / "settings.json", json.dumps(settings, indent=1))
    return False


def planned(output: Path) -> int:
    """Number of inputs in the plan."""
    counts = json.loads((output / PLAN_FOLDER / "shards.json").read_text("utf-8"))
    return sum(sum(sizes) for sizes in counts.values())


def _compare(output: Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
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


# ---------------------------------------------------------------------------------------- the work


@dataclasses.dataclass(frozen=True)
class Shard:
    """One shard's whole task; ``convert_shard`` needs nothing else."""

    output: str
    split: str
    index: int
    total: int
    reader: Reader
    rules: Rules

    @property
    def path(self) -> Path:
        return Path(self.output) / records.shard_name(self.split, self.index, self.total)

    @property
    def plan(self) -> Path:
        return Path(self.output) / PLAN_FOLDER / f"{self.split}-{self.index:05d}.jsonl"

    @property
    def stats(self) -> Path:
        return self.plan.with_suffix(".stats.json")


def convert_shard(shard: Shard, progress: Callable[[int], None] = lambda n: None) -> dict[str, Any]:
    """Writes one shard and returns its statistics (see ``_new_stats``).

    Args:
      progress: called with 1 after each line of the plan.

    Raises:
      OSError: with ENOSPC if the disk is full; the temporary file is removed.
    """
    stats = _new_stats()
    temporary = shard.path.with_name(f"{shard.path.name}.{os.getpid()}.tmp")
    try:
        writer = array_record_module.ArrayRecordWriter(str(temporary), records.WRITER_OPTIONS)
        with open(shard.plan, encoding="utf-8") as plan:
            for line in plan:
                for item in shard.reader.read(json.loads(line)):
                    outcome = make_record(item, shard.reader.source, shard.rules)
                    _count(stats, item, outcome)
                    if isinstance(outcome, records.Record):
                        writer.write(records.encode(outcome))
                progress(1)
        writer.close()
        _sync(temporary)
        _check(temporary, stats["kept"])
    except Exception as error:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        if not isinstance(error, OSError) and _means_disk_full(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(temporary)) from None
        raise
    write_text(shard.stats, json.dumps(stats))  # before the shard: a complete shard has statistics
    os.replace(temporary, shard.path)
    _sync(shard.path.parent)
    return stats


def make_record(item: Candidate | Dropped, source: str, rules: Rules) -> records.Record | Dropped:
    """Applies the rules to one image. It must decode completely to count."""
    if isinstance(item, Dropped):
        return item
    try:
        opened = views.open_image(item.data)
    except views.DecodeError as error:
        # Only the header was read, so this is cheap even for 60,000 x 60,000 pixels.
        bomb = "more than the limit" in str(error) or "DecompressionBomb" in str(error)
        return Dropped(item.key, "more pixels than the limit" if bomb else "undecodable")
    width, height = opened.width, opened.height
    if min(width, height) < rules.min_side:
        return Dropped(item.key, "too small")
    if max(width, height) > rules.max_aspect * min(width, height):
        return Dropped(item.key, "too thin")
    try:
        image = views.decode_image(item.data)
    except views.DecodeError:
        return Dropped(item.key, "undecodable")
    data = item.data
    if rules.max_side and max(width, height) > rules.max_side:
        scale = rules.max_side / max(width, height)
        width, height = (max(1, round(side * scale)) for side in (width, height))
        encoded = io.BytesIO()
        small = image.resize((width, height), Image.Resampling.BICUBIC)
        small.save(encoded, "JPEG", quality=JPEG_QUALITY, subsampling=0)
        data = encoded.getvalue()
    return records.Record(data, item.captions, item.key, width, height, source, item.label)


def _check(path: Path, count: int) -> None:
    """The writer reports some failures late or not at all: trust what can be read back."""
    reader = array_record_module.ArrayRecordReader(str(path))
    found = reader.num_records()
    reader.close()
    if found != count:
        raise OSError(errno.EIO, f"{found} records arrived of {count}", str(path))


def _means_disk_full(error: Exception) -> bool:
    return any(os.strerror(code) in str(error) for code in _DISK_FULL)


# --------------------------------------------------------------------------------------- the counts


def _new_stats() -> dict[str, Any]:
    """Plain JSON, and additive: the summary of a split is the sum over its shards."""
    return {
        "inputs": 0,
        "kept": 0,
        "reencoded": 0,
        "captioned": 0,
        "bytes": 0,
        "dropped": {},
        "shorter_side": {},
        "aspect": {},
        "labels": {},
    }


def _count(stats: dict[str, Any], item: Candidate | Dropped, outcome: Any) -> None:
    stats["inputs"] += 1
    if isinstance(outcome, Dropped):
        row = stats["dropped"].setdefault(outcome.reason, {"count": 0, "examples": []})
        row["count"] += 1
        row["examples"] = (row["examples"] + [outcome.key])[:EXAMPLES]
        return
    sides = sorted((outcome.width, outcome.height))
    stats["kept"] += 1
    stats["bytes"] += len(outcome.image)
    stats["captioned"] += bool(outcome.captions)
    stats["reencoded"] += outcome.image is not item.data
    for name, value, edges in (
        ("shorter_side", sides[0], SIDE_EDGES),
        ("aspect", sides[1] / sides[0], ASPECT_EDGES),
    ):
        bin_name = next((f"<= {edge:g}" for edge in edges if value <= edge), f"> {edges[-1]:g}")
        stats[name][bin_name] = stats[name].get(bin_name, 0) + 1
    if outcome.label is not None:
        stats["labels"][outcome.label] = stats["labels"].get(outcome.label, 0) + 1


def total_stats(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The sum of shards' statistics, in a fixed order, so that the summary file is reproducible."""
    total = _new_stats()
    for part in parts:
        for name in ("inputs", "kept", "reencoded", "captioned", "bytes"):
            total[name] += part[name]
        for reason, row in part["dropped"].items():
            mine = total["dropped"].setdefault(reason, {"count": 0, "examples": []})
            mine["count"] += row["count"]
            mine["examples"] = (mine["examples"] + row["examples"])[:EXAMPLES]
        for name in ("shorter_side", "aspect", "labels"):
            for key, n in part[name].items():
                total[name][key] = total[name].get(key, 0) + n
    for name, edges in (("shorter_side", SIDE_EDGES), ("aspect", ASPECT_EDGES)):
        order = [f"<= {edge:g}" for edge in edges] + [f"> {edges[-1]:g}"]
        total[name] = {key: total[name][key] for key in order if key in total[name]}
    total["labels"] = dict(sorted(total["labels"].items()))
    total["dropped"] = dict(sorted(total["dropped"].items(), key=lambda x: (-x[1]["count"], x[0])))
    return total


# --------------------------------------------------------------------------------- the local runner

_COUNTER: Any = None  # a worker's share of the progress, set once in each process


def run_local(
    output: Path,
    reader: Reader,
    rules: Rules,
    workers: int,
    progress: Callable[[int], None] = lambda n: None,
) -> dict[str, dict[str, Any]]:
    """Converts every shard of the plan that is not finished, in a pool of processes.

    Args:
      output: a folder that :func:`prepare` has seen.
      progress: called with the number of inputs done since the last call, several times a second;
        first with those of the shards that were finished before.

    Returns:
      {split: statistics}, also written to ``<output>/<split>.summary.json``.

    Raises:
      UserError: if the disk is full, a worker dies, or another process writes there. Finished
        shards stay.
    """
    with lock(output):
        counts = json.loads((output / PLAN_FOLDER / "shards.json").read_text("utf-8"))
        _remove_temporaries(output)
        shards = [
            Shard(str(output), split, index, len(sizes), reader, rules)
            for split, sizes in counts.items()
            for index in range(len(sizes))
        ]
        todo = [shard for shard in shards if not (shard.path.exists() and shard.stats.exists())]
        finished = set(shards) - set(todo)
        progress(sum(counts[shard.split][shard.index] for shard in finished))
        _run_pool(output, todo, workers, progress, len(shards))
        summaries = {}
        for split in counts:
            parts = [json.loads(s.stats.read_text("utf-8")) for s in shards if s.split == split]
            summary = {"split": split, "shards": len(parts), **total_stats(parts)}
            write_json(output / f"{split}.summary.json", summary)
            summaries[split] = summary
        return summaries


def _run_pool(
    output: Path, todo: Sequence[Shard], workers: int, progress: Callable[[int], None], total: int
) -> None:
    if not todo:
        return
    # Spawned, not forked: the record writer has threads, and a worker must know its true parent.
    context = get_context("spawn")
    counter = context.Value("q", 0)
    pool = futures.ProcessPoolExecutor(
        min(workers, len(todo)), context, initializer=_start_worker, initargs=(counter, os.getpid())
    )
    seen = 0
    try:
        waiting = {pool.submit(_work, shard) for shard in todo}
        while waiting:
            done, waiting = futures.wait(waiting, timeout=0.2, return_when=futures.FIRST_EXCEPTION)
            now = counter.value
            if now > seen:
                progress(now - seen)
                seen = now
            for future in done:
                future.result()
    except OSError as error:
        if error.errno not in _DISK_FULL:
            raise
        raise UserError(
            f"--output {output}: {error.strerror} ({_finished(output)} of {total} shards are "
            "finished and stay); make room and start the same command again"
        ) from None
    except futures.process.BrokenProcessPool:
        raise UserError(
            f"a worker process died, perhaps for lack of memory ({_finished(output)} of {total} "
            "shards are finished and stay); start the same command again with fewer --workers"
        ) from None
    finally:
        # Without waiting for shards in work: they are redone. A dead parent ends workers, too.
        processes = list((pool._processes or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()
        _remove_temporaries(output)


def _remove_temporaries(output: Path) -> None:
    for path in (*output.glob("*.tmp"), *(output / PLAN_FOLDER).glob("*.tmp")):
        path.unlink(missing_ok=True)


def _finished(output: Path) -> int:
    return len(list(output.glob("*.arrayrecord")))


def _start_worker(counter: Any, parent: int) -> None:
    global _COUNTER
    _COUNTER = counter
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)  # an orphan would go on writing beside the run that continues

    threading.Thread(target=watch, daemon=True).start()


def _work(shard: Shard) -> None:
    def progress(n: int) -> None:
        with _COUNTER.get_lock():
            _COUNTER.value += n

    convert_shard(shard, progress)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
