"""Position tables in weight files: tensors (1, 1 + N, D), the CLS row first, or (1, N, D) without.

Trained ones are a parameter of ours. MAE's are computed, so no parameters of ours, and stand in the
files of every family all the same, their CLS row zero.
"""

from __future__ import annotations

import numpy as np

from webssl_jax.models import position
from webssl_jax.models.sizes import ViTConfig
from webssl_jax.weights.tables import SAME, Constant, Row, Transform, is_constant

_PATCHES = Transform(lambda x: x[:, 1:], lambda x: np.pad(x, ((0, 0), (1, 0), (0, 0))))


def table(width: int, grid: position.Grid) -> np.ndarray:
    """(1, 1 + N, D) float32: the fixed sin-cos table, as files hold it."""
    cls = np.zeros((1, width), np.float32)  # stands nowhere
    return np.concatenate([cls, position.sincos_2d(width, grid)])[None]


def constant(c: ViTConfig, key: str, with_cls: bool = True) -> Constant:
    """The row of a weight table for the fixed position table ``key``."""
    return Constant(
        key,
        lambda: table(c.width, c.grid)[:, 0 if with_cls else 1 :],
        f"MAE's fixed sin-cos table of {c.grid[0]}x{c.grid[1]} patches; were "
        "the positions trained? then set model.position=learned",
    )


def rows(
    c: ViTConfig, key: str, with_cls: bool = True
) -> tuple[tuple[Row, ...], tuple[Constant, ...]]:
    """What stands in a weight table for the encoder's positions."""
    if c.position == "learned":
        return (Row("encoder/pos_embed", key, SAME if with_cls else _PATCHES),), ()
    return (), (constant(c, key, with_cls),)


def kind(array: np.ndarray, grid: position.Grid) -> str:
    """``sincos`` if ``array`` (1, 1 + N or N, D) is the fixed table as far as its number type can
    tell, else ``learned``."""
    width = array.shape[-1]
    if width % 4:
        return "learned"
    fixed = Constant("", lambda: table(width, grid)[:, -array.shape[1] :], "")
    return "sincos" if is_constant(array, fixed) else "learned"
