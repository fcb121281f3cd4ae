"""The projector and the predictor of MoCo v3 (Chen et al., arXiv 2104.02057, section 3): linear
layers without biases, each followed by batch norm, with ReLU between; the last batch norm has no
parameters.

Statistics are those of the batch at hand, which under jit is the global one on any mesh. Nothing
needs running ones: after training these networks are thrown away.

Shape letters: B rows, D channels.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from webssl_jax.models.init_schemes import uniform
from webssl_jax.models.layers import keep_order

_EPS = 1e-5


@dataclasses.dataclass(frozen=True)
class MlpConfig:
    """``layers`` linear layers, of width ``hidden`` and the last of width ``output``. Without
    ``last_norm`` the last has a bias and no batch norm behind it (LeJEPA).

    Raises:
      ValueError: when a number is below 1.
    """

    hidden: int = 4096
    output: int = 256
    layers: int = 3
    last_norm: bool = True

    def __post_init__(self) -> None:
        for name in ("hidden", "output", "layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} must be at least 1")

    def flops(self, inputs: int) -> float:
        """Floating-point operations of one row, forward, two a multiply-add."""
        widths = [inputs, *[self.hidden] * (self.layers - 1), self.output]
        return 2.0 * sum(a * b for a, b in zip(widths, widths[1:]))


class BatchNormMlp(nn.Module):
    """(B, D) -> (B, output) float32. Kernels ``fc1`` ... and {"scale", "bias"} ``norm1`` ..."""

    config: MlpConfig
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        for i in range(1, c.layers + 1):
            size = c.hidden if i < c.layers else c.output
            init = uniform(x.shape[-1] ** -0.5)  # PyTorch's default
            plain = i == c.layers and not c.last_norm
            dense = nn.Dense(
                size,
                use_bias=plain,
                dtype=self.dtype,
                kernel_init=init,
                bias_init=init,
                name=f"fc{i}",
            )
            if plain:
                return dense(keep_order(x)).astype(jnp.float32)
            x = standardise(dense(keep_order(x)))
            if i < c.layers:
                x = nn.relu(Affine(name=f"norm{i}")(x))
        return x


class Affine(nn.Module):
    """A factor and a summand for each channel, float32."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, shape)
        return x * scale + self.param("bias", nn.initializers.zeros, shape)


def standardise(x: jax.Array) -> jax.Array:
    """(B, D) with mean 0 and variance 1 (the biased one) over the batch, in float32."""
    x = x.astype(jnp.float32)
    mean, variance = x.mean(axis=0), x.var(axis=0)
    return (x - mean) * jax.lax.rsqrt(variance + _EPS)
