"""PyTorch's checkpoint files (``.pth``, ``.pt``, ``.bin``) without PyTorch, and without running
anything that lies in them.

Since PyTorch 1.6 such a file is a zip archive, nothing compressed: ``NAME/data.pkl``, a pickle that
describes the objects, and one member ``NAME/data/KEY`` a storage, the numbers. Reading walks the
pickle's instructions (``pickletools`` lists them without executing any) on a stack of our own that
knows dicts, lists, numbers, words and tensors. It builds no object of any class and calls nothing.
What stands beside the tensors (flags, paths, numbers of NumPy: ``plain_values.py``) becomes an
empty thing; whatever else is named is refused by its name. Tensors are read when they are asked
for; the archive's CRC-32 of each storage is checked before its first use.

Writing makes the same kind of file, one tensor at a time.
"""

from __future__ import annotations

import io
import math
import os
import pathlib
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from webssl_jax.weights import plain_values, safetensors_io
from webssl_jax.weights.stored import Stored, WeightsError, shown

_MAX_PICKLE_BYTES = 32_000_000  # of a 5B model with its optimiser state: under 1 MB
_STORAGES = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}
_ORDERED_DICT = "collections.OrderedDict"
_TENSOR = "torch._utils._rebuild_tensor_v2"
_PARAMETER = "torch._utils._rebuild_parameter"
_KNOWN = {_ORDERED_DICT, _TENSOR, _PARAMETER} | {f"torch.{s}" for s in _STORAGES}
_ZIP, _LEGACY = b"PK\x03\x04", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_WRITTEN = {np.dtype(np.float32): "FloatStorage", np.dtype(ml_dtypes.bfloat16): "BFloat16Storage"}


class _Global(str):
    """The name of a function or class; never the thing itself."""


class _Inert:
    """Stands for a value whose contents nobody needs."""


def open_file(path: str | os.PathLike) -> dict[Any, Any]:
    """The checkpoint's outermost dict: dicts, lists and plain values, with a
    :class:`~webssl_jax.weights.stored.Stored` for every tensor.

    Raises:
      WeightsError: if the file is no such checkpoint, is damaged, of PyTorch before 1.6, or names
        anything but weights; one line.
    """
    path = pathlib.Path(path)
    try:
        with open(path, "rb") as file:
            start = file.read(len(_LEGACY))
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror})") from None
    if start == _LEGACY or (start[:1] == b"\x80" and start[1:2] <= b"\x05"):
        raise WeightsError(
            f"{path}: is a file of PyTorch before 1.6, or a bare pickle; convert it where PyTorch "
            "is: torch.save(torch.load(OLD, map_location='cpu', weights_only=True), NEW)"
        )
    if start[: len(_ZIP)] != _ZIP:
        raise WeightsError(f"{path}: is not a PyTorch checkpoint ({path.stat().st_size} bytes)")
    try:
        archive = _Archive(path)
        checkpoint = _Machine(archive).run(archive.pickle)
    except WeightsError:
        raise
    except MemoryError:
        raise WeightsError(f"{path}: asks for more memory than there is") from None
    except RecursionError:
        raise WeightsError(f"{path}: its description is nested too deeply") from None
    except (
        zipfile.BadZipFile,
        NotImplementedError,  # zipfile's word for versions and methods it does not know
        ValueError,
        TypeError,
        LookupError,
        ArithmeticError,
        EOFError,
        RuntimeError,
        struct.error,
        zlib.error,
    ) as error:
        reason = shown(str(error) or type(error).__name__)
        raise WeightsError(f"{path}: is damaged, or no PyTorch checkpoint ({reason})") from None
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror})") from None
    if not isinstance(checkpoint, dict):
        kind = type(checkpoint).__name__.lstrip("_").lower()
        raise WeightsError(f"{path}: holds no dict of tensors, but one {kind}")
    return checkpoint


class _Archive:
    """The zip: the pickle's bytes, and storages by key."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        self._sound: set[str] = set()
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            names = [m.filename for m in members]
            if any(n.endswith("constants.pkl") for n in names) and any("code/" in n for n in names):
                raise WeightsError(
                    f"{path}: is a TorchScript archive (a program, as OpenAI's CLIP files are); "
                    "save its weights where PyTorch is: torch.save(torch.jit.load("
                    f"{path.name!r}, map_location='cpu').state_dict(), NEW)"
                )
            if len(set(names)) != len(names):
                raise WeightsError(f"{path}: two members have one name")
            pickles = [n for n in names if n == "data.pkl" or n.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise WeightsError(f"{path}: is a zip archive, but no PyTorch checkpoint in it")
            self._prefix = pickles[0].removesuffix("data.pkl")
            for member in members:
                if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
                    raise WeightsError(
                        f"{path}: {shown(member.filename)} is compressed or encrypted, which "
                        "PyTorch never does"
                    )
            self._members = dict(zip(names, members))
            if self._members[pickles[0]].file_size > _MAX_PICKLE_BYTES:
                raise WeightsError(f"{path}: its description is too large to be one of weights")
            self.pickle = archive.read(pickles[0])  # checks the CRC
            order = self._members.get(f"{self._prefix}byteorder")
            if order is not None and archive.read(order)[:6] != b"little":
                raise WeightsError(f"{path}: was written on a big-endian machine; not supported")

    def storage(self, key: str, dtype: np.dtype, numbers: int) -> tuple[int, str]:
        """(offset in the file, member) of a storage that holds ``numbers`` numbers."""
        name = f"{self._prefix}data/{key}"
        member = self._members.get(name)
        if member is None:
            raise WeightsError(f"{self.path}: {shown(name)} is missing from it")
        if not member.file_size == member.compress_size == numbers * dtype.itemsize:
            raise WeightsError(
                f"{self.path}: {shown(name)} has {member.file_size} bytes where "
                f"{numbers} numbers of {dtype} are promised"
            )
        with open(self.path, "rb") as file:
            file.seek(member.header_offset)
            header = file.read(30)
            if len(header) != 30 or header[:4] != _ZIP:
                raise WeightsError(f"{self.path}: {shown(name)} is not where it should be")
            name_length, extra = struct.unpack("<HH", header[26:])
            if file.read(name_length) != member.orig_filename.encode():
                raise WeightsError(f"{self.path}: {shown(name)} is not where it should be")
        offset = member.header_offset + 30 + name_length + extra
        if offset + member.file_size > self.path.stat().st_size:
            raise WeightsError(f"{self.path}: is cut short at {shown(name)}")
        return offset, name

    def check(self, name: str, offset: int) -> None:
        """Compares a storage with its checksum, once."""
        if name in self._sound:
            return
        member = self._members[name]
        crc, left = 0, member.file_size
        with open(self.path, "rb") as file:
            file.seek(offset)
            while left:
                data = file.read(min(left, 1 << 22))
                if not data:
                    raise WeightsError(f"{self.path}: has become shorter while it was read")
                crc, left = zlib.crc32(data, crc), left - len(data)
        if crc != member.CRC:
            raise WeightsError(
                f"{self.path}: {shown(name)} does not have its checksum (CRC-32): the file is "
                "damaged, or was saved with torch.serialization.set_crc32_options(False)"
            )
        self._sound.add(name)


class _Machine:
    """Walks a pickle's instructions."""

    def __init__(self, archive: _Archive):
        self._archive = archive
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def run(self, data: bytes) -> Any:
        stream = io.BytesIO(data)
        for opcode, argument, _ in pickletools.genops(stream):
            name = opcode.name
            if name == "STOP":
                if len(self._stack) != 1 or self._marks:
                    raise ValueError("the pickle ends too early")
                return self._stack.pop()
            if name in _PUSH:
                self._stack.append(_PUSH[name] if argument is None else argument)
            else:
                action = getattr(self, f"_{name.lower()}", None)
                if action is None:
                    raise self._refuse(f"the pickle instruction {name}")
                action(argument)
        raise ValueError("the pickle has no end")

    def _refuse(self, what: str) -> WeightsError:
        return WeightsError(
            f"{self._archive.path}: holds {what}, which is no part of weights; nothing of it was "
            "run; if you trust the file, save its state dict alone with PyTorch"
        )

    def _pop(self) -> Any:
        if len(self._stack) <= (self._marks[-1] if self._marks else 0):
            raise ValueError("the pickle takes more than there is")
        return self._stack.pop()

    def _top(self, kind: type | tuple[type, ...]) -> Any:
        value = self._pop()
        self._stack.append(value)
        if not isinstance(value, kind):
            raise ValueError("the pickle changes what is no container")
        return value

    def _since_mark(self) -> list[Any]:
        mark = self._marks.pop()
        items = self._stack[mark:]
        del self._stack[mark:]
        return items

    # One method an instruction; those that only push a value stand in _PUSH.

    def _proto(self, version: int) -> None:
        pass

    def _frame(self, size: int) -> None:
        pass

    def _mark(self, _: None) -> None:
        self._marks.append(len(self._stack))

    def _empty_dict(self, _: None) -> None:
        self._stack.append({})

    def _empty_list(self, _: None) -> None:
        self._stack.append([])

    def _tuple(self, _: None) -> None:
        self._stack.append(tuple(self._since_mark()))

    def _tuple1(self, _: None) -> None:
        self._stack.append((self._pop(),))

    def _tuple2(self, _: None) -> None:
        second = self._pop()
        self._stack.append((self._pop(), second))

    def _tuple3(self, _: None) -> None:
        third, second = self._pop(), self._pop()
        self._stack.append((self._pop(), second, third))

    def _append(self, _: None) -> None:
        value = self._pop()
        if isinstance(items := self._top((list, _Inert)), list):
            items.append(value)

    def _appends(self, _: None) -> None:
        values = self._since_mark()
        if isinstance(items := self._top((list, _Inert)), list):
            items.extend(values)

    def _setitem(self, _: None) -> None:
        value, key = self._pop(), self._pop()
        if isinstance(items := self._top((dict, _Inert)), dict):
            items[key] = value

    def _setitems(self, _: None) -> None:
        items = self._since_mark()
        if len(items) % 2:
            raise ValueError("a key without a value")
        if isinstance(into := self._top((dict, _Inert)), dict):
            into.update(zip(items[::2], items[1::2]))

    def _binput(self, place: int) -> None:
        self._memo[place] = self._top(object)

    _long_binput = _put = _binput

    def _memoize(self, _: None) -> None:
        self._memo[len(self._memo)] = self._top(object)

    def _binget(self, place: int) -> None:
        self._stack.append(self._memo[place])

    _long_binget = _get = _binget

    def _global(self, name: str) -> None:
        module, _, attribute = name.partition(" ")
        self._push_global(module, attribute)

    def _stack_global(self, _: None) -> None:
        attribute, module = self._pop(), self._pop()
        self._push_global(module, attribute)

    def _push_global(self, module: Any, attribute: Any) -> None:
        name = f"{module}.{attribute}"
        if name not in _KNOWN and not plain_values.is_known(name):
            raise self._refuse(shown(name))
        self._stack.append(_Global(name))

    def _binpersid(self, _: None) -> None:
        kind, storage, key, _device, numbers = self._pop()
        name = storage.removeprefix("torch.") if isinstance(storage, _Global) else None
        if kind != "storage" or name not in _STORAGES or type(numbers) is not int or numbers < 0:
            raise ValueError("a storage that is not described as one")
        if not isinstance(key, str):
            raise ValueError("a storage without a name")
        self._stack.append(_Storage(self._archive, key, _STORAGES[name], numbers))

    def _reduce(self, _: None) -> None:
        arguments, function = self._pop(), self._pop()
        if not isinstance(function, _Global) or not isinstance(arguments, tuple):
            raise ValueError("a call of what is no function")
        if function == _ORDERED_DICT and not arguments:
            self._stack.append({})
        elif function == _TENSOR:
            self._stack.append(_tensor(*arguments[:4]))
        elif function == _PARAMETER and arguments and isinstance(arguments[0], Stored):
            self._stack.append(arguments[0])
        elif plain_values.CALLED.fullmatch(function):
            self._stack.append(_Inert())
        else:
            raise self._refuse(f"a call of {function}")

    def _newobj(self, _: None) -> None:
        arguments, kind = self._pop(), self._pop()
        plain = isinstance(kind, _Global) and plain_values.OBJECTS.fullmatch(kind)
        if not plain or arguments != ():
            raise self._refuse(f"an object of {shown(kind)}")
        self._stack.append(_Inert())

    def _build(self, _: None) -> None:
        self._pop()  # the attributes: of a state dict its _metadata, of flags their values
        self._top((dict, _Inert))


_PUSH: dict[str, Any] = dict(
    NONE=None,
    NEWTRUE=True,
    NEWFALSE=False,
    EMPTY_TUPLE=(),
    # these bring their value with them
    **dict.fromkeys(
        (
            *("BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
            *("STRING", "BINSTRING", "SHORT_BINSTRING"),
            *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
            *("SHORT_BINBYTES", "BINBYTES", "BINBYTES8"),
        )
    ),
)


class _Storage:
    """A storage that was named; looked up when a tensor wants it."""

    def __init__(self, archive: _Archive, key: str, dtype: np.dtype, numbers: int):
        self.archive, self.dtype, self.numbers = archive, dtype, numbers
        self.offset, self.member = archive.storage(key, dtype, numbers)


def _tensor(storage: Any, first: Any, shape: Any, strides: Any) -> Stored:
    """A view into a storage, which must lie within it."""
    if not isinstance(storage, _Storage):
        raise ValueError("a tensor without a storage")
    for numbers in ((first,), shape, strides):
        if not isinstance(numbers, tuple) or any(type(n) is not int or n < 0 for n in numbers):
            raise ValueError("a tensor whose shape is no shape")
    if len(shape) != len(strides) or len(shape) > 8:
        raise ValueError("a tensor whose shape and strides differ in length")
    last = first + sum((n - 1) * s for n, s in zip(shape, strides))
    if 0 not in shape and last >= storage.numbers:
        raise ValueError("a tensor that is larger than its storage")
    dense = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    in_order = all(s == d for n, s, d in zip(shape, strides, dense) if n != 1)
    # Overlapping views would let a small file claim any size.
    if not in_order and math.prod(shape) > storage.numbers:
        raise ValueError("a tensor that is larger than its storage")
    archive, member, offset = storage.archive, storage.member, storage.offset
    return Stored(
        archive.path,
        storage.dtype,
        shape,
        offset + first * storage.dtype.itemsize,
        None if in_order else strides,
        lambda: archive.check(member, offset),
    )


def write_file(
    path: pathlib.Path,
    key: str | None,
    specs: Sequence[safetensors_io.Spec],
    tensors: Iterable[tuple[str, np.ndarray]],
    extra: Mapping[str, Mapping[str, int | float | str]],
) -> None:
    """Writes ``{key: {name: tensor, ...}, **extra}`` as ``torch.save`` does, one tensor at a time;
    ``{name: tensor, ...}`` alone when ``key`` is None.

    specs: every tensor, in the order in which ``tensors`` yields them.

    Raises:
      ValueError: for ``extra`` without a ``key``: tensors alone have no place for it.
      WeightsError: if it cannot be written; nothing is then left under the name.
    """
    if extra and key is None:
        raise ValueError(f"no place for {', '.join(extra)} beside tensors that stand under no key")
    prefix = path.stem

    def write(file: BinaryIO) -> None:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            _write_member(archive, file, f"{prefix}/data.pkl", [_pickle(key, specs, extra)])
            _write_member(archive, file, f"{prefix}/byteorder", [b"little"])
            for i, array in enumerate(safetensors_io.in_order(specs, tensors)):
                _write_member(archive, file, f"{prefix}/data/{i}", [array])
            _write_member(archive, file, f"{prefix}/version", [b"3\n"])

    safetensors_io.write_atomically(path, write)


def _write_member(archive: zipfile.ZipFile, file: BinaryIO, name: str, parts: list[Any]) -> None:
    member = zipfile.ZipInfo(name)
    # Data start at a multiple of 64 bytes, as PyTorch's own do, so that it can map them. zipfile
    # puts 20 bytes of its own (zip64 sizes) before the padding.
    begin = file.tell() + 30 + len(name) + 20 + 4
    padding = -begin % 64
    member.extra = struct.pack("<HH", 0x4246, padding) + b"Z" * padding
    with archive.open(member, "w", force_zip64=True) as out:
        for part in parts:
            out.write(part)


def _pickle(
    key: str | None,
    specs: Sequence[safetensors_io.Spec],
    extra: Mapping[str, Mapping[str, int | float | str]],
) -> bytes:
    """The description, pickle protocol 2."""

    def word(text: str) -> bytes:
        data = text.encode()
        return b"X" + struct.pack("<I", len(data)) + data

    def number(n: int) -> bytes:
        if 0 <= n < 2**31:
            return b"J" + struct.pack("<i", n)
        data = n.to_bytes(n.bit_length() // 8 + 1, "little", signed=True)
        return b"\x8a" + bytes([len(data)]) + data

    def numbers(values: Sequence[int]) -> bytes:
        return b"(" + b"".join(map(number, values)) + b"t"

    def plain(value: int | float | str) -> bytes:
        if isinstance(value, bool):
            return b"\x88" if value else b"\x89"
        if isinstance(value, int):
            return number(value)
        return word(value) if isinstance(value, str) else b"G" + struct.pack(">d", value)

    ordered_dict = b"ccollections\nOrderedDict\n)R"
    out = [b"\x80\x02"] + ([] if key is None else [b"}(", word(key)]) + [ordered_dict, b"("]
    for i, spec in enumerate(specs):
        shape = spec.shape
        strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
        storage = _WRITTEN[safetensors_io.DTYPES[spec.dtype]]
        out += [word(spec.name), b"ctorch._utils\n_rebuild_tensor_v2\n(("]
        out += [word("storage"), f"ctorch\n{storage}\n".encode(), word(str(i)), word("cpu")]
        out += [number(math.prod(shape)), b"tQ", number(0), numbers(shape), numbers(strides)]
        out += [b"\x89", ordered_dict, b"tR"]
    out.append(b"u")
    if key is None:
        return b"".join([*out, b"."])
    for name, values in extra.items():
        out += [word(name), b"}("]
        for field, value in values.items():
            out += [word(field), plain(value)]
        out.append(b"u")
    return b"".join([*out, b"u."])
