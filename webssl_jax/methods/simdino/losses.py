"""The losses of SimDINOv2 (Wu et al., arXiv 2502.10385), in float32.

Shape letters: B images, T views of the teacher, S views of the student of which the first T are the
same crops, E channels; R rows of masked patches.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from einops import rearrange

_HIGHEST = jax.lax.Precision.HIGHEST


def agreement(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """The mean cosine of every teacher view with every other student view of the same image, to be
    as large as possible. student: (B, S, E), teacher: (B, T, E), both L2-normalised."""
    pairs = jnp.einsum("bte,bse->ts", teacher, student, precision=_HIGHEST) / len(student)
    return (pairs.sum() - jnp.trace(pairs)) / (pairs.size - len(pairs))


def coding_rate(features: jax.Array, eps: float, groups: int = 1) -> jax.Array:
    """How many directions features take, to be as large as possible (section 3.2): the mean over
    views of log det(I + E / (B eps) Z^T Z) / 2, times (E + B) / (E B).

    features: (B, V, E). groups: into how many equal parts of consecutive images the batch is cut;
    each has a covariance of its own, whose factors still count all B images. So it is in the
    original without ``reduce_cov``, a part for each device.
    """
    b, _, e = features.shape
    x = rearrange(features.astype(jnp.float32), "(g n) v e -> g v n e", g=groups)
    covariance = jnp.einsum("gvni,gvnj->gvij", x, x, precision=_HIGHEST)
    matrices = jnp.eye(e) + e / (b * eps) * covariance
    diagonals = jnp.diagonal(jnp.linalg.cholesky(matrices), axis1=-2, axis2=-1)
    return (e + b) / (e * b) * jnp.log(diagonals).sum(axis=-1).mean()


def rate_limits(images: int, channels: int, eps: float, groups: int = 1) -> tuple[float, float]:
    """(least, most) of :func:`coding_rate` of L2-normalised rows: all the same, and spread evenly
    over as many directions as there can be."""
    rows = images // groups
    rank, scale = min(rows, channels), channels / (images * eps)
    gamma = (channels + images) / (channels * images)
    least = math.log1p(scale * rows) / 2
    return gamma * least, gamma * rank * math.log1p(scale * rows / rank) / 2


def patch_cosines(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """Minus the cosines of L2-normalised rows (R, E): (R,)."""
    return -jnp.einsum("re,re->r", student, teacher, precision=_HIGHEST)
