"""Which patches a method hides. MAE: every example draws for itself, by its place in the global
batch (``models/mae.py`` hides by what is drawn). iBOT: every group of examples draws for itself,
by its number.

Shape letters: B images, N = h x w patches; G groups of M crops, U rows of the buffer of masked
patches.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

# Of iBOT's blocks: the least area in patches, width / height within these bounds, attempts to
# place one.
_LEAST_AREA = 4.0
_ASPECT = (0.3, 1 / 0.3)
_ATTEMPTS = 10
# (key, mask (h, w), patches that are missing, whether the last ten attempts failed)
_Drawing = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


def per_example_noise(rng: jax.Array, positions: jax.Array, num_patches: int) -> jax.Array:
    """Uniform noise (B, N); row b depends on ``rng`` and ``positions[b]`` alone, not on the batch
    around it."""
    return jax.vmap(lambda p: jax.random.uniform(jax.random.fold_in(rng, p), (num_patches,)))(
        positions
    )


@dataclasses.dataclass(frozen=True)
class BlockMasking:
    """How iBOT masks (Zhou et al., arXiv 2111.07832, with DINOv2's stratified ratios).

    Of the M crops of a group exactly n = int(M * probability) are masked. Their ratios are spread
    evenly: the i-th takes int(N * r) patches, r uniform in the i-th of n equal parts of
    [ratio_min, ratio_max]; which crop gets which is drawn. The originals take a device's crops for
    a group; a named group makes the masks independent of the devices.

    Raises:
      ValueError: when a field is out of range.
    """

    probability: float = 0.5
    ratio_min: float = 0.1
    ratio_max: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.probability <= 1:
            raise ValueError(f"probability = {self.probability} must lie in (0, 1]")
        if not 0 <= self.ratio_min <= self.ratio_max <= 1:
            raise ValueError(
                f"ratio_min = {self.ratio_min}, ratio_max = {self.ratio_max}: must satisfy "
                "0 <= ratio_min <= ratio_max <= 1"
            )

    def edges(self, crops: int) -> np.ndarray:
        """The bounds of the n parts, (n + 1,)."""
        return np.linspace(self.ratio_min, self.ratio_max, int(crops * self.probability) + 1)

    def most(self, crops: int, patches: int) -> int:
        """The most patches that a group of ``crops`` can hide: the size U of its buffer."""
        return sum(int(patches * edge) for edge in self.edges(crops)[1:])

    def draw(self, rng: jax.Array, groups: int, crops: int, grid: tuple[int, int]) -> jax.Array:
        """Masks (G, M, N) bool, True where hidden. Group g depends on ``rng`` and g alone."""
        edges, patches = self.edges(crops), grid[0] * grid[1]
        low, high = jnp.asarray(edges[:-1], jnp.float32), jnp.asarray(edges[1:], jnp.float32)
        # in float32 a ratio can round up to its upper edge; the buffer counts on the truncated one
        limits = jnp.asarray([int(patches * edge) for edge in edges[1:]], jnp.int32)

        def group(key: jax.Array) -> jax.Array:
            ratio_key, block_key, order_key = jax.random.split(key, 3)
            ratios = low + (high - low) * jax.random.uniform(ratio_key, low.shape)
            targets = jnp.minimum((patches * ratios).astype(jnp.int32), limits)
            masks = block_masks(jax.random.split(block_key, len(low)), targets, grid)
            places = jax.random.permutation(order_key, crops)[: len(low)]
            hidden = rearrange(masks, "n h w -> n (h w)")
            return jnp.zeros((crops, patches), bool).at[places].set(hidden)

        keys = jax.vmap(functools.partial(jax.random.fold_in, rng))(jnp.arange(groups))
        return jax.vmap(group)(keys)


def block_masks(keys: jax.Array, targets: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """Masks (M, h, w) bool of about ``targets`` (M,) hidden patches each, never more, as unions of
    rectangles (BEiT's blocks, Bao et al., arXiv 2106.08254, algorithm 1, as DINOv2 draws them).

    A rectangle has an area uniform between 4 and what is missing (at most half the grid), an aspect
    ratio log-uniform in [0.3, 1 / 0.3] and a uniform place; it is taken if it hides something new
    and not more than is missing. When ten rectangles in a row are not taken, the mask stays as it
    is. ``keys``: (M,). The ten attempts at one rectangle do not depend on each other, so they are
    drawn together and the first that fits is taken.
    """
    h, w = grid
    half = h // 2 * w
    rows, columns = jnp.arange(h), jnp.arange(w)
    low, high = map(math.log, _ASPECT)

    def attempt(state: _Drawing) -> _Drawing:
        key, mask, missing, _ = state
        key, draw = jax.random.split(key)
        area, aspect, top, left = jax.random.uniform(draw, (4, _ATTEMPTS))
        cap = jnp.minimum(missing, half)
        area = _LEAST_AREA + (cap - _LEAST_AREA) * area
        aspect = jnp.exp(low + (high - low) * aspect)
        height = jnp.round(jnp.sqrt(area * aspect)).astype(jnp.int32)
        width = jnp.round(jnp.sqrt(area / aspect)).astype(jnp.int32)
        top = (top * (h - height + 1)).astype(jnp.int32)
        left = (left * (w - width + 1)).astype(jnp.int32)
        in_rows = (rows >= top[:, None]) & (rows < (top + height)[:, None])
        in_columns = (columns >= left[:, None]) & (columns < (left + width)[:, None])
        new = in_rows[:, :, None] & in_columns[:, None, :] & ~mask  # (attempts, h, w)
        count = new.sum(axis=(1, 2))
        fits = (height < h) & (width < w) & (count > 0) & (count <= cap)
        first = jnp.argmax(fits)
        taken = fits[first]
        mask = mask | (new[first] & taken)
        return key, mask, missing - jnp.where(taken, count[first], 0), ~taken

    def unfinished(state: _Drawing) -> jax.Array:
        _, _, missing, stuck = state
        return (missing > 0) & ~stuck

    def one(key: jax.Array, target: jax.Array) -> jax.Array:
        start = (key, jnp.zeros((h, w), bool), target.astype(jnp.int32), jnp.zeros((), bool))
        return jax.lax.while_loop(unfinished, attempt, start)[1]

    return jax.vmap(one)(keys, targets)


class MaskedPatches(NamedTuple):
    """The places of the masked patches of each group, in a buffer of fixed size.

    indices: (G, U) int32 into the M * N patches of the group. weights: (G, U) float32,
    1 / (masked patches of the same crop), and 0 where the buffer is padding.
    """

    indices: jax.Array
    weights: jax.Array


def masked_patches(masks: jax.Array, size: int) -> MaskedPatches:
    """The buffer of ``size`` rows a group for masks (G, M, N) of at most as many patches."""
    weights = masks / jnp.maximum(masks.sum(axis=-1, keepdims=True), 1)
    flat = rearrange(masks, "g m n -> g (m n)")
    indices = jnp.argsort(~flat, axis=1)[:, :size]  # stable: the masked ones first, in order
    weights = jnp.take_along_axis(rearrange(weights, "g m n -> g (m n)"), indices, axis=1)
    return MaskedPatches(indices, weights.astype(jnp.float32))
