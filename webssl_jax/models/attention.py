"""Multi-head self-attention (Vaswani et al. 2017), softmax in float32.

Written out rather than taken from a kernel: at a few hundred tokens XLA's fusion is as fast as the
Pallas kernels that have to transpose and pad around themselves. What is written by hand is the
backward pass of :func:`lean_attention`, by the formulas of FlashAttention (Dao et al., arXiv
2205.14135, algorithm 4) but without its tiles.

Shape letters: B images, T tokens, D width, h heads, d channels a head.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from webssl_jax.models.layers import LANES, Tokens, dense, layer_norm, save_as
from webssl_jax.models.sizes import BlockConfig


class Attention(nn.Module):
    """(B, T, D) -> (B, T, D), or several such. Kernels of q, k, v are (D, h * d), head-major. With
    ``config.causal`` a token sees itself and those before it only."""

    config: BlockConfig

    @nn.compact
    def __call__(self, x: Tokens, gain: jax.Array | None = None) -> Tokens:
        c = self.config

        def heads(name: str) -> Tokens:
            projected = save_as("qkv", dense(c, c.width, name, fused=3, use_bias=c.qkv_bias)(x))
            return jax.tree.map(lambda y: y.reshape(*y.shape[:2], c.heads, c.head_dim), projected)

        mix = dot_product_attention if c.remat == "none" else lean_attention
        mixed = jax.tree.map(lambda *qkv: mix(*qkv, c.causal), heads("q"), heads("k"), heads("v"))
        mixed = jax.tree.map(lambda y: y.reshape(*y.shape[:2], c.width), mixed)
        # what follows in the block starts from it
        return save_as("attn", dense(c, c.width, "out")(mixed, gain))


def dot_product_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, causal: bool = False
) -> jax.Array:
    """softmax(q k^T / sqrt(d)) v over (B, T, h, d). Scores and softmax are float32 whatever the
    inputs are."""
    return jnp.einsum("bhqk,bkhd->bqhd", attention_weights(q, k, causal).astype(v.dtype), v)


def attention_weights(q: jax.Array, k: jax.Array, causal: bool = False) -> jax.Array:
    """softmax(q k^T / sqrt(d)) of (B, Tq, h, d) and (B, Tk, h, d): (B, h, Tq, Tk) float32. Causal:
    0 where the key comes after the query, Tq = Tk."""
    return jax.nn.softmax(_scores(q, k, causal), axis=-1)


def _scores(q: jax.Array, k: jax.Array, causal: bool) -> jax.Array:
    scores = jnp.einsum(
        "bqhd,bkhd->bhqk", q * q.shape[-1] ** -0.5, k, preferred_element_type=jnp.float32
    )
    return _masked(scores) if causal else scores


def _masked(scores: jax.Array) -> jax.Array:
    """(..., T, T) with -inf where the key comes after the query."""
    return jnp.where(jnp.tri(scores.shape[-1], dtype=bool), scores, -jnp.inf)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def lean_attention(q: jax.Array, k: jax.Array, v: jax.Array, causal: bool = False) -> jax.Array:
    """:func:`dot_product_attention`, for blocks that run again in the backward pass.

    Of everything that is T x T that pass keeps nothing: from the output, labelled ``attn``, and the
    logarithm of each row's sum it works the weights out again, and it never adds up along T x T.

    A TPU's products take 128 channels, whether or not a head has so many. Where heads have 64, two
    are taken together, and of keys and values there is a copy for each in which the other's
    channels are 0: as many products, but nothing has to be laid out anew for 64 channels. As
    modelled for a v5p and T = 257, forward and backward of h x d = 24 x 64 take 72 us an image
    instead of 113. A CPU is the slower for all this.
    """
    return _lean_forward(q, k, v, causal)[0]


# From here on p counts groups of s heads, c the channels of a group: c = s d.
def _lean_forward(q, k, v, causal):
    shape, share = q.shape, _share(*q.shape[2:])
    q, k, v = (x.reshape(*shape[:2], shape[2] // share, -1) for x in (q, k, v))
    scores = _group_scores(q, _apart(k, share), causal)
    largest = scores.max(axis=-1)
    parts = jnp.exp(scores - largest[..., None])
    total = parts.sum(axis=-1)
    weights = (parts / total[..., None]).astype(v.dtype)
    mixed = jnp.einsum("bspqk,bskpc->bqpc", weights, _apart(v, share))
    mixed, logs = save_as("attn", mixed), save_as("attn", largest + jnp.log(total))
    return mixed.reshape(shape), (q, k, v, mixed, logs)


def _lean_backward(causal, kept, slope):
    """The gradients of q, k, v from that of the output, ``slope`` (B, T, h, d)."""
    q, k, v, mixed, logs = kept
    shape, share = slope.shape, logs.shape[1]
    slope = slope.reshape(q.shape)
    keys, values, queries, slopes = (_apart(x, share) for x in (k, v, q, slope))
    weights = jnp.exp(_group_scores(q, keys, causal) - logs[..., None])
    # sum_k weights * (slope v^T): what normalising takes from the gradient of each row's scores
    taken = (slopes.astype(jnp.float32) * mixed[:, None].astype(jnp.float32)).sum(axis=-1)
    bent = jnp.einsum("bqpc,bskpc->bspqk", slope, values, preferred_element_type=jnp.float32)
    bent = (weights * (bent - taken.swapaxes(2, 3)[..., None])).astype(v.dtype)
    scale = shape[-1] ** -0.5
    gradients = (
        jnp.einsum("bspqk,bskpc->bqpc", bent, keys) * scale,
        jnp.einsum("bspqk,bsqpc->bkpc", bent, queries) * scale,
        jnp.einsum("bspqk,bsqpc->bkpc", weights.astype(v.dtype), slopes),
    )
    return tuple(x.reshape(shape) for x in gradients)


def _share(heads: int, channels: int) -> int:
    """How many heads are taken together: those that fill a TPU's lanes exactly, else 1."""
    share = max(LANES // channels, 1)
    return share if share * channels == LANES and heads % share == 0 else 1


def _apart(x: jax.Array, share: int) -> jax.Array:
    """(B, T, p, c) -> (B, s, T, p, c): for each head of a group a copy with only its channels."""
    if share == 1:
        return x[:, None]
    owner = np.arange(x.shape[-1]) // (x.shape[-1] // share)
    return jnp.stack([jnp.where(owner == head, x, 0) for head in range(share)], axis=1)


def _group_scores(q: jax.Array, keys: jax.Array, causal: bool) -> jax.Array:
    """:func:`_scores` of (B, T, p, c) and :func:`_apart` of the keys: (B, s, p, Tq, Tk)."""
    scale = (q.shape[-1] // keys.shape[1]) ** -0.5
    scores = jnp.einsum("bqpc,bskpc->bspqk", q * scale, keys, preferred_element_type=jnp.float32)
    return _masked(scores) if causal else scores


lean_attention.defvjp(_lean_forward, _lean_backward)


def cls_attention(config: BlockConfig, block: Mapping[str, Any], x: jax.Array) -> jax.Array:
    """How one block's CLS token spreads its attention: (B, h, T) float32, rows adding up to 1.

    The block itself keeps no weights, so they are computed again from what entered it. ``block``:
    its parameters, without the axis of stacked layers. ``x``: (B, T, D), the tokens before its
    first norm, CLS first.
    """
    c = config
    x = layer_norm(c, None).apply({"params": block["norm1"]}, x)

    def heads(name: str, tokens: jax.Array) -> jax.Array:
        layer = dense(c, c.width, None, use_bias=c.qkv_bias)
        projected = layer.apply({"params": block["attn"][name]}, tokens)
        return projected.reshape(*tokens.shape[:2], c.heads, c.head_dim)

    return attention_weights(heads("q", x[:, :1]), heads("k", x))[:, :, 0]
