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


def rotate(x: jax.Array, rotation: Rotation, heads: int, together: int = 0) -> jax.Array:
    """Queries or keys (B, T, h * d), rotated in float32. together: :func:`_by_product` of so many
    heads at a time, which ``heads`` must be a multiple of; 0 for none."""
    if together:
        split = rearrange(x, "b t (g c) -> b t g c", g=heads // together)
        turn = np.kron(np.eye(together), _half_turn(split.shape[-1] // together))
        wide = Rotation(*(jnp.tile(table, together) for table in rotation))
        return rearrange(_by_product(split, wide, turn), "b t g c -> b t (g c)")
    split = rearrange(x, "b t (h d) -> b t h d", h=heads).astype(jnp.float32)
    low, high = jnp.split(split, 2, axis=-1)
    turned = jnp.concatenate([-high, low], axis=-1)
    cos, sin = (table[..., None, :] for table in rotation)
    return rearrange(split * cos + turned * sin, "b t h d -> b t (h d)").astype(x.dtype)


def _half_turn(d: int) -> np.ndarray:
    """(d, d): a product with it takes (low, high) to (-high, low)."""
    return np.kron([[0.0, 1.0], [-1.0, 0.0]], np.eye(d // 2))


@jax.custom_vjp
def _by_product(x: jax.Array, rotation: Rotation, turn: np.ndarray) -> jax.Array:
    """(B, T, g, c), rotated; the halves of heads change places by a product with ``turn`` (c, c).

    In bfloat16 such a product is exact, so the result is the other form's. Half a head is half of a
    TPU's lanes at most: to cut and join there takes passes over float32 that are written out. The
    gradient is the rotation back, as both halves have the same angles; that of the formula would
    round to bfloat16 before it adds.
    """
    turned = x @ turn.astype(x.dtype)
    cos, sin = (table[..., None, :] for table in rotation)
    return (x.astype(jnp.float32) * cos + turned.astype(jnp.float32) * sin).astype(x.dtype)


def _by_product_backward(saved: tuple[Rotation, np.ndarray], d: jax.Array) -> tuple:
    (cos, sin), turn = saved
    return _by_product(d, Rotation(cos, -sin), turn), None, None


_by_product.defvjp(
    lambda x, rotation, turn: (_by_product(x, rotation, turn), (rotation, turn)),
    _by_product_backward,
)
