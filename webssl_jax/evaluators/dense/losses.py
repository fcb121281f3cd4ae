"""What dense heads are trained on.

Shape letters: B images, H x W pixels, C classes, g images a group.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from webssl_jax.data.dense_views import IGNORE

_LOG_EPS = 1e-3  # metres, added before a logarithm is taken
_MEAN_SHARE = 0.15  # of the squared mean in the scale-invariant loss
WARMUP_STEPS = 100  # of the scale-invariant loss, in which only its mean counts
_STRIDES = (1, 2, 4, 6)  # of the gradient loss


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean over *all* pixels of (B, H, W, C) against (B, H, W) integers; those with the label 255
    add nothing and are counted all the same, as mmsegmentation counts them."""
    known = labels != IGNORE
    own = jnp.where(known, labels, 0).astype(jnp.int32)
    picked = jnp.take_along_axis(logits, own[..., None], axis=-1)[..., 0]
    each = jax.nn.logsumexp(logits, axis=-1) - picked
    return jnp.where(known, each, 0).mean()


def scale_invariant(
    predicted: jax.Array, truth: jax.Array, step: jax.Array | int, group: int = 2
) -> jax.Array:
    """DINOv2's SigLoss of depths (B, H, W) in metres: sqrt(var(e) + 0.15 mean(e)^2) of the log
    errors e at the pixels whose truth is above 0 (Eigen et al., arXiv 1406.2283).

    The square root is of ``group`` images together (two a GPU, as published), then the mean is
    taken over groups. In the first 100 steps it is of 0.15 mean(e)^2 alone.

    Raises:
      ValueError: if groups do not divide the batch.
    """
    if len(truth) % group:
        raise ValueError(f"a batch of {len(truth)} images does not divide into groups of {group}")
    known = (truth > 0).reshape(-1, group * truth[0].size)
    error = (_log(predicted) - _log(truth)).reshape(known.shape)
    count = known.sum(axis=1)
    mean = jnp.where(known, error, 0).sum(axis=1) / jnp.maximum(count, 1)
    squares = jnp.where(known, (error - mean[:, None]) ** 2, 0).sum(axis=1)
    var = jnp.where(step < WARMUP_STEPS, 0, squares / jnp.maximum(count - 1, 1))
    inside = var + _MEAN_SHARE * mean**2
    # A group without a known pixel, or without an error, has no slope; that of sqrt(0) is infinite.
    root = jnp.where(inside > 0, jnp.sqrt(jnp.where(inside > 0, inside, 1)), 0)
    return root.mean()


def gradient(predicted: jax.Array, truth: jax.Array) -> jax.Array:
    """Differences of log errors two rows and two columns apart, at four strides; depths (B, H, W)
    in metres.

    The original slices the batch where it means rows, so that it is exactly 0 at two images a GPU,
    which is what published figures were trained with; this is what was meant.
    """
    total = jnp.zeros(())
    for stride in _STRIDES:
        p, t = predicted[:, ::stride, ::stride], truth[:, ::stride, ::stride]
        known = t > 0
        error = jnp.where(known, _log(p) - _log(t), 0)
        down = known[:, :-2] & known[:, 2:]
        right = known[:, :, :-2] & known[:, :, 2:]
        both = (jnp.abs(error[:, :-2] - error[:, 2:]) * down).sum()
        both += (jnp.abs(error[:, :, :-2] - error[:, :, 2:]) * right).sum()
        total += both / jnp.maximum(known.sum(), 1)
    return total


def _log(metres: jax.Array) -> jax.Array:
    return jnp.log(metres + np.float32(_LOG_EPS))
