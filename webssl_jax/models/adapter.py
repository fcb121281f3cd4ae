"""From a student's width to its teacher's: two linear layers with GELU between, thrown away after
training."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from webssl_jax.models.layers import gelu


class Adapter(nn.Module):
    """(..., D) -> (..., width) float32, computed in ``dtype``."""

    hidden: int
    width: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.initializers.normal(0.02)
        x = gelu(nn.Dense(self.hidden, dtype=self.dtype, kernel_init=init, name="fc1")(x))
        x = nn.Dense(self.width, dtype=self.dtype, kernel_init=init, name="fc2")(x)
        return x.astype(jnp.float32)
