"""A tensor that still lies in a file: where it is, and how to read it or a share of it; and the
files that such tensors lie in."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from webssl_jax.config import UserError


class WeightsError(UserError):
    """Weights that do not fit, or cannot be read. The message names the file and the tensors."""


def shown(name: object) -> str:
    """A name out of a file as it can stand in a message: one line, not endless."""
    text = str(name)
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= 120 else f"{text[:100]}... ({len(text)} characters)"


def some(names: Sequence[object], limit: int = 6) -> str:
    """The first few of ``names``, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(map(shown, names[:limit])) + more


class TensorOfTheirs(Protocol):
    """What import needs of a tensor in a file; ``Stored`` is one."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

    def read(self, part: int = 0, parts: int = 1) -> np.ndarray:
        """Equal share number ``part`` of ``parts`` along the first axis."""


Tensors = Mapping[str, TensorOfTheirs]  # a file of theirs: {name: tensor}


@dataclasses.dataclass(frozen=True)
class Stored:
    """One tensor in a file.

    offset: of its first number, in bytes from the start of the file.
    strides: in elements, as PyTorch has them; None for C order without gaps.
    check: raises if the bytes are not what was written, where the format can know (checksums).
    """

    file: pathlib.Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int
    strides: tuple[int, ...] | None = None
    check: Callable[[], None] | None = None

    def read(self, part: int = 0, parts: int = 1) -> np.ndarray:
        """Equal share number ``part`` of ``parts`` along the first axis, in the file's dtype.

        Raises:
          WeightsError: if the file cannot be read, or is not what was written.
        """
        if self.check:
            self.check()
        if self.strides is not None:
            last = sum((n - 1) * s for n, s in zip(self.shape, self.strides))
            flat = self._numbers(0, last + 1 if math.prod(self.shape) else 0)
            strides = tuple(s * self.dtype.itemsize for s in self.strides)
            whole = np.lib.stride_tricks.as_strided(flat, self.shape, strides, writeable=False)
            return whole if parts == 1 else np.split(whole, parts)[part]
        count = math.prod(self.shape) // parts
        shape = self.shape if parts == 1 else (self.shape[0] // parts, *self.shape[1:])
        return self._numbers(part * count, count).reshape(shape)

    def _numbers(self, first: int, count: int) -> np.ndarray:
        size = count * self.dtype.itemsize
        try:
            with open(self.file, "rb") as file:
                file.seek(self.offset + first * self.dtype.itemsize)
                data = file.read(size)
        except OSError as error:
            raise WeightsError(f"{self.file}: cannot be read ({error.strerror})") from None
        if len(data) != size:
            raise WeightsError(f"{self.file}: has become shorter while it was read")
        return np.frombuffer(data, self.dtype)


@dataclasses.dataclass(frozen=True)
class Opened:
    """Files with their headers read: tensors by name, the place in a ``.pth`` where they stood
    and those of the state dicts that were not taken (``state_dicts.py``), config.json (or None) and
    its path, what our own ``.pth`` keeps beside the tensors, and ``preprocessor_config.json``."""

    path: pathlib.Path
    tensors: Tensors
    inside: str = ""
    others: tuple[str, ...] = ()
    config: dict[str, Any] | None = None
    config_file: pathlib.Path | None = None
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    preprocessor: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def choice(self) -> tuple[str, ...]:
        """A sentence where one of several state dicts was taken."""
        if not self.others:
            return ()
        file = self.path.name
        others = ", ".join(f"{file}:{place}" for place in self.others[:6])
        return (f"the weights under {self.inside!r} (there are also {others})",)

    @property
    def preprocessor_file(self) -> pathlib.Path | None:
        """Where ``preprocessor`` stands, or would."""
        return self.config_file and self.config_file.with_name("preprocessor_config.json")
