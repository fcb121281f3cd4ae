"""Loss functions, on global arrays, in float32. Each names its equation.

Shape letters: B images, N patches, P values a patch; R rows (CLS tokens or masked patches),
K prototypes, G groups, D width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from webssl_jax.models.layers import l2_normalise

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


def sinkhorn_knopp(
    logits: jax.Array, temperature: jax.Array, iterations: int = 3, valid: jax.Array | None = None
) -> jax.Array:
    """Assigns rows to prototypes so that all prototypes get equal shares (Caron et al.,
    arXiv 2006.09882, eq. 3 to 5, as in DINOv2): normalises exp(logits / temperature) over the rows
    of every prototype, then over the prototypes of every row, ``iterations`` times.

    logits: (R, K), all rows of the global batch. valid: (R,), 0 marks rows that are padding: they
    take no part and come back as zeros. Returns (R, K) float32; valid rows add up to 1.

    The matrix is kept as it is and only its row and column factors change, so that an iteration
    reads it twice and writes nothing.
    """
    scaled = logits.astype(jnp.float32) / temperature
    if valid is None:
        valid = jnp.ones(scaled.shape[:1], jnp.float32)
    valid = valid.astype(jnp.float32)[:, None]
    # Any common factor drops out in the first normalisation; this one keeps exp from overflowing.
    largest = jnp.max(jnp.where(valid > 0, scaled, -jnp.inf))
    matrix = jnp.where(valid > 0, jnp.exp(scaled - largest), 0.0)
    rows = valid
    for _ in range(iterations):
        columns = _inverse((matrix * rows).sum(axis=0, keepdims=True))
        rows = _inverse((matrix * columns).sum(axis=1, keepdims=True))
    return matrix * rows * columns


def _inverse(x: jax.Array) -> jax.Array:
    """1 / x, and 0 where x is: of padding, and of prototypes so far away that exp underflows."""
    return jnp.where(x > 0, 1 / jnp.where(x > 0, x, 1.0), 0.0)


def centred_softmax(logits: jax.Array, centre: jax.Array, temperature: jax.Array) -> jax.Array:
    """DINO's teacher (Caron et al., arXiv 2104.14294, eq. 1 and 4): softmax((logits - centre) /
    temperature), (R, K) float32. ``centre`` (K,) is that of the steps before."""
    return jax.nn.softmax((logits.astype(jnp.float32) - centre) / temperature, axis=-1)


def next_centre(centre: jax.Array, batch_mean: jax.Array, momentum: float) -> jax.Array:
    """The centre (K,) for the step after this one: momentum * centre + (1 - momentum) * mean."""
    return momentum * centre + (1 - momentum) * batch_mean


def cross_entropies(teacher: jax.Array, student: jax.Array, temperature: float) -> jax.Array:
    """-sum_k teacher log softmax(student / temperature), of every teacher view with every student
    view of the same image.

    teacher: (B, T, K) probabilities. student: (B, S, K) logits. Returns (B, T, S) float32.
    """
    log_probabilities = jax.nn.log_softmax(student.astype(jnp.float32) / temperature, axis=-1)
    return -jnp.einsum(
        "btk,bsk->bts", teacher, log_probabilities, precision=jax.lax.Precision.HIGHEST
    )


def masked_patch_loss(
    teacher: jax.Array, student: jax.Array, weights: jax.Array, crops: int, temperature: float
) -> jax.Array:
    """iBOT's loss (Zhou et al., arXiv 2111.07832, eq. 2, as in DINOv2): the cross-entropies of the
    masked patches, each times 1 / (masked patches of its crop), summed and divided by all
    ``crops``, masked or not.

    teacher: (R, K) probabilities. student: (R, K) logits. weights: (R,), 0 where a row is padding.
    """
    rows = cross_entropies(teacher[:, None], student[:, None], temperature)[:, 0, 0]
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
    difference = x - jnp.take_along_axis(x, nearest[:, :, None], axis=1) + eps
    return -jnp.log(jnp.linalg.norm(difference, axis=-1) + eps).mean()


def entropy(probabilities: jax.Array) -> jax.Array:
    """-sum p log p over the last axis, in nats; 0 log 0 = 0."""
    return jax.scipy.special.entr(probabilities).sum(axis=-1)
