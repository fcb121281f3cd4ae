"""MAE's position tables in weight files. They are computed, so no parameters of ours, and stand in
the files of every family as tensors (1, 1 + N, D), the CLS row first and zero."""

from __future__ import annotations

import numpy as np

from webssl_jax.models import position
from webssl_jax.models.sizes import ViTConfig
from webssl_jax.weights.tables import Constant, is_constant


def table(width: int, grid: position.Grid) -> np.ndarray:
    """(1, 1 + N, D) float32: the fixed sin-cos table, as files hold it."""
    cls = np.zeros((1, width), np.float32)  # stands nowhere
    return np.concatenate([cls, position.sincos_2d(width, grid)])[None]


def constant(c: ViTConfig, key: str) -> Constant:
    """The row of a weight table for the position table ``key``."""
    return Constant(
        key,
        lambda: table(c.width, c.grid),
        f"MAE's fixed sin-cos table of {c.grid[0]}x{c.grid[1]} patches; were "
        "the positions trained? then set model.position=learned",
    )


def kind(array: np.ndarray, grid: position.Grid) -> str:
    """``sincos`` if ``array`` (1, 1 + N, D) is the fixed table as far as its number type can tell,
    else ``learned``."""
    width = array.shape[-1]
    if width % 4:
        return "learned"
    return (
        "sincos" if is_constant(array, Constant("", lambda: table(width, grid), "")) else "learned"
    )
