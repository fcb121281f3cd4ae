"""The engine of weight conversion: one table a family of files, read in both directions.

A table says, row by row, which parameter of ours is which tensor of theirs and how one turns into
the other. Export walks the rows from left to right, import from right to left, so the two cannot
drift apart. Both are strict: a parameter or a tensor without a row, a row without its parameter or
tensor, another shape, and a value that is not finite are errors that name what they are about, and
nothing is half loaded.

Both stream. Export yields one tensor at a time. Import (:func:`open_`) first compares names, shapes
and types, which needs no tensor, and then gives a tree of :class:`Leaf`, each read when it is asked
for, block by block. Such a tree can be exported again, so files of one family become files of
another without ever being in memory as a whole.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from webssl_jax import params as params_lib
from webssl_jax.weights.stored import TensorOfTheirs, Tensors, WeightsError, shown

DTYPES = ("float32", "bfloat16", "float16", "float64")  # that import takes; all become float32


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
      (qkv; the two halves of a packed SwiGLU). None in the place of a path is a share that no
      network reads: zeros on export, passed over on import.
    theirs: the tensor's name. ``{i}`` in it means that ours is stacked over blocks on its leading
      axis and theirs is one tensor a block, named by its number. ``transform`` sees single blocks.
    plus: (path, function): theirs is the sum of ours and of what ``function`` takes from another
      parameter, which are only ever added. Import cannot part them and puts all of it in ours; that
      other parameter's own row leaves its part out.
    """

    ours: str | tuple[str | None, ...]
    theirs: str
    transform: Transform = SAME
    plus: tuple[str, Callable[[np.ndarray], np.ndarray]] | None = None

    @property
    def shares(self) -> tuple[str | None, ...]:
        """What theirs is joined from."""
        return (self.ours,) if isinstance(self.ours, str) else self.ours

    @property
    def paths(self) -> tuple[str, ...]:
        """Those of our parameters."""
        return tuple(path for path in self.shares if path is not None)


def linear(ours: str, theirs: str, bias: bool = True) -> tuple[Row, ...]:
    """The rows of an ``nn.Linear``."""
    weight = Row(f"{ours}/kernel", f"{theirs}.weight", LINEAR)
    return (weight, Row(f"{ours}/bias", f"{theirs}.bias")) if bias else (weight,)


def norm(ours: str, theirs: str) -> tuple[Row, ...]:
    """The rows of an ``nn.LayerNorm``."""
    return Row(f"{ours}/scale", f"{theirs}.weight"), Row(f"{ours}/bias", f"{theirs}.bias")


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
    refuse(
        table.family,
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
        parts: dict[str, np.ndarray] = {}
        for path in tensor.row.paths:
            try:
                part = np.asarray(flat[path] if tensor.block is None else flat[path][tensor.block])
            except NotFinite as error:
                raise WeightsError(
                    f"{table.family}: the tensor {error} that is read holds NaN or infinity; "
                    "nothing was exported"
                ) from None
            if not _finite(part):
                where = path if tensor.block is None else f"{path}, block {tensor.block}"
                raise WeightsError(
                    f"{table.family}: our parameter {where} holds NaN or infinity; "
                    "nothing was exported"
                )
            parts[path] = tensor.row.transform.to_theirs(part)
        first = parts[tensor.row.paths[0]]
        if tensor.row.plus:
            path, taken = tensor.row.plus
            first = first + taken(np.asarray(flat[path]))
        if len(tensor.row.shares) > 1:
            shares = (np.zeros_like(first) if x is None else parts[x] for x in tensor.row.shares)
            first = np.concatenate(list(shares), axis=0)
        yield tensor.key, first


class NotFinite(WeightsError):
    """A tensor of theirs holds NaN or infinity; the message is its name."""


class Leaf:
    """A parameter of ours that still lies in a file of theirs: float32, finite, in our layout.

    ``leaf[i]`` reads block ``i`` of a stacked parameter, ``np.asarray(leaf)`` reads it whole.

    Raises:
      NotFinite: when a value that is read is not finite.
    """

    dtype = np.dtype(np.float32)

    def __init__(
        self,
        shape: tuple[int, ...],
        tensors: Sequence[tuple[str, TensorOfTheirs]],
        transform: Transform,
        share: tuple[int, int],
        stacked: bool,
    ):
        """tensors: (name, tensor) of each block, or the only one. share: (part, parts)."""
        self.shape, self.stacked = shape, stacked
        self._tensors, self._transform, self._share = tensors, transform, share

    def __getitem__(self, block: int) -> np.ndarray:
        return self._read(block)

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        if not self.stacked:
            return self._read(0)
        out = np.empty(self.shape, self.dtype)
        for block in range(len(out)):
            out[block] = self._read(block)
        return out

    def _read(self, block: int) -> np.ndarray:
        name, tensor = self._tensors[block]
        with np.errstate(over="ignore"):  # a float64 too large becomes infinite, which is refused
            array = np.asarray(tensor.read(*self._share)).astype(np.float32, copy=False)
        if not _finite(array):
            raise NotFinite(shown(name))
        return self._transform.to_ours(array)


@dataclasses.dataclass(frozen=True)
class Fit:
    """How a file's names, shapes and types fit a model: what is missing from the file, what the
    table does not know, what has another shape or is no float (sentences), and what is passed over
    on purpose. ``names``: {the table's spelling: the file's}."""

    missing: list[str]
    unexpected: list[str]
    misshapen: list[str]
    wrong_type: list[str]
    ignored: list[str]
    names: dict[str, str]


def compare(tensors: Tensors, table: Table, template: Any) -> Fit:
    """Compares without reading a tensor. ``template`` is the model's parameter tree, or its
    ``ShapeDtypeStruct``s.

    Raises:
      WeightsError: if the table does not fit the model (:func:`layout`), or two names of the file
        are spellings of one.
    """
    wanted = layout(table, template)
    names, ignored = canonical_names(table, tensors)
    keys = {t.key for t in wanted}
    misshapen, wrong_type = [], []
    for tensor in wanted:
        found = tensors[names[tensor.key]] if tensor.key in names else None
        if found is not None and tuple(found.shape) != tensor.shape:
            turned = " (transposed?)" if tuple(found.shape) == tensor.shape[::-1] else ""
            misshapen.append(f"{tensor.key} is {tuple(found.shape)}, not {tensor.shape}{turned}")
        if found is not None and found.dtype.name not in DTYPES:
            wrong_type.append(f"{tensor.key} is {found.dtype}")
    return Fit(
        [t.key for t in wanted if t.key not in names],
        sorted(names[name] for name in set(names) - keys),
        misshapen,
        wrong_type,
        ignored,
        names,
    )


def open_(tensors: Tensors, table: Table, template: Any) -> dict[str, Any]:
    """Our parameters in a file of theirs, as a nested dict of :class:`Leaf`.

    Args:
      tensors: all tensors of the file.
      template: the model's parameter tree, or its ``ShapeDtypeStruct``s. What ``table.leave_out``
        names is not returned.

    Raises:
      WeightsError: naming the tensors that are missing, unexpected, of another shape, not of a
        type in ``DTYPES``, or not the constant they have to be.
    """
    fit = compare(tensors, table, template)
    refuse(
        table.family,
        {
            "missing from the file:": fit.missing,
            "not expected in the file:": fit.unexpected,
            "of another shape:": fit.misshapen,
            f"not {', '.join(DTYPES[:-1])} or {DTYPES[-1]}:": fit.wrong_type,
        },
    )
    not_constant = []
    for constant in table.constants:
        array = tensors[fit.names[constant.theirs]].read()
        distance, allowed = _distance(array, constant)
        if not distance <= allowed:  # NaN too
            not_constant.append(
                f"{constant.theirs} is not {constant.what} (off by {distance:.2g}, "
                f"allowed {allowed:.2g})"
            )
    refuse(table.family, {"": not_constant})
    shapes = {path: tuple(leaf.shape) for path, leaf in _kept(table, template).items()}
    flat = {}
    for row in table.rows:
        stacked = "{i}" in row.theirs
        for part, path in enumerate(row.shares):
            if path is None:
                continue
            depth = shapes[path][0] if stacked else 1
            keys = [row.theirs.format(i=i) if stacked else row.theirs for i in range(depth)]
            found = [(key, tensors[fit.names[key]]) for key in keys]
            share = (part, len(row.shares))
            flat[path] = Leaf(shapes[path], found, row.transform, share, stacked)
    return params_lib.unflatten(flat)


def read_all(family: str, tree: Any) -> dict[str, Any]:
    """A tree of :class:`Leaf` as numpy arrays.

    Raises:
      WeightsError: naming the tensors that hold NaN or infinity. Nothing is returned then.
    """
    flat, not_finite = {}, []
    for path, leaf in params_lib.flatten(tree).items():
        try:
            # a copy of our own: what is read may be a view of read-only bytes
            flat[path] = np.array(leaf, order="C")
        except NotFinite as error:
            not_finite.append(str(error))
    refuse(family, {"NaN or infinity in": list(dict.fromkeys(not_finite))})
    return params_lib.unflatten(flat)


def _kept(table: Table, tree: Any) -> dict[str, Any]:
    return {
        path: leaf
        for path, leaf in params_lib.flatten(tree).items()
        if not any(re.search(pattern, path) for pattern in table.leave_out)
    }


def names_of(table: Table) -> re.Pattern[str]:
    """Matches every name a table knows, in its own spelling."""
    keys = [*(row.theirs for row in table.rows), *(one.theirs for one in table.constants)]
    return re.compile("|".join(re.escape(key).replace(r"\{i\}", r"\d+") for key in keys))


def canonical_names(
    table: Table, keys: Iterable[str], strict: bool = True
) -> tuple[dict[str, str], list[str]]:
    """{the table's spelling: the file's spelling} without what the table ignores, and that.

    Raises:
      WeightsError: if ``strict`` and two names of the file are spellings of one.
    """
    names: dict[str, str] = {}
    ignored: list[str] = []
    for key in keys:
        name = key
        for pattern, replacement in table.aliases:
            name = re.sub(pattern, replacement, name)
        if any(re.search(pattern, name) for pattern in table.ignore):
            ignored.append(key)
            continue
        if strict and name in names:
            raise WeightsError(
                f"{table.family}: {shown(names[name])} and {shown(key)} are two spellings of "
                "one tensor in one file"
            )
        names[name] = key
    return names, ignored


def _theirs_shape(row: Row, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The shape of theirs: what the transform makes of arrays without memory (zero strides)."""
    first, *rest = [
        row.transform.to_theirs(np.broadcast_to(np.float32(0), s)).shape for s in shapes
    ]
    if any(other != first for other in rest):
        raise ValueError(f"{row.theirs}: fuses parameters of different shapes {shapes}")
    shares = len(row.shares)
    return (first[0] * shares, *first[1:]) if shares > 1 else first


def _finite(array: np.ndarray) -> bool:
    return bool(np.isfinite(array).all())


def _distance(array: np.ndarray, constant: Constant) -> tuple[float, float]:
    """(largest absolute difference, largest that is allowed in the file's number type)."""
    value = constant.value().astype(np.float64)
    half_ulp = {"bfloat16": 2.0**-9, "float16": 2.0**-12}.get(array.dtype.name, 0.0)
    half_ulp *= float(np.abs(value).max())
    return float(np.abs(array.astype(np.float64) - value).max()), constant.tolerance + 2 * half_ulp


def is_constant(array: np.ndarray, constant: Constant) -> bool:
    """Whether ``array``, of the constant's shape, holds it."""
    distance, allowed = _distance(array, constant)
    return distance <= allowed  # False for NaN


def refuse(where: str, problems: Mapping[str, Sequence[str]], limit: int = 6) -> None:
    """Raises one WeightsError that names the first few of each kind of problem, if there is any."""
    parts = []
    for kind, names in problems.items():
        if names:
            more = f" and {len(names) - limit} more" if len(names) > limit else ""
            parts.append(f"{kind} {', '.join(map(shown, names[:limit]))}{more}".strip())
    if parts:
        raise WeightsError(f"{where}: {'; '.join(parts)}")
