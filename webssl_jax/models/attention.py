"""Multi-head self-attention (Vaswani et al. 2017), softmax in float32.

Written out rather than taken from a kernel: at a few hundred tokens XLA's fusion is as fast as the
Pallas kernels that have to transpose and pad around themselves.

Shape letters: B images, T tokens, D width, h heads, d channels a head.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from webssl_jax.models.layers import dense, save_as
from webssl_jax.models.sizes import ViTConfig


class Attention(nn.Module):
    """(B, T, D) -> (B, T, D). Kernels of q, k, v are (D, h * d), head-major."""

    config: ViTConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        b, t, _ = x.shape

        def heads(name: str) -> jax.Array:
            projected = dense(c, c.width, name, fused=3, use_bias=c.qkv_bias)(x)
            return save_as("qkv", projected).reshape(b, t, c.heads, c.head_dim)

        mixed = dot_product_attention(heads("q"), heads("k"), heads("v"))
        return dense(c, c.width, "out")(save_as("attn", mixed.reshape(b, t, c.width)))


def dot_product_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """softmax(q k^T / sqrt(d)) v over (B, T, h, d). Scores and softmax are float32 whatever the
    inputs are."""
    scores = jnp.einsum(
        "bqhd,bkhd->bhqk", q * q.shape[-1] ** -0.5, k, preferred_element_type=jnp.float32
    )
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)
