"""Loss functions, on global arrays, in float32. Each names its equation.

Those over prototypes are in prototypes.py.

Shape letters: B images, N patches, P values a patch; R rows of masked patches, G groups, D width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from webssl_jax.models.layers import gather_tokens, l2_normalise

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


def masked_patch_loss(rows: jax.Array, weights: jax.Array, crops: int) -> jax.Array:
    """iBOT's loss (Zhou et al., arXiv 2111.07832, eq. 2, as in DINOv2): the cross-entropies of the
    masked patches (R,), each times 1 / (masked patches of its crop), summed and divided by all
    ``crops``, masked or not. weights: (R,), 0 where a row is padding."""
    return jnp.where(weights > 0, rows * weights, 0.0).sum() / crops


def koleo(features: jax.Array) -> jax.Array:
    """Spreads features over the sphere (Sablayrolles et al., arXiv 1806.03198, eq. 5):
    -mean log of the distance to the nearest neighbour within the group, over L2-normalised rows.

    features: (G, n, D), n >= 2. Returns the mean over groups. Which row is nearest is not
    differentiated. The two epsilons are DINOv2's: one on every coordinate of the difference
    (``PairwiseDistance``), one in the logarithm.
    """
    eps = 1e-8
    x = features.astype(jnp.float32)
    x = l2_normalise(x, eps)
    products = jnp.einsum("gid,gjd->gij", x, x, precision=jax.lax.Precision.HIGHEST)
    products = jnp.where(jnp.eye(x.shape[1], dtype=bool), -1.0, products)
    nearest = jnp.argmax(jax.lax.stop_gradient(products), axis=-1)
    difference = x - gather_tokens(x, nearest) + eps
    return -jnp.log(jnp.linalg.norm(difference, axis=-1) + eps).mean()


def softmax_cross_entropy(
    logits: jax.Array, targets: jax.Array, label_smoothing: float = 0.0
) -> jax.Array:
    """Mean over images of the cross-entropy of (B, C) logits and targets, whose rows add up to 1.
    label_smoothing: the share of each target that all classes have alike (Szegedy et al., arXiv
    1512.00567, section 7)."""
    targets = targets * (1 - label_smoothing) + label_smoothing / targets.shape[1]
    return -(targets * jax.nn.log_softmax(logits)).sum(axis=1).mean()


def sigmoid_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean over images of the binary cross-entropies of (B, C) logits and targets, summed over
    classes (Beyer et al., arXiv 2006.07159, section 5.2)."""
    yes, no = jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
    return -(targets * yes + (1 - targets) * no).sum(axis=1).mean()


def entropy(probabilities: jax.Array) -> jax.Array:
    """-sum p log p over the last axis, in nats; 0 log 0 = 0."""
    return jax.scipy.special.entr(probabilities).sum(axis=-1)
