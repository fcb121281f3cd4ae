"""Multi-head self-attention (Vaswani et al. 2017), softmax in float32.

Written out rather than taken from a kernel: at a few hundred tokens XLA's fusion is as fast as the
Pallas kernels that have to transpose and pad around themselves. What is written by hand is the
backward pass of :func:`lean_attention`, by the formulas of FlashAttention (Dao et al., arXiv
2205.14135, algorithm 4) but without its tiles.

Shape letters: B images, T tokens, D width, h heads, d channels a head.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from webssl_jax.models.layers import dense, layer_norm, save_as
from webssl_jax.models.sizes import BlockConfig


class Attention(nn.Module):
    """(B, T, D) -> (B, T, D). Kernels of q, k, v are (D, h * d), head-major. With ``config.causal``
    a token sees itself and those before it only.

    ``segments`` says that every row holds several sequences one after the other, which do not see
    each other: (number, tokens of each), ... in order. None: the row is one sequence.
    """

    config: BlockConfig

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        segments: Sequence[tuple[int, int]] | None = None,
        gain: jax.Array | None = None,
    ) -> jax.Array:
        c = self.config
        b, t, _ = x.shape

        def heads(name: str) -> jax.Array:
            projected = dense(c, c.width, name, fused=3, use_bias=c.qkv_bias)(x)
            return save_as("qkv", projected).reshape(b, t, c.heads, c.head_dim)

        q, k, v = heads("q"), heads("k"), heads("v")
        mix = dot_product_attention if c.remat == "none" else lean_attention
        parts, start = [], 0
        for number, tokens in segments or ((1, t),):
            end = start + number * tokens
            cut = (x[:, start:end].reshape(-1, tokens, c.heads, c.head_dim) for x in (q, k, v))
            mixed = mix(*cut, c.causal)
            parts.append(mixed.reshape(b, end - start, c.width))
            start = end
        mixed = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)
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
    if causal:
        seen = jnp.tri(scores.shape[-1], dtype=bool)
        scores = jnp.where(seen, scores, -jnp.inf)
    return scores


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def lean_attention(q: jax.Array, k: jax.Array, v: jax.Array, causal: bool = False) -> jax.Array:
    """:func:`dot_product_attention`, for blocks that run again in the backward pass.

    Of everything that is T x T that pass keeps nothing: from the output, labelled ``attn``, and the
    logarithm of each row's sum it works the weights out again, and it never adds up along T x T. On
    a v5p, T = 257, forward and backward with h x d = 32 x 128 are modelled at 153 us an image
    instead of 225, with 24 x 64 at 91 instead of 108. A CPU is the slower for it.
    """
    return _lean_forward(q, k, v, causal)[0]


def _lean_forward(q, k, v, causal):
    scores = _scores(q, k, causal)
    largest = scores.max(axis=-1)
    parts = jnp.exp(scores - largest[..., None])
    total = parts.sum(axis=-1)
    mixed = jnp.einsum("bhqk,bkhd->bqhd", (parts / total[..., None]).astype(v.dtype), v)
    mixed, logs = save_as("attn", mixed), save_as("attn", largest + jnp.log(total))
    return mixed, (q, k, v, mixed, logs)


def _lean_backward(causal, kept, slope):
    """The gradients of q, k, v from that of the output, ``slope`` (B, T, h, d)."""
    q, k, v, mixed, logs = kept
    weights = jnp.exp(_scores(q, k, causal) - logs[..., None])
    # sum_k weights * (slope v^T): what normalising takes from the gradient of each row's scores
    taken = (slope.astype(jnp.float32) * mixed.astype(jnp.float32)).sum(axis=-1).swapaxes(1, 2)
    slopes = jnp.einsum("bqhd,bkhd->bhqk", slope, v, preferred_element_type=jnp.float32)
    slopes = (weights * (slopes - taken[..., None])).astype(v.dtype)
    scale = q.shape[-1] ** -0.5
    return (
        jnp.einsum("bhqk,bkhd->bqhd", slopes, k) * scale,
        jnp.einsum("bhqk,bqhd->bkhd", slopes, q) * scale,
        jnp.einsum("bhqk,bqhd->bkhd", weights.astype(v.dtype), slope),
    )


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
