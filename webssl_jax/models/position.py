"""Where a patch is: MAE's fixed 2-D sin-cos table, and resizing a table to another grid as PyTorch
does.

``jax.image.resize`` cannot stand in for the originals' ``torch.nn.functional.interpolate``: its
cubic kernel has a = -0.5 where PyTorch has -0.75 unless it antialiases, and it does not know the
0.1 offset of DINOv2. A resize is linear and separable, so it is two small matrices, built in numpy
while tracing.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

Grid = tuple[int, int]  # (rows, columns)

# How a table is resized, and whose rule that is in words.
MODES = {
    "offset": "with DINOv2's offset of 0.1",
    "plain": "plainly",
    "antialias": "with antialiasing",
}
_CUBIC_A = -0.75  # PyTorch's bicubic constant (Keys 1981 has -0.5)
_CUBIC_A_ANTIALIASED = -0.5  # PyTorch's when it antialiases, which is also Pillow's
_OFFSET = 0.1  # DINOv2 adds it to the target size before dividing, against rounding down by one


def sincos_2d(width: int, grid: Grid) -> np.ndarray:
    """The fixed position table of MAE, (rows * columns, width) float32, row-major.

    The first half of the channels encodes the column, the second half the row (the original's "w
    goes first"); each half is [sin(pos * omega), cos(pos * omega)] with
    omega_i = 10000^(-i / (width / 4)). The CLS token has no row here: its position is all zeros.
    """
    omega = 10000.0 ** (-np.arange(width // 4) / (width // 4))
    rows, columns = np.meshgrid(np.arange(grid[0]), np.arange(grid[1]), indexing="ij")
    halves = []
    for index in (columns, rows):
        angle = index.reshape(-1, 1) * omega
        halves += [np.sin(angle), np.cos(angle)]
    return np.concatenate(halves, axis=1).astype(np.float32)


def resize(table: jax.Array, old: Grid, new: Grid, mode: str) -> jax.Array:
    """Resizes patch positions (old rows * old columns, D) to (new rows * new columns, D), bicubic,
    in float32.

    mode: ``plain`` divides by new / old, as ``interpolate(size=...)`` and most of ``transformers``
    do; ``offset`` by (new + 0.1) / old, as ``interpolate(scale_factor=...)`` in DINOv2 does;
    ``antialias`` is ``interpolate(size=..., antialias=True)``, as in timm and in
    ``Dinov2WithRegistersModel``. The table itself when the grids match.
    """
    if old == new:
        return table
    rows = interpolation_matrix(old[0], new[0], mode)
    columns = interpolation_matrix(old[1], new[1], mode)
    square = jnp.asarray(table, jnp.float32).reshape(*old, -1)
    resized = jnp.einsum(
        "Ii,Jj,ijd->IJd", rows, columns, square, precision=jax.lax.Precision.HIGHEST
    )
    return resized.reshape(new[0] * new[1], -1)


def resize_table(table: jax.Array, old: Grid, new: Grid, mode: str) -> jax.Array:
    """:func:`resize` of a learned table (1, 1 + N, D), whose first row, that of CLS, stays; or of
    one without it, (1, N, D)."""
    first = table.shape[1] - old[0] * old[1]
    patches = resize(table[0, first:], old, new, mode)
    return jnp.concatenate([table[:, :first], patches[None]], axis=1)


def interpolation_matrix(old: int, new: int, mode: str) -> np.ndarray:
    """(new, old) float32: cubic convolution along one axis, half-pixel centres.

    Edges are clamped. ``antialias`` instead leaves out what lies beyond them, and widens the kernel
    to its share of the old grid where the new one is smaller.
    """
    if mode == "antialias":
        step = old / new
        centres = (np.arange(new)[:, None] + 0.5) * step - 0.5
        matrix = _cubic((np.arange(old) - centres) / max(step, 1.0), _CUBIC_A_ANTIALIASED)
        return (matrix / matrix.sum(axis=1, keepdims=True)).astype(np.float32)
    scale = (new + (_OFFSET if mode == "offset" else 0.0)) / old
    source = (np.arange(new) + 0.5) / scale - 0.5
    left = np.floor(source).astype(int)
    matrix = np.zeros((new, old))
    for tap in (-1, 0, 1, 2):
        neighbour = left + tap
        np.add.at(
            matrix,
            (np.arange(new), np.clip(neighbour, 0, old - 1)),
            _cubic(source - neighbour, _CUBIC_A),
        )
    return matrix.astype(np.float32)


def _cubic(distance: np.ndarray, a: float) -> np.ndarray:
    """Keys' cubic convolution kernel (IEEE ASSP 1981, eq. 4 with free a)."""
    d = np.abs(distance)
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((d - 5) * d + 8) * d * a - 4 * a
    return np.where(d <= 1, near, np.where(d < 2, far, 0.0))
