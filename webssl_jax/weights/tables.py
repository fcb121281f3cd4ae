"""The engine of weight conversion: one table a family of files, read in both directions.

A table says, row by row, which parameter of ours is which tensor of theirs and how one turns into
the other. Export walks the rows from left to right, import from right to left, so the two cannot
drift apart. Both are strict: a parameter or a tensor without a row, a row without its parameter or
tensor, another shape, and a value that is not finite are errors that name what they are about, and
nothing is half loaded.

Both stream. Export yields one tensor at a time; import holds the parameters it fills and the one
tensor it reads.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from webssl_jax import params as params_lib
from webssl_jax.config import UserError

Read = Callable[[str], np.ndarray]


class WeightsError(UserError):
    """Weights that do not fit. The message names the family and the tensors."""


@dataclasses.dataclass(frozen=True)
class Transform:
    """A way to lay out one tensor, and its exact inverse. Both only move numbers: views."""

    to_theirs: Callable[[np.ndarray], np.ndarray]
    to_ours: Callable[[np.ndarray], np.ndarray]


SAME = Transform(lambda x: x, lambda x: x)
# Ours (in, out), PyTorch's nn.Linear (out, in).
LINEAR = Transform(lambda x: x.T, lambda x: x.T)
# Ours (p, p, 3, D), PyTorch's nn.Conv2d (D, 3, p, p).
CONV = Transform(lambda x: x.transpose(3, 2, 0, 1), lambda x: x.transpose(2, 3, 1, 0))


def squeeze(*axes: int) -> Transform:
    """Ours has extra axes of size 1 at these places, theirs has not."""
    return Transform(lambda x: np.squeeze(x, axes), lambda x: np.expand_dims(x, axes))


@dataclasses.dataclass(frozen=True)
class Row:
    """One parameter of ours and its tensor, or tensors, of theirs.

    ours: the path in our tree. Several paths are fused into one tensor: each goes through
      ``transform``, then they are joined on the first axis of theirs, equal shares in this order
      (qkv; the two halves of a packed SwiGLU).
    theirs: the tensor's name. ``{i}`` in it means that ours is stacked over blocks on its leading
      axis and theirs is one tensor a block, named by its number. ``transform`` sees single blocks.
    """

    ours: str | tuple[str, ...]
    theirs: str
    transform: Transform = SAME

    @property
    def paths(self) -> tuple[str, ...]:
        return (self.ours,) if isinstance(self.ours, str) else self.ours


@dataclasses.dataclass(frozen=True)
class Constant:
    """A tensor of theirs that is no parameter of ours, as its value is known: position tables.

    Export writes ``value()``. Import checks that the file holds it, to ``tolerance`` (largest
    absolute difference) plus what the file's own number type rounds away.
    """

    theirs: str
    value: Callable[[], np.ndarray]
    what: str
    tolerance: float = 1e-5


@dataclasses.dataclass(frozen=True)
class Table:
    """A family of weight files.

    leave_out: regexes over our paths that this family has no place for, on purpose (a decoder in
      an encoder's file).
    aliases: (regex, replacement) over their names, applied in order on import: other spellings of
      the same tensor.
    ignore: regexes over their names that import passes over, on purpose (a pooler that was never
      trained).
    """

    family: str
    rows: tuple[Row, ...]
    constants: tuple[Constant, ...] = ()
    leave_out: tuple[str, ...] = ()
    aliases: tuple[tuple[str, str], ...] = ()
    ignore: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of theirs, for one model. ``block`` is None unless ours is stacked."""

    key: str
    shape: tuple[int, ...]
    row: Row | Constant
    block: int | None = None


def layout(table: Table, tree: Any) -> list[Tensor]:
    """Every tensor that a file of this family holds for the model ``tree``.

    ``tree`` holds arrays or ``ShapeDtypeStruct``s; only shapes are read.

    Raises:
      WeightsError: if the family has no row for a parameter, or the model lacks one it needs.
    """
    flat = _kept(table, tree)
    wanted = [path for row in table.rows for path in row.paths]
    _refuse(
        table,
        {
            "has no place for our parameter": [p for p in flat if p not in set(wanted)],
            "needs a parameter that this model lacks:": [p for p in wanted if p not in flat],
        },
    )
    tensors = []
    for row in table.rows:
        shapes = [tuple(flat[path].shape) for path in row.paths]
        if "{i}" in row.theirs:
            depth = shapes[0][0]
            shape = _theirs_shape(row, [s[1:] for s in shapes])
            tensors += [Tensor(row.theirs.format(i=i), shape, row, i) for i in range(depth)]
        else:
            tensors.append(Tensor(row.theirs, _theirs_shape(row, shapes), row))
    tensors += [Tensor(c.theirs, tuple(c.value().shape), c) for c in table.constants]
    return tensors


def export(params: Any, table: Table) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (their name, array) for every tensor, in the order of :func:`layout`, one at a time.

    ``params`` holds numpy or jax arrays. Of a stacked parameter only one block at a time is brought
    to the host.

    Raises:
      WeightsError: as :func:`layout`, and when a parameter is not finite.
    """
    flat = _kept(table, params)
    for tensor in layout(table, params):
        if isinstance(tensor.row, Constant):
            yield tensor.key, tensor.row.value()
            continue
        parts = []
        for path in tensor.row.paths:
            leaf = flat[path] if tensor.block is None else flat[path][tensor.block]
            part = np.asarray(leaf)
            if not _finite(part):
                where = path if tensor.block is None else f"{path}, block {tensor.block}"
                raise WeightsError(
                    f"{table.family}: our parameter {where} holds NaN or infinity; "
                    "nothing was exported"
                )
            parts.append(tensor.row.transform.to_theirs(part))
        yield tensor.key, parts[0] if len(parts) == 1 else np.concatenate(parts, axis=0)


def import_(read: Read, keys: Iterable[str], table: Table, template: Any) -> dict[str, Any]:
    """Our parameters from a file of theirs: numpy, in the dtypes of ``template``, all filled.

    Args:
      read: returns the tensor of a name, in whatever float dtype the file has.
      keys: the names of all tensors in the file.
      template: the model's parameter tree, or its ``ShapeDtypeStruct``s. What ``table.leave_out``
        names is not filled and not returned.

    Raises:
      WeightsError: naming the tensors that are missing, unexpected, of another shape, not floats,
        not finite, or not the constant they have to be. Nothing is returned then.
    """
    tensors = layout(table, template)
    names = _canonical_names(table, keys)
    _refuse(
        table,
        {
            "missing from the file:": [t.key for t in tensors if t.key not in names],
            "not expected in the file:": sorted(set(names) - {t.key for t in tensors}),
        },
    )
    flat = {path: np.empty(leaf.shape, leaf.dtype) for path, leaf in _kept(table, template).items()}
    misshapen, wrong_type, not_finite, not_constant = [], [], [], []
    for tensor in tensors:
        array = read(names[tensor.key])
        if tuple(array.shape) != tensor.shape:
            misshapen.append(f"{tensor.key} is {tuple(array.shape)}, not {tensor.shape}")
            continue
        if not _is_float(array.dtype):
            wrong_type.append(f"{tensor.key} is {array.dtype}")
            continue
        if not _finite(array):
            not_finite.append(tensor.key)
            continue
        if isinstance(tensor.row, Constant):
            distance, allowed = _distance(array, tensor.row)
            if distance > allowed:
                not_constant.append(
                    f"{tensor.key} is not {tensor.row.what} (off by {distance:.2g}, "
                    f"allowed {allowed:.2g})"
                )
            continue
        paths = tensor.row.paths
        parts = np.split(array, len(paths)) if len(paths) > 1 else [array]
        block = ... if tensor.block is None else tensor.block
        for path, part in zip(paths, parts, strict=True):
            flat[path][block] = tensor.row.transform.to_ours(part)
    _refuse(
        table,
        {
            "of another shape:": misshapen,
            "not floating point:": wrong_type,
            "NaN or infinity in": not_finite,
            "": not_constant,
        },
    )
    return params_lib.unflatten(flat)


def _kept(table: Table, tree: Any) -> dict[str, Any]:
    return {
        path: leaf
        for path, leaf in params_lib.flatten(tree).items()
        if not any(re.search(pattern, path) for pattern in table.leave_out)
    }


def _canonical_names(table: Table, keys: Iterable[str]) -> dict[str, str]:
    """{the table's spelling: the file's spelling}, without what the table ignores."""
    names: dict[str, str] = {}
    for key in keys:
        name = key
        for pattern, replacement in table.aliases:
            name = re.sub(pattern, replacement, name)
        if any(re.search(pattern, name) for pattern in table.ignore):
            continue
        if name in names:
            raise WeightsError(
                f"{table.family}: {names[name]} and {key} are two spellings of "
                "one tensor in one file"
            )
        names[name] = key
    return names


def _theirs_shape(row: Row, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The shape of theirs: what the transform makes of arrays without memory (zero strides)."""
    first, *rest = [
        row.transform.to_theirs(np.broadcast_to(np.float32(0), s)).shape for s in shapes
    ]
    if any(other != first for other in rest):
        raise ValueError(f"{row.theirs}: fuses parameters of different shapes {shapes}")
    return (first[0] * len(shapes), *first[1:]) if rest else first


def _is_float(dtype: np.dtype) -> bool:
    # numpy does not count the bfloat16 of ml_dtypes among its own.
    return np.issubdtype(dtype, np.floating) or dtype.name == "bfloat16"


def _finite(array: np.ndarray) -> bool:
    return bool(np.isfinite(array).all())


def _distance(array: np.ndarray, constant: Constant) -> tuple[float, float]:
    """(largest absolute difference, largest that is allowed in the file's number type)."""
    value = constant.value().astype(np.float64)
    half_ulp = {"bfloat16": 2.0**-9, "float16": 2.0**-12}.get(array.dtype.name, 0.0)
    half_ulp *= float(np.abs(value).max())
    return float(np.abs(array.astype(np.float64) - value).max()), constant.tolerance + 2 * half_ulp


def _refuse(table: Table, problems: Mapping[str, Sequence[str]], shown: int = 6) -> None:
    """Raises one WeightsError that names the first few of each kind of problem, if there is any."""
    parts = []
    for kind, names in problems.items():
        if names:
            more = f" and {len(names) - shown} more" if len(names) > shown else ""
            parts.append(f"{kind} {', '.join(names[:shown])}{more}".strip())
    if parts:
        raise WeightsError(f"{table.family}: {'; '.join(parts)}")
