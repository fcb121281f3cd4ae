"""Loss functions, on global arrays, in float32. Each names its equation.

Shape letters: B images, N patches, P values a patch.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

_VARIANCE_EPS = 1e-6


def patch_statistics(patches: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and standard deviation (B, N, 1) of each patch of (B, N, P), as MAE normalises with: the
    variance is the unbiased one (divided by P - 1) plus 1e-6."""
    mean = patches.mean(axis=-1, keepdims=True)
    variance = patches.var(axis=-1, ddof=1, keepdims=True)
    return mean, jnp.sqrt(variance + _VARIANCE_EPS)


def masked_pixel_loss(
    prediction: jax.Array, patches: jax.Array, mask: jax.Array, normalise: bool
) -> jax.Array:
    """MAE's reconstruction loss (arXiv 2111.06377, section 3): mean squared error over the hidden
    patches.

    prediction, patches: (B, N, P). mask: (B, N), 1 where hidden. normalise: predict each patch
    minus its mean over its standard deviation instead of plain pixels. Returns a scalar.
    """
    if normalise:
        mean, std = patch_statistics(patches)
        patches = (patches - mean) / std
    error = jnp.square(prediction - patches).mean(axis=-1)
    return (error * mask).sum() / mask.sum()
