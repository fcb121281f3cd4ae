"""Multi-head self-attention (Vaswani et al. 2017), softmax in float32.

Written out rather than taken from a kernel: at a few hundred tokens XLA's fusion is as fast as the
Pallas kernels that have to transpose and pad around themselves.

Shape letters: B images, T tokens, D width, h heads, d channels a head.
"""

from __future__ import annotations

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
        self, x: jax.Array, segments: Sequence[tuple[int, int]] | None = None
    ) -> jax.Array:
        c = self.config
        b, t, _ = x.shape

        def heads(name: str) -> jax.Array:
            projected = dense(c, c.width, name, fused=3, use_bias=c.qkv_bias)(x)
            return save_as("qkv", projected).reshape(b, t, c.heads, c.head_dim)

        q, k, v = heads("q"), heads("k"), heads("v")
        parts, start = [], 0
        for number, tokens in segments or ((1, t),):
            end = start + number * tokens
            cut = (x[:, start:end].reshape(-1, tokens, c.heads, c.head_dim) for x in (q, k, v))
            mixed = dot_product_attention(*cut, causal=c.causal)
            parts.append(mixed.reshape(b, end - start, c.width))
            start = end
        mixed = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)
        return dense(c, c.width, "out")(save_as("attn", mixed))


def dot_product_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, causal: bool = False
) -> jax.Array:
    """softmax(q k^T / sqrt(d)) v over (B, T, h, d). Scores and softmax are float32 whatever the
    inputs are."""
    return jnp.einsum("bhqk,bkhd->bqhd", attention_weights(q, k, causal).astype(v.dtype), v)


def attention_weights(q: jax.Array, k: jax.Array, causal: bool = False) -> jax.Array:
    """softmax(q k^T / sqrt(d)) of (B, Tq, h, d) and (B, Tk, h, d): (B, h, Tq, Tk) float32. Causal:
    0 where the key comes after the query, Tq = Tk."""
    scores = jnp.einsum(
        "bqhd,bkhd->bhqk", q * q.shape[-1] ** -0.5, k, preferred_element_type=jnp.float32
    )
    if causal:
        seen = jnp.tri(scores.shape[-1], dtype=bool)
        scores = jnp.where(seen, scores, -jnp.inf)
    return jax.nn.softmax(scores, axis=-1)


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
