"""Parquet files as input of the converter: images as bytes, as paths, or as Hugging Face writes
them (a struct of ``bytes`` and ``path``).

A unit is one row group; of it only some pages and rows are in memory. Class names of integer labels
are taken from the metadata that Hugging Face's ``datasets`` leaves in the schema. Of annotations,
bytes and text stay as they are, an image's struct becomes its file, and all else JSON. A column is
named by its path, ``a.b`` for the field ``b`` of an object, also of each in a list. The other
columns of texts, numbers and dates become the annotation ``meta``.
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
from webssl_jax.data.converter.fields import captions_of, key_of_value, label_of, plain
from webssl_jax.data.converter.folder_reader import key_of, read_file
from webssl_jax.data.converter.items import (
    EMPTY,
    MISSING,
    Candidate,
    Dropped,
    Item,
    Note,
    Unit,
    Wanted,
    metadata_of,
    no_progress,
)
from webssl_jax.data.converter.plan import find_files, stamp

_ROWS = 16  # decoded at once
_BUFFER = 1 << 20
_DAMAGED = "damaged parquet file: rows are lost"


@dataclasses.dataclass(frozen=True)
class Columns:
    """Paths of columns; every file must have those that are named. ``metadata``: also take what
    else there is, see above."""

    image: str = "image"
    captions: tuple[str, ...] = ()
    key: str | None = None
    label: str | None = None
    annotations: Wanted = ()
    metadata: bool = True

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
        if columns.key:
            key = key_of_value(_value(row, columns.key)) or key
        data, path = _value(row, columns.image), None
        while isinstance(data, list) and len(data) == 1:
            data = data[0]
        if isinstance(data, list) and data:
            return Dropped(key, "several images in the row")
        if isinstance(data, dict):
            data, path = data["bytes"], data.get("path")
        elif is_path:
            data, path = None, data
        if not isinstance(data, bytes):
            if not isinstance(path, bytes):
                return Dropped(key, "no image in the row")
            data, problem = self._file(os.fsdecode(path))
            if problem:
                return Dropped(key, problem)
        captions, notes = captions_of([_value(row, column) for column in columns.captions])
        label, more = label_of(_value(row, columns.label) if columns.label else None, class_names)
        found = {name: self._annotation(_value(row, at)) for name, at in columns.annotations}
        if columns.metadata:
            used = {n if n in row else n.split(".")[0] for n in columns.names()}
            rest = {name: _plain_text(one) for name, one in row.items() if name not in used}
            found |= metadata_of(rest, found)
        return Candidate(key, data, captions, label, notes + more, found)

    def _annotation(self, value: Any) -> bytes | str:
        """A value's bytes, or what is wrong with it."""
        if isinstance(value, dict) and {"bytes"} <= set(value) <= {"bytes", "path"}:
            if value["bytes"] is None and isinstance(value.get("path"), bytes):
                data, problem = self._file(os.fsdecode(value["path"]))
                return data or problem
            value = value["bytes"]
        if plain(value) is None:
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
        except Exception as error:  # as in ``_batches``
            damage = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            units.append({"path": path, "note": "damaged parquet file: cannot be opened"})
            continue
        _check_columns(columns, schema, root / path)
        if not sum(sizes):
            units.append({"path": path, "note": f"{EMPTY} parquet file: no row in it"})
            continue
        first, marks = 0, stamp(root / path)
        for group, rows in enumerate(sizes):
            size = max(rows, 0)
            units.append({"path": path, "group": group, "first": first, "size": size, **marks})
            first += size
    if all("note" in unit for unit in units):
        raise UserError(
            f"--input {root / paths[0]}: cannot be read as parquet: {damage or 'empty'}"
        )
    return root, units


def _check_columns(columns: Columns, schema: pa.Schema, file: Path) -> None:
    """Raises UserError if a column is missing, or holds what it cannot be taken for."""
    for name in columns.names():
        if _type_of(schema, name) is None:
            raise UserError(f"--input {file}: no column {name!r}; {suggest(name, schema.names)}")
    kind = _type_of(schema, columns.image)
    if _image_kind(_item(kind)) is None:
        raise UserError(
            f"--image-column {columns.image}: holds {kind} in {file}; "
            "images are binary, paths (string), or a struct of bytes and path"
        )
    flags = [("caption", name) for name in columns.captions]
    flags += [("key", columns.key or ""), ("label", columns.label or "")]
    for flag, name in flags:
        kind = _item(_type_of(schema, name)) if name else None
        if kind is not None and pa.types.is_struct(kind):
            fields = " or ".join(f"{name}.{field.name}" for field in kind)
            raise UserError(
                f"--{flag}-column {name}: holds objects in {file}; name a field of it: {fields}"
            )


def _item(kind: Any) -> Any:
    """What lies in a list of lists of it; itself if it is none."""
    while kind is not None and _is_list(kind):
        kind = kind.value_type
    return kind


def _type_of(schema: pa.Schema, path: str) -> pa.DataType | None:
    """The type of a column or of a field in it; None if there is none."""
    names = [path] if path in schema.names else path.split(".")
    fields: Any = {name: schema.field(name).type for name in schema.names}
    kind = None
    for name in names:
        kind = fields.get(name)
        if kind is None:
            return None
        inner = _item(kind)
        fields = {one.name: one.type for one in inner} if pa.types.is_struct(inner) else {}
    return kind


def _value(row: Any, path: str) -> Any:
    """The value at a column's path; of objects in a list, a list."""
    if isinstance(row, list):
        return [_value(one, path) for one in row]
    if row is None or path in row:
        return None if row is None else row[path]
    name, _, rest = path.partition(".")
    return _value(row[name], rest)


def _plain_text(value: Any) -> Any:
    """A value of ``meta``: numbers as they are, dates and the like as text."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return value if value is None or isinstance(value, bool | int | float) else str(value)


def _is_metadata(kind: pa.DataType) -> bool:
    """Whether a column is taken for ``meta``: what is no list, object or bytes."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return _is_text(kind) or (pa.types.is_primitive(kind) or pa.types.is_decimal(kind))


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


def _image_kind(kind: pa.DataType | None) -> str | None:
    if kind is None:
        return None
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if _is_text(kind):
        return "path"
    if pa.types.is_struct(kind):
        fields = {field.name: _image_kind(field.type) for field in kind}
        return "struct" if fields.get("bytes") == "bytes" else None
    tests = (
        pa.types.is_binary,
        pa.types.is_large_binary,
        pa.types.is_binary_view,
        pa.types.is_fixed_size_binary,
    )
    return "bytes" if any(test(kind) for test in tests) else None


def _is_text(kind: pa.DataType) -> bool:
    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    return any(test(kind) for test in tests)


def _is_list(kind: pa.DataType) -> bool:
    tests = (
        pa.types.is_list,
        pa.types.is_large_list,
        pa.types.is_fixed_size_list,
        pa.types.is_list_view,
        pa.types.is_large_list_view,
    )
    return any(test(kind) for test in tests)


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
    try:
        with _open(path) as file:
            schema = file.schema_arrow
            is_path = _image_kind(_item(_type_of(schema, columns.image))) == "path"
            class_names = _class_names(schema, columns.label)
            named = [n if n in schema.names else n.split(".")[0] for n in columns.names()]
            if columns.metadata:
                named += [n for n in schema.names if _is_metadata(schema.field(n).type)]
            names = list(dict.fromkeys(named))
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
    if _is_list(kind):
        values = iter(_plain(array.flatten()))
        lengths = array.value_lengths().to_pylist()
        return [None if n is None else [next(values) for _ in range(n)] for n in lengths]
    return array.to_pylist()
