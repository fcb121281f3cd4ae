"""Rotary positions of patches on a grid (RoPE: Su et al., arXiv 2104.09864; of two axes and with
augmentation as in DINOv3, Siméoni et al., arXiv 2508.10104, section 3.2).

Nothing is added to the tokens. In every block, queries and keys of patches are rotated by angles
that grow with the patch's row and column; CLS and registers are not. A rotation is two tables, of
cosines and sines. A head's channel j pairs with j + d / 2, and both halves have the same angles:
the first half of these follows the row, the second the column.

In training the coordinates of all patches can be moved and stretched at random, anew in every block
and for every size of crops, so that a network does not learn one image size.

Shape letters: B images, N patches, T tokens, h heads, d channels a head, L blocks, S sizes of
crops.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

DRAWS = 5  # numbers of one augmentation


class Rotation(NamedTuple):
    """Cosines and sines of tokens, each (T, d) or (B, T, d) float32."""

    cos: jax.Array
    sin: jax.Array


@dataclasses.dataclass(frozen=True)
class Rope:
    """The rotations of heads of ``head_dim`` channels.

    base: the longest period is this times the shortest, which is the whole side of the image.
    rescale: in training, both coordinates are multiplied by one factor between 1 / rescale and
      rescale, log-uniform. jitter: the same with a factor for each axis. shift: a number between
      -shift and shift is added to each axis. None for none of it.

    Raises:
      ValueError: when a field is out of range.
    """

    head_dim: int
    base: float = 100.0
    rescale: float | None = None
    jitter: float | None = None
    shift: float | None = None

    def __post_init__(self) -> None:
        if self.head_dim % 4:
            raise ValueError(f"heads of {self.head_dim} channels: rope needs a multiple of 4")
        for name, least in (("base", 1.0), ("rescale", 1.0), ("jitter", 1.0), ("shift", 0.0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"rope_{name} = {value} must be at least {least:g}")

    @property
    def augments(self) -> bool:
        """Whether training moves coordinates."""
        return (self.rescale, self.jitter, self.shift) != (None, None, None)

    def draw(self, rng: jax.Array, blocks: int, sizes: int) -> jax.Array:
        """(L, S, 5) float32, what :meth:`rotation` takes for each block and size: shift of y and x,
        logarithms of the jitter of y and x, and of the rescale."""
        shift, jitter = self.shift or 0.0, math.log(self.jitter or 1.0)
        limits = np.array([shift, shift, jitter, jitter, math.log(self.rescale or 1.0)])
        return jax.random.uniform(rng, (blocks, sizes, DRAWS), minval=-1.0) * limits

    def rotation(
        self, coordinates: jax.Array, drawn: jax.Array | None = None, prefix: int = 0
    ) -> Rotation:
        """The rotation of ``prefix`` tokens that stand nowhere and of the patches behind them.

        coordinates: (N, 2) or (B, N, 2), of :func:`grid_coordinates`. drawn: (5,), one entry of
        :meth:`draw`.
        """
        if drawn is not None:
            coordinates = (coordinates + drawn[:2]) * jnp.exp(drawn[2:4] + drawn[4])
        quarter = self.head_dim // 4
        periods = self.base ** (np.arange(quarter) / quarter)
        angles = coordinates[..., None] * np.float32(2 * math.pi / periods)
        angles = rearrange(angles, "... n two d -> ... n (two d)")
        angles = jnp.concatenate([angles, angles], axis=-1)
        still = [(0, 0)] * (angles.ndim - 2) + [(prefix, 0), (0, 0)]
        return Rotation(
            jnp.pad(jnp.cos(angles), still, constant_values=1.0), jnp.pad(jnp.sin(angles), still)
        )


def grid_coordinates(grid: tuple[int, int]) -> np.ndarray:
    """(y, x) of the centres of patches, row-major, -1 to 1 over the image: (rows * columns, 2)
    float32."""
    centres = [(2 * np.arange(n) + 1) / n - 1 for n in grid]
    y, x = np.meshgrid(*centres, indexing="ij")
    return np.stack([y.ravel(), x.ravel()], axis=1).astype(np.float32)


def rotate(x: jax.Array, rotation: Rotation, heads: int) -> jax.Array:
    """Queries or keys (B, T, h * d), rotated in float32."""
    split = rearrange(x, "b t (h d) -> b t h d", h=heads).astype(jnp.float32)
    low, high = jnp.split(split, 2, axis=-1)
    turned = jnp.concatenate([-high, low], axis=-1)
    cos, sin = (table[..., None, :] for table in rotation)
    return rearrange(split * cos + turned * sin, "b t h d -> b t (h d)").astype(x.dtype)
