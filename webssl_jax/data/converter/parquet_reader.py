"""Parquet files as input of the converter: images as bytes, as paths, or as Hugging Face writes
them (a struct of ``bytes`` and ``path``).

A unit is one row group; of it only some pages and rows are in memory. Class names of integer labels
are taken from the metadata that Hugging Face's ``datasets`` leaves in the schema. Of annotations,
bytes and text stay as they are, an image's struct becomes its file, and all else JSON.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from webssl_jax.config import UserError, suggest
from webssl_jax.data.annotations import AnnotationError, encode_json
from webssl_jax.data.converter.folder_reader import key_of, read_file
from webssl_jax.data.converter.items import (
    MISSING,
    Candidate,
    Dropped,
    Item,
    Note,
    Unit,
    Wanted,
    clean_captions,
    no_progress,
    text_of,
)
from webssl_jax.data.converter.plan import find_files

_ROWS = 16  # decoded at once
_BUFFER = 1 << 20
_DAMAGED = "damaged parquet file: rows are lost"


@dataclasses.dataclass(frozen=True)
class Columns:
    """Names of columns; every file must have those that are named."""

    image: str = "image"
    captions: tuple[str, ...] = ()
    key: str | None = None
    label: str | None = None
    annotations: Wanted = ()

    def names(self) -> list[str]:
        named = (self.image, *self.captions, self.key, self.label)
        return list(dict.fromkeys(n for n in (*named, *dict(self.annotations).values()) if n))


@dataclasses.dataclass(frozen=True)
class ParquetReader:
    """Reads the row groups that :func:`list_parquet` found. See ``items.Reader``.

    ``image_root`` is the folder that paths in the image column are relative to; what lies outside
    is not read.
    """

    root: str
    source: str
    columns: Columns
    image_root: str

    def read(self, unit: Unit, advance: Callable[[int], None] = no_progress) -> Iterator[Item]:
        name = key_of(unit["path"])
        if "note" in unit:
            yield Note(name, unit["note"])
            return
        done, problem = 0, "fewer rows than the file's end promises"
        batches = _batches(Path(self.root) / unit["path"], unit["group"], self.columns)
        try:
            for rows, is_path, class_names in batches:
                for row in rows:
                    key = f"{os.path.splitext(name)[0]}/{unit['first'] + done:08d}"
                    done += 1
                    yield self._item(row, key, is_path, class_names)
                advance(len(rows))
        except _DamageError as error:
            problem = str(error)
        if done < unit["size"]:
            where = f"{name}, row group {unit['group']}, {unit['size'] - done:,} rows"
            yield Note(f"{where}: {' '.join(problem.split())[:200]}", _DAMAGED)

    def _item(self, row: dict[str, Any], key: str, is_path: bool, class_names: list[str]) -> Item:
        columns = self.columns
        if columns.key and row[columns.key] is not None:
            key = text_of(_text(row[columns.key]))[0] or key
        data, path = row[columns.image], None
        if isinstance(data, dict):
            data, path = data["bytes"], data.get("path")
        elif is_path:
            data, path = None, data
        if data is None:
            if not isinstance(path, bytes):
                return Dropped(key, "no image in the row")
            data, problem = self._file(os.fsdecode(path))
            if problem:
                return Dropped(key, problem)
        texts: list[str | bytes] = []
        for column in columns.captions:
            found = row[column] if isinstance(row[column], list) else [row[column]]
            texts += [_text(value) for value in found if value is not None]
        captions, notes = clean_captions(texts)
        label = row[columns.label] if columns.label else None
        if isinstance(label, int) and 0 <= label < len(class_names):
            label = class_names[label]
        label = None if label is None else text_of(_text(label))[0] or None
        found = {name: self._annotation(row[column]) for name, column in columns.annotations}
        return Candidate(key, data, captions, label, notes, found)

    def _annotation(self, value: Any) -> bytes | str:
        """A value's bytes, or what is wrong with it."""
        if isinstance(value, dict) and {"bytes"} <= set(value) <= {"bytes", "path"}:
            if value["bytes"] is None and isinstance(value.get("path"), bytes):
                data, problem = self._file(os.fsdecode(value["path"]))
                return data or problem
            value = value["bytes"]
        if value is None:
            return MISSING
        try:
            return value if isinstance(value, bytes) else encode_json(_with_text(value))
        except (AnnotationError, UnicodeDecodeError) as error:
            return str(error)

    def _file(self, path: str) -> tuple[bytes, str]:
        if "\0" in path:
            return b"", "unreadable"
        full = Path(os.path.realpath(os.path.join(self.image_root, path)))
        if not full.is_relative_to(os.path.realpath(self.image_root)):
            return b"", "path that leaves the image folder"
        return read_file(full)


def list_parquet(patterns: list[str], columns: Columns) -> tuple[Path, list[Unit]]:
    """The row groups of the files that match, by path: their common folder, and units whose size is
    in rows. A file that cannot be opened is noted.

    Raises:
      UserError: as :func:`plan.find_files`; if a file lacks a column, or the image column holds no
        images; if no file can be opened.
    """
    root, paths = find_files(patterns, "parquet files")
    units: list[Unit] = []
    damage = ""
    for path in paths:
        try:
            with _open(root / path) as file:
                schema = file.schema_arrow
                sizes = [
                    file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)
                ]
                fields = {name: schema.field(name).type for name in schema.names}
        except Exception as error:  # as in ``_batches``
            damage = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            units.append({"path": path, "note": "damaged parquet file: cannot be opened"})
            continue
        for name in columns.names():
            if name not in fields:
                raise UserError(
                    f"--input {root / path}: no column {name!r}; {suggest(name, fields)}"
                )
        if _image_kind(fields[columns.image]) is None:
            raise UserError(
                f"--image-column {columns.image}: holds {fields[columns.image]} in {root / path}; "
                "images are binary, paths (string), or a struct of bytes and path"
            )
        first = 0
        for group, rows in enumerate(sizes):
            units.append({"path": path, "group": group, "first": first, "size": max(rows, 0)})
            first += max(rows, 0)
    if all("note" in unit for unit in units):
        raise UserError(
            f"--input {root / paths[0]}: cannot be read as parquet: {damage or 'empty'}"
        )
    return root, units


def _text(value: Any) -> str | bytes:
    return value if isinstance(value, str | bytes) else str(value)


def _with_text(value: Any) -> Any:
    """Text, which :func:`_plain` left as bytes, as str.

    Raises: UnicodeDecodeError where it is none.
    """
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, dict):
        return {name: _with_text(one) for name, one in value.items()}
    return [_with_text(one) for one in value] if isinstance(value, list) else value


def _open(path: Path) -> pq.ParquetFile:
    # Without pre-buffering a row group is read page by page instead of as a whole.
    return pq.ParquetFile(
        path, buffer_size=_BUFFER, pre_buffer=False, page_checksum_verification=True
    )


def _image_kind(kind: pa.DataType) -> str | None:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if _is_text(kind):
        return "path"
    if pa.types.is_struct(kind):
        fields = {field.name: _image_kind(field.type) for field in kind}
        return "struct" if fields.get("bytes") == "bytes" else None
    is_bytes = pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
    return "bytes" if is_bytes or pa.types.is_fixed_size_binary(kind) else None


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _class_names(schema: pa.Schema, label: str | None) -> list[str]:
    """Names of the label's integers, if ``datasets`` wrote them into the schema."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return [str(name) for name in features[label]["names"]]
    except (KeyError, TypeError, ValueError, RecursionError):
        return []


class _DamageError(Exception):
    """What pyarrow said of a file."""


def _batches(
    path: Path, group: int, columns: Columns
) -> Iterator[tuple[list[dict[str, Any]], bool, list[str]]]:
    """Rows of a row group, whether their images are paths, and the labels' class names.

    Raises: _DamageError, and nothing else: an error in what is done with the rows is no damage.
    """
    names = columns.names()
    try:
        with _open(path) as file:
            is_path = _image_kind(file.schema_arrow.field(columns.image).type) == "path"
            class_names = _class_names(file.schema_arrow, columns.label)
            for batch in file.iter_batches(
                _ROWS, row_groups=[group], columns=names, use_threads=False
            ):
                values = [_plain(batch.column(name)) for name in names]
                rows = [dict(zip(names, row, strict=True)) for row in zip(*values, strict=True)]
                yield rows, is_path, class_names
    except Exception as error:  # pyarrow raises nearly every type there is on hostile bytes
        raise _DamageError(f"{type(error).__name__}: {error}") from error


def _plain(array: pa.Array) -> list[Any]:
    """Python values, but text as bytes: one that is not UTF-8 must not stop the rows beside it."""
    kind = array.type
    if pa.types.is_dictionary(kind):
        return _plain(array.dictionary_decode())
    if _is_text(kind):
        return array.cast(pa.large_binary()).to_pylist()
    if pa.types.is_struct(kind):
        fields = [_plain(field) for field in array.flatten()]
        names = [field.name for field in kind]
        rows = (dict(zip(names, row, strict=True)) for row in zip(*fields, strict=True))
        there = array.is_valid().to_pylist()
        return [row if valid else None for row, valid in zip(rows, there, strict=True)]
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        values = iter(_plain(array.flatten()))
        lengths = array.value_lengths().to_pylist()
        return [None if n is None else [next(values) for _ in range(n)] for n in lengths]
    return array.to_pylist()
