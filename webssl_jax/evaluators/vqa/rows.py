"""Questions out of the files of a benchmark as they were downloaded: parquet, or CSV with images.

hf download lmms-lab/MME --repo-type dataset --local-dir benchmarks/mme
"""

from __future__ import annotations

import csv
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow
import pyarrow.parquet as pq

from webssl_jax.errors import UserError
from webssl_jax.evaluators.vqa.task import Question, Source, Task

_ROWS_AT_ONCE = 16  # documents are megabytes each
_PART = re.compile(r"-\d{5}-of-(\d{5})")  # of a name: how many files a table is cut into


def read_questions(task: Task, folder: pathlib.Path) -> Iterator[Question]:
    """The questions of a benchmark in the order of its rows, read as they are asked for.

    Raises:
      UserError: if ``folder`` lacks one of its files, one cannot be read, lacks a column, or holds
        another kind of value in it.
    """
    for place, row in enumerate(_rows(task.name, task.source, folder)):
        try:
            found = task.questions(place, row)
        except (TypeError, ValueError, AttributeError, LookupError) as error:
            raise UserError(
                f"{task.name}, row {place} in {folder}: is not as it was published ({error}); "
                "download it again"
            ) from error
        yield from found


def _rows(name: str, source: Source, folder: pathlib.Path) -> Iterator[Mapping[str, Any]]:
    images = _images(_files(name, source, source.tables, folder)) if source.tables else {}
    for path in _files(name, source, source.files, folder):
        for row in _csv(path, source) if path.suffix == ".csv" else _parquet(path, source.columns):
            if source.pictures:
                row["image"] = {"bytes": _picture(folder / source.pictures.format(**row))}
            elif source.tables:
                row["image"] = _image(images, row["imageId"], name)
            yield row


def _files(name: str, source: Source, pattern: str, folder: pathlib.Path) -> list[pathlib.Path]:
    found = sorted(folder.glob(pattern))
    wanted = {int(match[1]) for path in found if (match := _PART.search(path.name))}
    if not found or wanted - {len(found)}:
        has = f"no file {pattern}"
        if found:
            has = f"{len(found)} files {pattern}, of which {max(wanted)} belong together"
        raise UserError(
            f"{name}: {folder} has {has}; download it: hf download {source.repo} "
            f"--repo-type dataset --local-dir {folder}"
        )
    return found


def _parquet(path: pathlib.Path, columns: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    try:
        with pq.ParquetFile(path) as file:
            missing = sorted(set(columns) - set(file.schema_arrow.names))
            if missing:
                raise UserError(
                    f"{path}: has no column {', '.join(missing)}; it is not the published file"
                )
            for batch in file.iter_batches(_ROWS_AT_ONCE, columns=list(columns)):
                yield from batch.to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: cannot be read ({error}); download it again") from error


def _images(paths: list[pathlib.Path]) -> dict[str, Any]:
    """{id: image}: all at once, for GQA's 398 images lie apart from its 12,578 questions."""
    rows = (row for path in paths for row in _parquet(path, ("id", "image")))
    return {row["id"]: row["image"] for row in rows}


def _image(images: Mapping[str, Any], name: str, task: str) -> Any:
    if name not in images:
        raise UserError(f"{task}: image {name} is in none of the image files; download them again")
    return images[name]


def _csv(path: pathlib.Path, source: Source) -> Iterator[dict[str, Any]]:
    """Rows of a CSV file with the names of ``source.columns``, whatever its own header says."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            lines = list(csv.reader(file))[1:]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read ({error}); download it again") from error
    for number, cells in enumerate(lines, 1):
        if not cells:
            continue
        if len(cells) != len(source.columns):
            raise UserError(
                f"{path}, row {number}: {len(cells)} cells for the columns "
                f"{', '.join(source.columns)}; download it again"
            )
        yield dict(zip(source.columns, cells))


def _picture(path: pathlib.Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); download it again") from error
