"""Features of many images as parquet files: a row an image, in the order of the input.

    DIR/part-00000-of-00012.parquet    index, name, label, problem, and a list for each column asked
    DIR/_features.json                 what they are features of

Row ``i`` of all parts is image ``i``. An image that cannot be read keeps its row: its features are
null, and ``problem`` says why. A part is there whole or not at all, and one that is there is not
made again, so memory depends on no number of images and the same command goes on after a kill.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from webssl_jax.config import UserError, suggest
from webssl_jax.data import records
from webssl_jax.data.decode import DecodeError
from webssl_jax.data.image_folder import ImageFolder
from webssl_jax.data.pipeline import Source, read_all
from webssl_jax.data.views import Preprocess
from webssl_jax.evaluators.datasets import sampled_digest
from webssl_jax.evaluators.features import CHUNK_BYTES
from webssl_jax.files import write_json
from webssl_jax.model import Model, fill_up, text_of, to_host
from webssl_jax.models.features import Want
from webssl_jax.telemetry.progress import Progress

# Each is a column of lists: the CLS token, the mean of the patches, both after the final norm; and
# the L2-normalised embedding in the space that images and texts share.
COLUMNS = ("cls", "patches", "embedding")
DTYPES = {"float32": pa.float32(), "float16": pa.float16()}
_MOST_ROWS = 2048  # of a part: what a kill costs, at most
FACTS = "_features.json"  # readers of parquet folders pass over names with _


class Asked(NamedTuple):
    """columns: some of :data:`COLUMNS`. dtype: one of :data:`DTYPES`. batch: images a call of the
    network. threads: that read and decode."""

    columns: tuple[str, ...] = ("cls", "patches")
    dtype: str = "float32"
    batch: int = 256
    threads: int = 16


class Written(NamedTuple):
    """rows: of all parts, so many as there are images. gaps: rows of images that cannot be read."""

    parts: int
    rows: int
    gaps: int


class _Image(NamedTuple):
    """number: of all images. pixels: None where there is a problem."""

    number: int
    name: str
    label: str | None
    pixels: np.ndarray | None
    problem: str | None


def choose(asked: str, model: Model, flag: str) -> tuple[str, ...]:
    """The columns that ``asked`` names, with commas between them.

    Raises:
      UserError: for one that is not known, or that the model has not.
    """
    names = tuple(dict.fromkeys(name.strip() for name in asked.split(",") if name.strip()))
    known = COLUMNS if model.text else COLUMNS[:-1]
    for name in names:
        if name not in known:
            raise UserError(
                f"{flag} {asked}: {model.origin.name} gives no {name!r}; {suggest(name, known)}"
            )
    if not names:
        raise UserError(f"{flag} {asked!r}: names no column; give some of {', '.join(known)}")
    return names


def write(model: Model, source: Source, folder: pathlib.Path, asked: Asked) -> Written:
    """Writes the parts that are not there yet, of all images of a source. For one process.

    Raises:
      UserError: if the folder holds other features or cannot be written, if a feature is not
        finite, or if no image can be read.
    """
    widths = _widths(model, asked.columns)
    size = max(1, min(_MOST_ROWS, CHUNK_BYTES // (4 * sum(widths.values()))))
    _claim(folder, _facts(model, source, asked, size))
    starts = range(0, len(source), size)
    names = [folder / f"part-{i:05d}-of-{len(starts):05d}.parquet" for i in range(len(starts))]
    todo = [(start, name) for start, name in zip(starts, names) if not name.exists()]
    due = sum(min(size, len(source) - start) for start, _ in todo)
    progress = Progress(due, "features:", "images")
    for start, name in todo:
        indices = range(start, min(start + size, len(source)))
        _save(_part(model, source, indices, asked, widths, progress), name)
    progress.close()
    problems = [pq.read_table(name, columns=["problem"])["problem"] for name in names]
    gaps = sum(len(column) - column.null_count for column in problems)
    if gaps == len(source):
        raise UserError(
            f"{source.describe(0)}, ...: none of {gaps:,} images can be read; {names[0]} says why"
        )
    return Written(len(names), len(source), gaps)


def _widths(model: Model, columns: Sequence[str]) -> dict[str, int]:
    width = dict.fromkeys(COLUMNS, model.encoder.width)
    if "embedding" in columns:
        width["embedding"] = text_of(model).config.embedding
    return {name: width[name] for name in columns}


def _facts(model: Model, source: Source, asked: Asked, size: int) -> dict[str, Any]:
    return {
        "model": model.origin.name,
        "weights": model.fingerprint,
        "preprocess": repr(model.preprocess),
        "images": len(source),
        "input": input_digest(source),
        "columns": list(asked.columns),
        "dtype": asked.dtype,
        "rows_a_part": size,
    }


def input_digest(source: Source) -> str:
    """What tells these images from others."""
    known = f"{len(source)} {source.identity if isinstance(source, ImageFolder) else ''}"
    return sampled_digest(source, range(len(source)), known)


def _claim(folder: pathlib.Path, facts: dict[str, Any]) -> None:
    """Makes the folder for these features, or sees that it is theirs."""
    path = folder / FACTS
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            if strange := next(folder.iterdir(), None):
                raise UserError(f"--output {folder}: holds {strange.name}; give an empty folder")
            write_json(path, facts)
        there = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"--output {folder}: cannot be written ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{path}: is damaged; give another --output") from error
    for key, value in facts.items():
        if key != "model" and there.get(key) != value:
            raise UserError(
                f"--output {folder}: holds features of another command ({key}: {there.get(key)} -> "
                f"{value}); give another folder, or remove it"
            )


def _part(
    model: Model,
    source: Source,
    indices: Sequence[int],
    asked: Asked,
    widths: dict[str, int],
    progress: Progress,
) -> pa.Table:
    """The rows of some images; the devices work on a batch while the host reads the next."""
    images: list[_Image] = []
    batch = model.rounded_batch(asked.batch)
    made: list[dict[str, np.ndarray]] = []
    pending: tuple[dict[str, Any], int] | None = None
    waiting: list[np.ndarray] = []

    def run() -> None:
        nonlocal pending
        now = (_compute(model, fill_up(np.stack(waiting), batch), widths), len(waiting))
        collect()
        pending = now
        waiting.clear()

    def collect() -> None:
        if pending:
            made.append({name: x[: pending[1]] for name, x in to_host(pending[0]).items()})

    for image in _read(source, model.preprocess, indices, asked.threads):
        images.append(image._replace(pixels=None))
        progress.update()
        if image.pixels is not None:
            waiting.append(image.pixels)
        if len(waiting) == batch:
            run()
    if waiting:
        run()
    collect()
    features = {
        name: np.concatenate([np.zeros((0, width), np.float32), *(part[name] for part in made)])
        for name, width in widths.items()
    }
    return _table(images, features, asked.dtype)


def _compute(model: Model, images: np.ndarray, columns: dict[str, int]) -> dict[str, Any]:
    found = {}
    if "cls" in columns or "patches" in columns:
        want = Want(cls="cls" in columns, patches="mean" if "patches" in columns else "none")
        seen = model.features(images, want)
        found = {"cls": seen.cls, "patches": seen.patches}
    if "embedding" in columns:
        found["embedding"] = text_of(model).embed_images(images)
    return {name: found[name] for name in columns}


def _read(
    source: Source, preprocess: Preprocess, indices: Sequence[int], threads: int
) -> Iterator[_Image]:
    def see(record: records.Record) -> tuple[str, str | None, np.ndarray | None, str | None]:
        try:
            return record.key, record.label, preprocess(record.image), None
        except DecodeError as error:
            return record.key, record.label, None, " ".join(str(error).split())

    for index, found, reason in read_all(source, see, indices, threads):
        if reason:  # not even its name can be read
            describe = source.key if isinstance(source, ImageFolder) else source.describe
            found = describe(index), None, None, reason
        yield _Image(index, *found)


def _table(images: list[_Image], features: dict[str, np.ndarray], dtype: str) -> pa.Table:
    gaps = np.array([image.problem is not None for image in images], bool)
    columns: dict[str, Any] = {
        "index": pa.array([image.number for image in images], pa.int64()),
        "name": pa.array([image.name for image in images], pa.string()),
        "label": pa.array([image.label for image in images], pa.string()),
        "problem": pa.array([image.problem for image in images], pa.string()),
    }
    for name, values in features.items():
        bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
        if len(bad):
            image = images[int(np.flatnonzero(~gaps)[bad[0]])]
            raise UserError(
                f"{image.name}: NaN or infinity in its features ({name}); the network has diverged"
            )
        whole = np.zeros((len(images), values.shape[1]), np.dtype(dtype))
        whole[~gaps] = values
        flat = pa.array(whole.ravel(), DTYPES[dtype])
        columns[name] = pa.FixedSizeListArray.from_arrays(
            flat, values.shape[1], mask=pa.array(gaps)
        )
    return pa.table(columns)


def _save(table: pa.Table, path: pathlib.Path) -> None:
    partial = path.with_name(f"_{path.name}.partial")
    try:
        pq.write_table(table, partial)
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error
