"""Attention pooling (MAP; Lee et al., arXiv 1810.00825, as in Zhai et al., arXiv 2106.04560):
SigLIP's way from tokens to one vector, in place of a CLS token.

A learned query, the probe, attends to all tokens; what it finds, without a residual, is what an
MLP, with a norm before it, adds to.

Shape letters: B images, T tokens, D width, h heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from webssl_jax.models.attention import attention_weights, dot_product_attention
from webssl_jax.models.layers import Mlp, dense, layer_norm
from webssl_jax.models.sizes import ViTConfig


class AttentionPool(nn.Module):
    """(B, T, D) after the final norm -> (B, D) float32."""

    config: ViTConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        probe = self.param("probe", nn.initializers.xavier_uniform(), (1, 1, c.width))
        found = ProbeAttention(c, name="attn")(probe, x)
        found = found + Mlp(c, name="mlp")(layer_norm(c, "norm")(found))
        return found[:, 0].astype(jnp.float32)


class ProbeAttention(nn.Module):
    """Multi-head attention of probe (1, 1, D) to x (B, T, D): (B, 1, D)."""

    config: ViTConfig

    @nn.compact
    def __call__(self, probe: jax.Array, x: jax.Array) -> jax.Array:
        c = self.config

        def heads(name: str, tokens: jax.Array) -> jax.Array:
            return _heads(c, dense(c, c.width, name)(tokens))

        q = jnp.broadcast_to(heads("q", probe), (x.shape[0], 1, c.heads, c.head_dim))
        mixed = dot_product_attention(q, heads("k", x), heads("v", x))
        return dense(c, c.width, "out")(mixed.reshape(x.shape[0], 1, c.width))


def pool_attention(config: ViTConfig, pool: Mapping[str, Any], x: jax.Array) -> jax.Array:
    """How the probe spreads its attention: (B, h, T) float32, rows adding up to 1. ``pool``: the
    parameters of :class:`AttentionPool`. x: (B, T, D), what goes into it."""

    def heads(name: str, tokens: jax.Array) -> jax.Array:
        layer = dense(config, config.width, None)
        return _heads(config, layer.apply({"params": pool["attn"][name]}, tokens))

    q = jnp.broadcast_to(heads("q", pool["probe"]), (x.shape[0], 1, config.heads, config.head_dim))
    return attention_weights(q, heads("k", x))[:, :, 0]


def _heads(c: ViTConfig, x: jax.Array) -> jax.Array:
    return x.reshape(*x.shape[:2], c.heads, c.head_dim)
