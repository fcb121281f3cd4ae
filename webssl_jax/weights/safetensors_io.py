"""Safetensors files, written and read one tensor at a time.

Format (github.com/huggingface/safetensors): eight bytes little-endian length of the header; the
header, JSON ``{name: {"dtype", "shape", "data_offsets": [begin, end]}}`` with offsets counted from
its end; then the tensors, little-endian, C order, without gaps. The official writer wants all
tensors in memory at once; this one takes them from an iterator, so that a model larger than the
memory of the machine passes through. Large models are cut into several files with an index beside
them, named as ``transformers`` names them.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from webssl_jax.weights.stored import Stored, WeightsError, shown

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_FILE_BYTES = 5_000_000_000
_MAX_HEADER_BYTES = 10_000_000  # the header of a 5B model has 0.1 MB; parsed, one grows tenfold
_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


class Spec(NamedTuple):
    """A tensor to be written: name, shape, and the type it is cast to, one of ``DTYPES``."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def write_folder(
    folder: pathlib.Path,
    specs: Sequence[Spec],
    tensors: Iterable[tuple[str, np.ndarray]],
    max_file_bytes: int = MAX_FILE_BYTES,
) -> list[pathlib.Path]:
    """Writes ``model.safetensors``, or over ``max_file_bytes`` numbered files and their index.

    Args:
      specs: every tensor, in the order in which ``tensors`` yields them.

    Returns:
      The files, in the order of writing.

    Raises:
      WeightsError: if the folder cannot be written (a full disk, for one). No file is then left
        half written.
    """
    groups: list[list[Spec]] = [[]]
    filled = 0
    for spec in specs:
        if groups[-1] and filled + spec.num_bytes > max_file_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(spec)
        filled += spec.num_bytes
    if len(groups) == 1:
        write_file(folder / SINGLE_FILE, specs, tensors)
        return [folder / SINGLE_FILE]
    source = iter(tensors)
    files = []
    where: dict[str, str] = {}
    for i, group in enumerate(groups):
        file = folder / f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors"
        # zip takes from the left first, so it never draws a tensor that belongs to the next file.
        write_file(file, group, (tensor for _, tensor in zip(group, source, strict=False)))
        files.append(file)
        where |= {spec.name: file.name for spec in group}
    index = {
        "metadata": {"total_size": sum(spec.num_bytes for spec in specs)},
        "weight_map": dict(sorted(where.items())),
    }
    write_text(folder / INDEX_FILE, json.dumps(index, indent=2) + "\n")
    return [*files, folder / INDEX_FILE]


def write_file(
    path: pathlib.Path, specs: Sequence[Spec], tensors: Iterable[tuple[str, np.ndarray]]
) -> None:
    """Writes one safetensors file under another name, and renames it when it is whole and on disk.

    Raises:
      WeightsError: if it cannot be written; nothing is then left under either name.
      ValueError: if ``tensors`` does not yield what ``specs`` promises.
    """
    # transformers refuses a file without a format.
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for spec in specs:
        begin, end = end, end + spec.num_bytes
        header[spec.name] = {
            "dtype": _NAMES[DTYPES[spec.dtype]],
            "shape": list(spec.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors start aligned

    def write(file: BinaryIO) -> None:
        file.write(struct.pack("<Q", len(text)) + text)
        for data in in_order(specs, tensors):
            file.write(data)

    write_atomically(path, write)


def in_order(
    specs: Sequence[Spec], tensors: Iterable[tuple[str, np.ndarray]]
) -> Iterator[memoryview]:
    """The bytes of each tensor, C order, in the type its spec names.

    Raises:
      WeightsError: if a value is beyond the range of that type.
      ValueError: if ``tensors`` does not yield what ``specs`` promises.
    """
    source = iter(tensors)
    for spec in specs:
        name, array = next(source, (None, np.empty(0)))
        if name != spec.name or array.shape != spec.shape:
            raise ValueError(f"expected tensor {spec.name} {spec.shape}, got {name} {array.shape}")
        array = np.ascontiguousarray(array, dtype=DTYPES[spec.dtype])
        # float32 has values that round to infinity in bfloat16
        if spec.dtype != "float32" and not np.isfinite(array).all():
            raise WeightsError(f"{name} has values too large for {spec.dtype}; use float32")
        yield array.reshape(-1).view(np.uint8).data


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a small text file the same way. Raises WeightsError as :func:`write_file`."""
    write_atomically(path, lambda file: file.write(text.encode()))


def write_atomically(path: pathlib.Path, write: Callable[[BinaryIO], object]) -> None:
    """Calls ``write`` with a binary file that takes the name ``path`` when it is whole and on disk.

    Raises:
      WeightsError: if it cannot be written; nothing is then left under either name.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise WeightsError(
            f"cannot write {path}: {error.strerror or error}; nothing was left half written"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)


def open_file(path: str | os.PathLike) -> dict[str, Stored]:
    """The tensors of a safetensors file, of an index, or of a folder with one of them. Reads the
    headers only.

    Raises:
      WeightsError: if there is no such file, it is not a whole safetensors file, or an index and
        its files disagree.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        index = path / INDEX_FILE
        path = (
            index if index.is_file() and not (path / SINGLE_FILE).is_file() else path / SINGLE_FILE
        )
    if path.name.endswith(".json"):
        return _indexed(path)
    return _read_header(path)


def _indexed(index: pathlib.Path) -> dict[str, Stored]:
    where = parse_json(index).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
        raise WeightsError(f"{index}: is not an index of safetensors files")
    names = sorted(set(where.values()))
    if any(pathlib.PurePath(name).name != name for name in names):
        raise WeightsError(f"{index}: names files outside its folder")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise WeightsError(
            f"{index.parent}: the index names files that are not there: "
            f"{', '.join(map(shown, missing[:6]))}"
        )
    tensors: dict[str, Stored] = {}
    for name in names:
        for key, stored in _read_header(index.parent / name).items():
            if where.get(key) != name:
                raise WeightsError(
                    f"{index.parent / name}: holds {shown(key)}, the index says "
                    f"{shown(where.get(key, 'nothing of it'))}"
                )
            tensors[key] = stored
    lost = [key for key in where if key not in tensors]
    if lost:
        raise WeightsError(f"{index}: promises {shown(lost[0])}, which is in none of its files")
    return tensors


def parse_json(path: pathlib.Path, text: bytes | None = None) -> dict[str, Any]:
    """The object in a small JSON file (or in ``text``, a part of it).

    Raises:
      WeightsError: if it cannot be read, is larger than any header, is no object, or has one key
        twice.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) != len(pairs):
            raise ValueError("one key stands twice in it")
        return values

    try:
        if text is None:
            with open(path, "rb") as file:
                text = file.read(_MAX_HEADER_BYTES + 1)
            if len(text) > _MAX_HEADER_BYTES:
                raise ValueError("it is too large")
        values = json.loads(text, object_pairs_hook=once)
        if not isinstance(values, dict):
            raise ValueError("it is no object")
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path}: its JSON cannot be read ({shown(error)})") from None
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror})") from None
    return values


def _read_header(path: pathlib.Path) -> dict[str, Stored]:
    if not path.is_file():
        raise WeightsError(f"{path}: no such file")
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
            if not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
                raise WeightsError(
                    f"{path}: is not a safetensors file, or is cut short ({size} bytes)"
                )
            text = file.read(length)
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror})") from None
    rows = []
    for name, entry in parse_json(path, text).items():
        if name == "__metadata__":
            continue
        try:
            begin, end = entry["data_offsets"]
            dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
            if any(type(n) is not int or n < 0 for n in (begin, end, *shape)) or len(shape) > 8:
                raise ValueError("no shape")
            if end - begin != math.prod(shape) * dtype.itemsize:
                raise ValueError("no size")
        except (ValueError, KeyError, TypeError):
            raise WeightsError(
                f"{path}: the header makes no sense at tensor {shown(name)}"
            ) from None
        rows.append((begin, end, name, dtype, shape))
    position = 0
    for begin, end, name, _, _ in sorted(rows, key=lambda row: row[:3]):
        if begin != position:
            raise WeightsError(f"{path}: the header leaves a gap before tensor {shown(name)}")
        position = end
    if position != size - 8 - length:
        raise WeightsError(
            f"{path}: the header promises {position} bytes of tensors, the file has "
            f"{size - 8 - length}; it is cut short or was appended to"
        )
    return {
        name: Stored(path, dtype, shape, 8 + length + begin)
        for begin, _, name, dtype, shape in rows
    }
