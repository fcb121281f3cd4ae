"""The linear heads of dense evaluations, as pure functions of parameters and patch features.

A 1x1 convolution commutes with bilinear resizing, whose weights add up to 1. So heads are applied
to the grid of patches and their outputs are enlarged, where the originals enlarge features: the
same numbers for a fraction of the memory. (In depth the originals enlarge between two steps, and so
do we.)

Shape letters: B images, h x w patches, D channels, C classes, K bins.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

BN_EPS = 1e-5
BN_MOMENTUM = 0.1  # new = 0.9 old + 0.1 batch, as PyTorch counts it
BINS = 256
_FLOOR = 0.1  # added to what the bins get, so that none is empty (DINOv2's "linear" normalisation)
_ENLARGE = 4  # depth: before probabilities are made of the bins
Params = dict[str, Any]


class Running(NamedTuple):
    """Statistics of the batches so far: mean (D,) and variance (D,)."""

    mean: jax.Array
    var: jax.Array


def resize(x: jax.Array, height: int, width: int) -> jax.Array:
    """Bilinear, (B, h, w, C) -> (B, height, width, C): PyTorch's ``interpolate`` with
    ``align_corners=False``, which does not smooth when it shrinks."""
    shape = (x.shape[0], height, width, x.shape[-1])
    return jax.image.resize(
        x, shape, "linear", antialias=False, precision=jax.lax.Precision.HIGHEST
    )


def init_segmentation(rng: jax.Array, width: int, classes: int) -> tuple[Params, Running]:
    """BatchNorm and 1x1 convolution of D = ``width`` channels; weights N(0, 0.01), no bias."""
    kernel = 0.01 * jax.random.normal(rng, (width, classes))
    params = {
        "norm": {"scale": jnp.ones(width), "bias": jnp.zeros(width)},
        "conv": {"kernel": kernel, "bias": jnp.zeros(classes)},
    }
    return params, Running(jnp.zeros(width), jnp.ones(width))


def segmentation(
    params: Params, running: Running, features: jax.Array, train: bool
) -> tuple[jax.Array, Running]:
    """(B, h, w, D) -> logits (B, h, w, C), and the statistics after this batch.

    train: by the statistics of the whole batch, over all devices (SyncBN); else by ``running``.
    """
    mean, var = running
    if train:
        mean, var = features.mean(axis=(0, 1, 2)), features.var(axis=(0, 1, 2))
        count = features[..., 0].size
        unbiased = var * (count / max(count - 1, 1))
        running = Running(*(_blend(old, new) for old, new in zip(running, (mean, unbiased))))
    scale = params["norm"]["scale"] * jax.lax.rsqrt(var + BN_EPS)
    return _conv(params["conv"], (features - mean) * scale + params["norm"]["bias"]), running


def init_depth(rng: jax.Array, width: int) -> Params:
    """1x1 convolution of D = ``width`` channels to K bins, with PyTorch's default numbers: uniform
    in +- 1 / sqrt(D)."""
    bound = 1 / np.sqrt(width)
    of_kernel, of_bias = jax.random.split(rng)
    return {
        "kernel": jax.random.uniform(of_kernel, (width, BINS), minval=-bound, maxval=bound),
        "bias": jax.random.uniform(of_bias, (BINS,), minval=-bound, maxval=bound),
    }


def with_cls(blocks: Iterable[tuple[jax.Array | None, jax.Array | None]]) -> jax.Array:
    """What a depth head sees of blocks (cls (B, D), patches (B, h, w, D)): of each block its
    patches, and its CLS beside every one of them: (B, h, w, 2 D blocks)."""
    parts = []
    for cls, patches in blocks:
        assert cls is not None and patches is not None  # both were wanted
        parts += [patches, jnp.broadcast_to(cls[:, None, None], patches.shape)]
    return jnp.concatenate(parts, axis=-1)


def depth(params: Params, features: jax.Array, low: float, high: float) -> jax.Array:
    """(B, h, w, D) -> depths (B, 4 h, 4 w) in metres: the mean of K bins evenly from ``low`` to
    ``high``, weighted by relu(logit) + 0.1."""
    grid = features.shape[1] * _ENLARGE, features.shape[2] * _ENLARGE
    weights = jax.nn.relu(resize(_conv(params, features), *grid)) + _FLOOR
    bins = np.linspace(low, high, weights.shape[-1], dtype=np.float32)
    return (weights * bins).sum(axis=-1) / weights.sum(axis=-1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def clip_gradient(params: Params, most: float) -> Params:
    """``params``, whose gradient is scaled down to a norm of ``most`` where it is longer."""
    return params


def _forward(params: Params, most: float) -> tuple[Params, None]:
    return params, None


def _backward(most: float, _: None, grads: Params) -> tuple[Params]:
    scale = jnp.minimum(most / (optax.global_norm(grads) + 1e-6), 1)
    return (jax.tree.map(lambda x: x * scale, grads),)


clip_gradient.defvjp(_forward, _backward)


def _conv(params: Params, x: jax.Array) -> jax.Array:
    product = jnp.matmul(x, params["kernel"], precision=jax.lax.Precision.HIGHEST)
    return product + params["bias"]


def _blend(old: jax.Array, new: jax.Array) -> jax.Array:
    return (1 - BN_MOMENTUM) * old + BN_MOMENTUM * new
