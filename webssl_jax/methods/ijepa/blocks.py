"""Which patches I-JEPA shows and which it asks for (Assran et al., arXiv 2301.08243, section 3, and
its public code): several target blocks and one context block an image.

The size of the blocks is drawn once a step, their places for every image by its number in the
global batch. What no target covers of the context block is shown.

As in the original, corners are drawn from [0, side - block), so the last row and column are neither
shown nor asked for. Other than there, where all contexts of a device's batch are cut to the
shortest of them, contexts are filled up to one fixed length, and cut only where they are longer: so
what an image shows depends neither on the devices nor on its neighbours.

Shape letters: B images, h x w = N patches, M target blocks, T the patches of the largest target
block, K the length of contexts.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_TRIES = 20  # contexts that are drawn before one target less is taken out of them


class Blocks(NamedTuple):
    """context (B, K) int32 and context_present (B, K) bool: which patches are shown, in order, and
    which of these are there. targets, targets_present: the same (B, M, T)."""

    context: jax.Array
    context_present: jax.Array
    targets: jax.Array
    targets_present: jax.Array


@dataclasses.dataclass(frozen=True)
class MultiBlock:
    """How blocks are drawn.

    targets: how many. target_scale: (least, most) share of the patches in one of them;
    target_aspect: of height / width. One number a step says where between both lie. context_scale:
    the share of the context block, which is a square. min_keep: the patches that a context must
    keep more of, when the targets are taken out. context_patches: the length of contexts, 0 for
    half of the patches.

    Raises:
      ValueError: when a field is out of range.
    """

    targets: int = 4
    target_scale: tuple[float, ...] = (0.15, 0.2)
    target_aspect: tuple[float, ...] = (0.75, 1.5)
    context_scale: tuple[float, ...] = (0.85, 1.0)
    min_keep: int = 10
    context_patches: int = 0

    def __post_init__(self) -> None:
        if self.targets < 1 or self.min_keep < 0 or self.context_patches < 0:
            raise ValueError(
                f"targets = {self.targets}, min_keep = {self.min_keep}, context_patches = "
                f"{self.context_patches}: must be at least 1, 0 and 0"
            )
        for name in ("target_scale", "target_aspect", "context_scale"):
            bounds = getattr(self, name)
            most = np.inf if name == "target_aspect" else 1
            if len(bounds) != 2 or not 0 < bounds[0] <= bounds[1] <= most:
                raise ValueError(f"{name} = {bounds} must be (least, most)")

    def check(self, grid: tuple[int, int]) -> None:
        """Raises:
        ValueError: for a grid of patches in which such blocks have no place.
        """
        if min(grid) < 2:
            raise ValueError(f"a grid of {grid[0]}x{grid[1]} patches has no room for blocks")
        least = int(self._areas(grid).min())
        if least <= self.min_keep:
            raise ValueError(
                f"masks.min_keep = {self.min_keep}: a target of {grid[0]}x{grid[1]} patches may "
                f"have {least}, and it must have more; take a smaller one"
            )
        if self.length(grid) > grid[0] * grid[1]:
            raise ValueError(
                f"masks.context_patches = {self.context_patches}: there are "
                f"{grid[0] * grid[1]} patches"
            )

    def length(self, grid: tuple[int, int]) -> int:
        """K."""
        return self.context_patches or grid[0] * grid[1] // 2

    def most(self, grid: tuple[int, int]) -> int:
        """T."""
        return int(self._areas(grid).max())

    def _areas(self, grid: tuple[int, int]) -> np.ndarray:
        """Patches of targets, of every size."""
        with jax.ensure_compile_time_eval():  # the loss asks for it while it is traced
            height, width = self.target_size(_numbers(), grid)
            return np.asarray(height * width)

    def target_size(self, u: jax.Array, grid: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
        """(height, width) of targets, int32, for uniform numbers ``u``."""
        low, high = self.target_aspect
        return _size(u, self.target_scale, low + u * (high - low), grid)

    def context_size(self, u: jax.Array, grid: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
        """(height, width) of the context block."""
        return _size(u, self.context_scale, jnp.ones_like(u), grid)

    def draw(self, rng: jax.Array, positions: jax.Array, grid: tuple[int, int]) -> Blocks:
        """The blocks of images with these numbers in the global batch, (B,) int32."""
        size_rng, place_rng = jax.random.split(rng)
        u_target, u_context = jax.random.uniform(size_rng, (2,))
        target, context = self.target_size(u_target, grid), self.context_size(u_context, grid)

        def one(position: jax.Array) -> Blocks:
            rngs = jax.random.split(jax.random.fold_in(place_rng, position))
            corners = _corners(rngs[0], self.targets, target, grid)
            tries = _corners(rngs[1], (self.targets + 1) * _TRIES, context, grid)
            return self.place(corners, target, tries, context, grid)

        return jax.vmap(one)(positions)

    def place(
        self,
        corners: jax.Array,
        target: tuple[jax.Array, jax.Array],
        tries: jax.Array,
        context: tuple[jax.Array, jax.Array],
        grid: tuple[int, int],
    ) -> Blocks:
        """The blocks of one image, without the axis B. corners (M, 2) of targets and tries (A, 2)
        of contexts, (top, left); target, context: their (height, width). Of the tries the first is
        taken that keeps more than ``min_keep`` without the targets; after every 20 of them one
        target less is taken out."""
        hidden = _rectangles(corners, target, grid)
        shown = _rectangles(tries, context, grid)
        # covered[i]: by the first i targets
        covered = jnp.concatenate([jnp.zeros((1, *grid), bool), _union_so_far(hidden)])
        removed = self.targets - jnp.arange(len(tries)) // _TRIES
        shown &= ~covered[jnp.maximum(removed, 0)]
        first = jnp.argmax(shown.sum(axis=(1, 2)) > self.min_keep)
        kept = shown[first].ravel()
        order = jnp.argsort(~kept)[: self.length(grid)]  # stable: those that are shown, row-major
        present = jnp.arange(len(order)) < kept.sum()

        place = jnp.arange(self.most(grid))
        top = corners[:, :1] + place // target[1]
        left = corners[:, 1:] + place % target[1]
        inside = jnp.broadcast_to(place < target[0] * target[1], top.shape)
        places = jnp.where(inside, top * grid[1] + left, 0)
        return Blocks(order.astype(jnp.int32), present, places.astype(jnp.int32), inside)


def _numbers() -> jax.Array:
    """So many that no size of a block is missed."""
    return jnp.asarray(np.linspace(0, 1, 10_001, dtype=np.float32)[:-1])


def _size(
    u: jax.Array, scale: tuple[float, ...], aspect: jax.Array, grid: tuple[int, int]
) -> tuple[jax.Array, jax.Array]:
    """(height, width) of a block of a share in ``scale`` of the grid, each at least one patch
    shorter than it."""
    area = jnp.floor(grid[0] * grid[1] * (scale[0] + u * (scale[1] - scale[0])))
    sides = jnp.sqrt(area * aspect), jnp.sqrt(area / aspect)
    height, width = (
        jnp.minimum(jnp.round(side), most - 1).astype(jnp.int32) for side, most in zip(sides, grid)
    )
    return height, width


def _corners(
    rng: jax.Array, count: int, size: tuple[jax.Array, jax.Array], grid: tuple[int, int]
) -> jax.Array:
    """(count, 2) int32: top and left, each from 0 up to and without side - block."""
    room = jnp.asarray(grid) - jnp.stack(size)
    return (jax.random.uniform(rng, (count, 2)) * room).astype(jnp.int32)


def _rectangles(
    corners: jax.Array, size: tuple[jax.Array, jax.Array], grid: tuple[int, int]
) -> jax.Array:
    """(count, rows, columns) bool, True inside."""
    spans = [
        (jnp.arange(side) >= start[:, None]) & (jnp.arange(side) < start[:, None] + length)
        for side, start, length in zip(grid, corners.T, size)
    ]
    return spans[0][:, :, None] & spans[1][:, None, :]


def _union_so_far(masks: jax.Array) -> jax.Array:
    return jnp.cumsum(masks, axis=0) > 0
