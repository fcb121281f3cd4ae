"""Multi-head attention pooling (MAP; Lee et al., arXiv 1810.00825, as in Zhai et al., arXiv
2106.04560): SigLIP's way from tokens to one vector, in place of a CLS token.

A learned query, the probe, attends to all tokens. A pre-norm MLP with a residual follows.

Shape letters: B images, T tokens, D width, h heads, d channels a head.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from webssl_jax.models.attention import attention_weights, dot_product_attention
from webssl_jax.models.layers import Mlp, dense, keep_order, layer_norm
from webssl_jax.models.sizes import ViTConfig


class AttentionPool(nn.Module):
    """(B, T, D) after the final norm -> (B, D) float32."""

    config: ViTConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        probe = self.param("probe", nn.initializers.xavier_uniform(), (1, 1, c.width))
        pooled = ProbeAttention(c, name="attn")(probe, x)
        pooled = pooled + Mlp(c, name="mlp")(keep_order(layer_norm(c, "norm")(pooled)))
        return pooled[:, 0].astype(jnp.float32)


class ProbeAttention(nn.Module):
    """Multi-head attention of probe (1, 1, D) to x (B, T, D): (B, 1, D)."""

    config: ViTConfig

    @nn.compact
    def __call__(self, probe: jax.Array, x: jax.Array) -> jax.Array:
        c = self.config

        def heads(name: str, tokens: jax.Array) -> jax.Array:
            return rearrange(dense(c, c.width, name)(tokens), "b t (h d) -> b t h d", h=c.heads)

        q = jnp.broadcast_to(heads("q", probe), (x.shape[0], 1, c.heads, c.head_dim))
        x = keep_order(x)
        out = dot_product_attention(q, heads("k", x), heads("v", x))
        return dense(c, c.width, "out")(rearrange(out, "b t h d -> b t (h d)"))


def pool_attention(config: ViTConfig, pool: Mapping[str, Any], x: jax.Array) -> jax.Array:
    """The attention weights of the probe: (B, h, T) float32, rows add up to 1. pool: the parameters
    of :class:`AttentionPool`. x: (B, T, D), its input."""
    c = config

    def heads(name: str, tokens: jax.Array) -> jax.Array:
        projected: Any = dense(c, c.width, None).apply({"params": pool["attn"][name]}, tokens)
        return rearrange(projected, "b t (h d) -> b t h d", h=c.heads)

    q = jnp.broadcast_to(heads("q", pool["probe"]), (x.shape[0], 1, c.heads, c.head_dim))
    return attention_weights(q, heads("k", x))[:, :, 0]
