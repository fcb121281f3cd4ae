"""Positions that are added to a ViT's tokens, and bicubic resizing of position tables as PyTorch
does it. (What is rotated instead: ``rope.py``.)

``ViTConfig.position`` names a kind of position; :data:`POSITIONS` gives its class. A new kind is
one class and one row of that table. ``ViTConfig.position_resize`` names a row of
:data:`INTERPOLATIONS`.

``jax.image.resize`` cannot replace the originals' ``torch.nn.functional.interpolate``: its cubic
kernel has a = -0.5, PyTorch's has -0.75 unless it antialiases, and it does not know DINOv2's offset
of 0.1. A resize is linear and separable, so it is two small matrices, built in numpy while tracing.

Shape letters: D width, h x w = N patches, K kept patches, C rows for CLS (0 or 1).
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from webssl_jax.models.init_schemes import Initializer

Array = np.ndarray | jax.Array
Grid = tuple[int, int]  # (rows, columns)
Params = Mapping[str, jax.Array]  # of a module, by name

_CUBIC_A = -0.75  # PyTorch's bicubic constant (Keys 1981 has -0.5)
_CUBIC_A_ANTIALIASED = -0.5  # PyTorch's when it antialiases, which is also Pillow's


@dataclasses.dataclass(frozen=True)
class Interpolation:
    """Bicubic resizing of a position table to another grid.

    words: the rule, for messages to people.
    offset: added to the target size before it is divided by the old size.
    antialias: as of ``interpolate(antialias=True)``.
    """

    words: str
    offset: float = 0.0
    antialias: bool = False

    def resize(self, table: Array, old: Grid, new: Grid) -> Array:
        """Resizes the positions of patches, (old rows * old columns, D) -> (new rows * new columns,
        D) float32. Returns the table itself when the grids are equal."""
        if old == new:
            return table
        rows, columns = self.matrix(old[0], new[0]), self.matrix(old[1], new[1])
        square = rearrange(jnp.asarray(table, jnp.float32), "(h w) d -> h w d", h=old[0])
        resized = jnp.einsum(
            "Ii,Jj,ijd->IJd", rows, columns, square, precision=jax.lax.Precision.HIGHEST
        )
        return rearrange(resized, "h w d -> (h w) d")

    def resize_table(self, table: Array, old: Grid, new: Grid) -> jax.Array:
        """:meth:`resize` of a learned table (1, C + N, D); the rows of CLS do not change."""
        cls_rows = table.shape[1] - old[0] * old[1]
        patches = self.resize(table[0, cls_rows:], old, new)
        return jnp.concatenate([table[:, :cls_rows], patches[None]], axis=1)

    def matrix(self, old: int, new: int) -> np.ndarray:
        """(new, old) float32: cubic convolution along one axis, half-pixel centres.

        Edges are clamped. With antialiasing the kernel is cut off at the edges instead, and is
        wider by old / new when it shrinks.
        """
        if self.antialias:
            step = old / new
            centres = (np.arange(new)[:, None] + 0.5) * step - 0.5
            weights = _cubic((np.arange(old) - centres) / max(step, 1.0), _CUBIC_A_ANTIALIASED)
            return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
        source = (np.arange(new) + 0.5) / ((new + self.offset) / old) - 0.5
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


INTERPOLATIONS = {
    # interpolate(scale_factor=...) in DINOv2, which adds 0.1 so that no size is rounded down by one
    "offset": Interpolation("with DINOv2's offset of 0.1", offset=0.1),
    # interpolate(size=...), as in most of transformers
    "plain": Interpolation("plainly"),
    # interpolate(size=..., antialias=True), as in timm and in Dinov2WithRegistersModel
    "antialias": Interpolation("with antialiasing", antialias=True),
}


@dataclasses.dataclass(frozen=True)
class Position(abc.ABC):
    """One kind of position, as far as it is added to the tokens before the first block.

    width: D. grid: of the images that the table is made for. cls_rows: C, 1 where there is a CLS
    token. interpolation: how the table follows other grids.
    """

    width: int
    grid: Grid
    cls_rows: int
    interpolation: Interpolation

    def params(self, param: Callable[..., jax.Array], init: Initializer) -> Params:
        """Declares this kind's parameters, none by default, with a module's ``param``, and returns
        them."""
        return {}

    @abc.abstractmethod
    def add(
        self,
        params: Params,
        grid: Grid,
        cls: jax.Array | None,
        patches: jax.Array,
        keep: jax.Array | None = None,
    ) -> tuple[jax.Array | None, jax.Array]:
        """``cls`` (1, 1, D), or None without one, and ``patches`` (B, N, D) of that grid, with
        their positions added. keep: (B, K) int, which patches those given, (B, K, D), are."""


class Rotary(Position):
    """Nothing is added; the blocks rotate queries and keys (``rope.py``)."""

    def add(
        self,
        params: Params,
        grid: Grid,
        cls: jax.Array | None,
        patches: jax.Array,
        keep: jax.Array | None = None,
    ) -> tuple[jax.Array | None, jax.Array]:
        return cls, patches


class Table(Position):
    """A position for CLS and for every patch of a grid, resized for other grids."""

    @abc.abstractmethod
    def table(self, params: Params) -> tuple[jax.Array, Array]:
        """The positions of CLS (C, D) and of the patches of ``self.grid`` (N, D), float32."""

    def add(
        self,
        params: Params,
        grid: Grid,
        cls: jax.Array | None,
        patches: jax.Array,
        keep: jax.Array | None = None,
    ) -> tuple[jax.Array | None, jax.Array]:
        cls_position, table = self.table(params)
        positions = jnp.asarray(self.interpolation.resize(table, self.grid, grid))
        positions = positions[None] if keep is None else positions[keep]
        patches = patches + positions.astype(patches.dtype)
        return (None if cls is None else cls + cls_position), patches


@dataclasses.dataclass(frozen=True)
class Learned(Table):
    """A trained table ``pos_embed`` (1, C + N, D)."""

    def params(self, param: Callable[..., jax.Array], init: Initializer) -> Params:
        rows = self.cls_rows + self.grid[0] * self.grid[1]
        return {"pos_embed": param("pos_embed", init, (1, rows, self.width))}

    def table(self, params: Params) -> tuple[jax.Array, Array]:
        table = params["pos_embed"]
        return table[0, : self.cls_rows], table[0, self.cls_rows :]


@dataclasses.dataclass(frozen=True)
class SinCos(Table):
    """MAE's fixed table (:func:`sincos_2d`), no parameter; CLS has position 0.

    Raises:
      ValueError: if the width is not a multiple of 4.
    """

    def __post_init__(self) -> None:
        if self.width % 4:
            raise ValueError(f"width = {self.width} must be a multiple of 4 for sincos positions")

    def table(self, params: Params) -> tuple[jax.Array, Array]:
        return jnp.zeros((self.cls_rows, self.width)), sincos_2d(self.width, self.grid)


class SinCosRows(SinCos):
    """:class:`SinCos` with the halves exchanged, so that the first encodes the row (MoCo v3)."""

    def table(self, params: Params) -> tuple[jax.Array, Array]:
        cls, patches = super().table(params)
        return cls, np.roll(np.asarray(patches), self.width // 2, axis=1)


POSITIONS: dict[str, type[Position]] = {
    "learned": Learned,
    "sincos": SinCos,
    "sincos_rows": SinCosRows,
    "rope": Rotary,
}


def sincos_2d(width: int, grid: Grid) -> np.ndarray:
    """MAE's fixed position table, (rows * columns, width) float32, row-major.

    The first half of the channels encodes the column, the second half the row ("w goes first" in
    the original). Each half is [sin(pos * omega), cos(pos * omega)] with
    omega_i = 10000^(-i / (width / 4)). There is no row for CLS.
    """
    omega = 10000.0 ** (-np.arange(width // 4) / (width // 4))
    rows, columns = np.meshgrid(np.arange(grid[0]), np.arange(grid[1]), indexing="ij")
    halves = []
    for index in (columns, rows):
        angle = index.reshape(-1, 1) * omega
        halves += [np.sin(angle), np.cos(angle)]
    return np.concatenate(halves, axis=1).astype(np.float32)


def _cubic(distance: np.ndarray, a: float) -> np.ndarray:
    """Keys' cubic convolution kernel (IEEE ASSP 1981, eq. 4 with free a)."""
    d = np.abs(distance)
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((d - 5) * d + 8) * d * a - 4 * a
    return np.where(d <= 1, near, np.where(d < 2, far, 0.0))
