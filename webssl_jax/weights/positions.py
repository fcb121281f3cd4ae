"""Position tables in weight files: tensors (1, 1 + N, D), the CLS row first, or (1, N, D) without.

Trained ones are a parameter of ours. MAE's and MoCo's are computed, so no parameters of ours, and
stand in the files of every family all the same, their CLS row zero.
"""

from __future__ import annotations

import functools

import numpy as np

from webssl_jax.models import position
from webssl_jax.models.sizes import ViTConfig
from webssl_jax.weights.tables import SAME, Constant, Row, Transform, WeightsError, is_constant

_PATCHES = Transform(lambda x: x[:, 1:], lambda x: np.pad(x, ((0, 0), (1, 0), (0, 0))))


# Of ``ViTConfig.position``: whose fixed table it is.
FIXED = {"sincos": "MAE's", "sincos_rows": "MoCo's"}


def table(width: int, grid: position.Grid, kind: str = "sincos") -> np.ndarray:
    """(1, 1 + N, D) float32: a fixed sin-cos table, as files hold it."""
    scheme = position.POSITIONS[kind](width, grid, 1, position.INTERPOLATIONS["plain"])
    assert isinstance(scheme, position.SinCos)
    return np.concatenate([np.asarray(rows) for rows in scheme.table({})])[None]


def constant(c: ViTConfig, key: str, with_cls: bool = True) -> Constant:
    """The row of a weight table for the fixed position table ``key``."""
    kind = c.position if c.position in FIXED else "sincos"
    return Constant(
        key,
        lambda: table(c.width, c.grid, kind)[:, 0 if with_cls else 1 :],
        f"{FIXED[kind]} fixed sin-cos table of {c.grid[0]}x{c.grid[1]} patches; were "
        "the positions trained? then set model.position=learned",
    )


def rows(
    c: ViTConfig, key: str, with_cls: bool = True
) -> tuple[tuple[Row, ...], tuple[Constant, ...]]:
    """What stands in a weight table for the encoder's positions. with_cls: whether theirs has a row
    for CLS; without a CLS token neither has.

    Raises:
      WeightsError: for rotated positions, which no table can say.
    """
    if c.position == "rope":
        raise WeightsError(f"{key}: positions of this model are rotated; export as hf-dinov3")
    with_cls = with_cls and c.pooling == "cls"
    if c.position == "learned":
        same = with_cls or c.pooling != "cls"
        return (Row("encoder/pos_embed", key, SAME if same else _PATCHES),), ()
    return (), (constant(c, key, with_cls),)


def kind(array: np.ndarray, grid: position.Grid) -> str:
    """The name in :data:`FIXED` of the fixed table that ``array`` (1, 1 + N or N, D) is, as far as
    its number type can tell, else ``learned``."""
    width = array.shape[-1]
    for name in FIXED if width % 4 == 0 else ():
        fixed = functools.partial(_last_rows, table(width, grid, name), array.shape[1])
        if is_constant(array, Constant("", fixed, "")):
            return name
    return "learned"


def _last_rows(array: np.ndarray, count: int) -> np.ndarray:
    return array[:, -count:]
