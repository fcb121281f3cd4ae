"""Scores of the records of shards, as parquet files beside each other: a column store that each
scorer adds to once, and from which any number of selections is made.

=====================  ===========================================================================
``NNNNN.parquet``      shard NNNNN of the pool: a row a record, in its order: ``shard`` (the file's
                       name), ``record`` (its number there), ``key``, ``source``, the scorer's
                       columns, and ``problem``, why they are null: of a damaged record, or an
                       unreadable image. What was found by features has no ``source``
``scores.json``        the figures: records, those with a problem by reason, mean and range of each
                       column
=====================  ===========================================================================
"""

from __future__ import annotations

import collections
import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from webssl_jax.config import UserError
from webssl_jax.curation import engine, scorers
from webssl_jax.curation.shards import Shard, list_shards
from webssl_jax.data import records
from webssl_jax.data.converter import plan, runners
from webssl_jax.data.converter.items import no_progress, reason_of
from webssl_jax.data.decode import DecodeError
from webssl_jax.data.sources import DamagedRecord
from webssl_jax.files import write_json

_NAME = pa.dictionary(pa.int32(), pa.string())
BATCH = 32  # records that a scorer gets at a time, unless it has a number of its own


@dataclasses.dataclass(frozen=True)
class Task:
    """One shard to score."""

    output: str
    shard: Shard
    scorer: scorers.Scorer

    @property
    def path(self) -> Path:
        return file_of(Path(self.output), self.shard.number)

    @property
    def size(self) -> int:
        return self.shard.records

    needs: ClassVar[tuple] = ()


def file_of(folder: Path, number: int) -> Path:
    """The scores of a shard of the pool."""
    return folder / f"{number:05d}.parquet"


def score(
    pattern: Sequence[str],
    scorer: scorers.Scorer,
    output: Path,
    runner: runners.Runner = runners.here,
    progress: engine.Progress = engine.silent,
    settings: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Scores all records of a pool; continues what was begun.

    Args:
      settings: {flag: value} of the caller's own that say what the figures depend on, in place of
        ``--scorer``.

    Returns:
      The figures, also in ``<output>/scores.json``.

    Raises:
      UserError: for bad shards, a folder begun with others or in use, a worker that died.
    """
    files = engine.absolute(pattern)
    settings = settings or {"scorer": scorers.describe(scorer)}

    def make() -> tuple[dict[str, Any], plan.Dealt]:
        return {"shards": list_shards(files)}, {}

    plan.prepare(output, {"input": files, **settings}, make)
    with plan.lock(output):
        for left in output.glob("*.tmp"):
            left.unlink()
        tasks = [
            Task(str(output), Shard(number, **shard), scorer)
            for number, shard in enumerate(shards(output))
        ]
        engine.work(runner, score_shard, tasks, progress)
        summary = _summary(output, scorer.columns)
        write_json(output / "scores.json", summary)  # last: the scores are complete
        return summary


def score_shard(task: Task, progress: Callable[[int], None] = no_progress) -> None:
    """Writes a shard's file, unless it is there.

    Raises:
      UserError: if the shard has changed.
      OSError: if the file cannot be written.
    """
    if task.path.exists():
        return
    rows: list[dict[str, Any]] = []
    waiting: list[tuple[dict[str, Any], records.Record]] = []

    def flush() -> None:
        for (row, _), scored in zip(waiting, _score(task.scorer, [r for _, r in waiting])):
            row |= scored
        progress(len(waiting))
        waiting.clear()

    batch = getattr(task.scorer, "batch", BATCH)
    source = task.shard.open() if task.size else None  # an empty one cannot be opened alone
    name = os.path.basename(task.shard.file)
    for place in range(task.size):
        assert source is not None
        row: dict[str, Any] = {"shard": name, "record": place, "problem": None}
        rows.append(row)
        try:
            record = records.decode(source[place])
        except (DamagedRecord, records.RecordError) as error:
            row["problem"] = "damaged: " + " ".join(str(error).split())
            progress(1)
            continue
        row["key"], row["source"] = record.key, record.source
        waiting.append((row, record))
        if len(waiting) == batch:
            flush()
    flush()
    temporary = task.path.with_name(task.path.name + ".tmp")
    schema = _schema({"source": _NAME, **task.scorer.columns})
    pq.write_table(pa.Table.from_pylist(rows, schema), temporary)
    os.replace(temporary, task.path)


def _score(scorer: scorers.Scorer, batch: list[records.Record]) -> list[Mapping[str, Any]]:
    """A batch with an unreadable image is scored in halves, until it is alone."""
    if not batch:
        return []
    try:
        return list(scorer(batch))
    except DecodeError as error:
        if len(batch) == 1:
            name = reason_of(error) if batch[0].image else "empty file"
            return [{"problem": f"{name}: " + " ".join(str(error).split())}]
    half = len(batch) // 2
    return _score(scorer, batch[:half]) + _score(scorer, batch[half:])


def write(
    output: Path, pool: Iterable[pa.Table], columns: Mapping[str, pa.Array], problems: pa.Array
) -> None:
    """Writes what was computed for all records at once as scores of their shards, whose list the
    plan of ``output`` has.

    Args:
      pool: for each shard a table of ``shard``, ``record``, ``key``.
      columns: {name: (n,) over all shards}, null where there is a problem. problems: (n,) texts.
    """
    types = {name: values.type for name, values in columns.items()}
    start = 0
    for number, part in enumerate(pool):
        for name, values in [*columns.items(), ("problem", problems)]:
            part = part.append_column(name, values.slice(start, len(part)))
        path = file_of(output, number)
        pq.write_table(part.cast(_schema(types)), path.with_name(path.name + ".tmp"))
        os.replace(path.with_name(path.name + ".tmp"), path)
        start += len(part)
    write_json(output / "scores.json", _summary(output, types))


def _schema(columns: Mapping[str, pa.DataType]) -> pa.Schema:
    facts: dict[str, pa.DataType] = {"shard": _NAME, "record": pa.int64()}
    facts |= {"key": pa.string(), **columns, "problem": pa.string()}
    return pa.schema(list(facts.items()))


def _summary(output: Path, columns: Mapping[str, pa.DataType]) -> dict[str, Any]:
    count, problems = 0, collections.Counter[str]()
    found: dict[str, list[tuple[float, float, float, int]]] = {}
    numeric = [n for n, t in columns.items() if pa.types.is_integer(t) or pa.types.is_floating(t)]
    for table in _tables([output], [*numeric, "problem"]):
        count += len(table)
        problems.update(text.partition(":")[0] for text in table["problem"].drop_null().to_pylist())
        for name in numeric:
            values = table[name].drop_null().to_numpy()
            if len(values := values[np.isfinite(values)]):
                total = float(values.sum(dtype=np.float64))
                figures = float(values.min()), float(values.max()), total, len(values)
                found.setdefault(name, []).append(figures)
    ranges = {}
    for name, parts in found.items():
        least, most, sums, counts = zip(*parts, strict=True)
        ranges[name] = {"least": min(least), "mean": sum(sums) / sum(counts), "most": max(most)}
    return {"records": count, "problems": dict(problems), "columns": ranges}


def tables(folders: Sequence[Path], columns: Sequence[str]) -> Iterator[pa.Table]:
    """Of each shard of the pool, in their order: the columns asked, from whichever of the folders
    has them. Rows are records, in their order.

    Raises:
      UserError: for scores that are not complete or of other shards, or a column that none has.
    """
    for folder in folders:
        if not (folder / "scores.json").exists():
            raise UserError(f"--scores {folder}: no complete scores there; run score, to its end")
        if shards(folder) != shards(folders[0]):
            raise UserError(f"--scores {folder}: are of other shards than {folders[0]}")
    return _tables(folders, columns)


def numbers(folders: Sequence[Path], names: Sequence[str]) -> dict[str, np.ndarray]:
    """{column: (n,) float64 of all records; NaN where there is no score}.

    Raises:
      UserError: as :func:`tables`, or for a column of texts.
    """
    parts, start = tables(folders, names), 0
    count = sum(shard["records"] for shard in shards(folders[0]))
    found = {name: np.empty(count) for name in names}
    for part in parts:
        for name, values in found.items():
            kind = part[name].type
            if not (
                pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
            ):
                raise UserError(f"{name}: is no column of numbers")
            values[start : start + len(part)] = part[name].cast(pa.float64()).to_numpy()
        start += len(part)
    return found


def shards(folder: Path) -> list[dict[str, Any]]:
    """File, bytes and records of each shard that was scored."""
    path = folder / plan.PLAN_FOLDER / "facts.json"
    try:
        return json.loads(path.read_text("utf-8"))["shards"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: cannot be read ({error}); score into another folder") from error


def _open(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        words = " ".join(str(error).split())
        raise UserError(
            f"{path}: cannot be read ({words}); remove it and give the command that made it again"
        ) from error


def _tables(folders: Sequence[Path], columns: Sequence[str]) -> Iterator[pa.Table]:
    for number in range(len(shards(folders[0]))):
        files = [_open(file_of(folder, number)) for folder in folders]
        found = {}
        for name in columns:
            have = [file for file in files if name in file.schema_arrow.names]
            if not have:
                known = sorted({n for file in files for n in file.schema_arrow.names})
                raise UserError(f"{name}: no such column of scores; there are {', '.join(known)}")
            found[name] = have[0].read([name])[name]
        yield pa.table(found)
