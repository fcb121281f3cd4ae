"""Safetensors files, written and read one tensor at a time.

Format (github.com/huggingface/safetensors): eight bytes little-endian length of the header; the
header, JSON ``{name: {"dtype", "shape", "data_offsets": [begin, end]}}`` with offsets counted from
its end; then the tensors, little-endian, C order, without gaps. The official writer wants all
tensors in memory at once; this one takes them from an iterator, so that a model larger than the
memory of the machine passes through. Large models are cut into several files with an index beside
them, named as ``transformers`` names them.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import struct
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import ml_dtypes
import numpy as np

from webssl_jax.weights.tables import WeightsError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_FILE_BYTES = 5_000_000_000
_MAX_HEADER_BYTES = 100_000_000  # as the official reader
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
    files, where = [], {}
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

    def write(file) -> None:
        file.write(struct.pack("<Q", len(text)) + text)
        source = iter(tensors)
        for spec in specs:
            name, array = next(source, (None, np.empty(0)))
            if name != spec.name or array.shape != spec.shape:
                raise ValueError(
                    f"expected tensor {spec.name} {spec.shape}, got {name} {array.shape}"
                )
            array = np.ascontiguousarray(array, dtype=DTYPES[spec.dtype])
            file.write(array.reshape(-1).view(np.uint8).data)

    _write_atomically(path, write)


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a small text file the same way. Raises WeightsError as :func:`write_file`."""
    _write_atomically(path, lambda file: file.write(text.encode()))


def _write_atomically(path: pathlib.Path, write) -> None:
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


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where a tensor lies: file, dtype, shape, and its first byte in the file."""

    file: pathlib.Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int


class Reader:
    """The tensors of a safetensors file, or of a folder with one file or an index. Call it with a
    name to read one."""

    def __init__(self, path: str | os.PathLike):
        """Reads the headers only.

        Raises:
          WeightsError: if there is no such file, or it is not a whole safetensors file.
        """
        path = pathlib.Path(path)
        files = [path]
        if path.is_dir():
            files = [path / SINGLE_FILE]
            if not files[0].is_file() and (path / INDEX_FILE).is_file():
                files = _indexed_files(path)
        self._tensors: dict[str, Stored] = {}
        for file in files:
            for name, stored in _read_header(file).items():
                if name in self._tensors:
                    raise WeightsError(
                        f"{file}: tensor {name} is also in {self._tensors[name].file.name}"
                    )
                self._tensors[name] = stored

    def keys(self) -> list[str]:
        """All names, in the files' order."""
        return list(self._tensors)

    def __call__(self, name: str) -> np.ndarray:
        """One tensor, in the dtype of the file (float32, bfloat16, ...), as a copy of its own."""
        stored = self._tensors[name]
        with open(stored.file, "rb") as file:
            file.seek(stored.offset)
            data = file.read(math.prod(stored.shape) * stored.dtype.itemsize)
        return np.frombuffer(data, stored.dtype).reshape(stored.shape)


def _indexed_files(folder: pathlib.Path) -> list[pathlib.Path]:
    try:
        names = sorted(set(json.loads((folder / INDEX_FILE).read_text())["weight_map"].values()))
        files = [folder / name for name in names]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise WeightsError(f"{folder / INDEX_FILE}: is not an index of safetensors files") from None
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise WeightsError(
            f"{folder}: the index names files that are not there: {', '.join(missing)}"
        )
    return files


def _read_header(path: pathlib.Path) -> dict[str, Stored]:
    if not path.is_file():
        raise WeightsError(f"{path}: no such file")
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
        if not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
            raise WeightsError(f"{path}: is not a safetensors file, or is cut short ({size} bytes)")
        text = file.read(length)
    try:
        header = json.loads(text)
        rows = sorted(
            (v["data_offsets"][0], v["data_offsets"][1], k, _DTYPES[v["dtype"]], tuple(v["shape"]))
            for k, v in header.items()
            if k != "__metadata__"
        )
        position = 0
        for begin, end, name, dtype, shape in rows:
            if (
                begin != position
                or end - begin != math.prod(shape) * dtype.itemsize
                or min(shape, default=0) < 0
            ):
                raise WeightsError(f"{path}: the header is inconsistent at tensor {name}")
            position = end
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise WeightsError(
            f"{path}: the safetensors header cannot be read ({type(error).__name__}: {error})"
        ) from None
    if position != size - 8 - length:
        raise WeightsError(
            f"{path}: the header promises {position} bytes of tensors, the file has "
            f"{size - 8 - length}; it is cut short or was appended to"
        )
    return {
        name: Stored(path, dtype, shape, 8 + length + begin)
        for begin, _, name, dtype, shape in rows
    }
