"""Which patches a method hides. Every example draws for itself, by its place in the global batch.

Shape letters: B images, N patches, K visible patches.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class RandomMask(NamedTuple):
    """keep (B, K) int32: visible patches. restore (B, N) int32: place of each patch in the shuffled
    order, so that ``restore < K`` are the visible ones. mask (B, N) float32: 1 where hidden."""

    keep: jax.Array
    restore: jax.Array
    mask: jax.Array


def per_example_noise(rng: jax.Array, positions: jax.Array, num_patches: int) -> jax.Array:
    """Uniform noise (B, N); row b depends on ``rng`` and ``positions[b]`` alone, not on the batch
    around it."""
    return jax.vmap(lambda p: jax.random.uniform(jax.random.fold_in(rng, p), (num_patches,)))(
        positions
    )


def visible_count(num_patches: int, mask_ratio: float) -> int:
    """int(N * (1 - ratio)), as in MAE.

    Raises:
      ValueError: if that leaves nothing to see or nothing to predict.
    """
    kept = int(num_patches * (1 - mask_ratio))
    if not 0 < kept < num_patches:
        raise ValueError(
            f"mask_ratio = {mask_ratio} keeps {kept} of {num_patches} patches; some must stay, "
            "some go"
        )
    return kept


def random_mask(noise: jax.Array, kept: int) -> RandomMask:
    """MAE's per-image shuffle (arXiv 2111.06377, section 3): the ``kept`` patches with the least
    noise stay visible, in the order of their noise."""
    shuffled = jnp.argsort(noise, axis=1)
    restore = jnp.argsort(shuffled, axis=1)
    return RandomMask(shuffled[:, :kept], restore, (restore >= kept).astype(jnp.float32))
