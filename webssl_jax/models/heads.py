"""The projection head of DINO and iBOT (Caron et al., arXiv 2104.14294, appendix C, as DINOv2
trains it).

An MLP projects a token to a bottleneck, where it is L2-normalised. The last layer compares it with
K prototypes and is weight-normalised: prototype k is g_k * v_k / |v_k|, and g is trained (DINO v1
kept it at 1). DINOv3's is a plain linear layer (arXiv 2508.10104).

Shape letters: B rows, D width of the encoder, b bottleneck, K prototypes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from webssl_jax.models.batch_norm_mlp import MlpConfig
from webssl_jax.models.init_schemes import uniform
from webssl_jax.models.layers import gelu, keep_order, l2_normalise


@dataclasses.dataclass(frozen=True)
class HeadConfig:
    """An MLP of ``layers`` linear layers, of width ``hidden`` and the last of width ``bottleneck``,
    and ``prototypes``, weight-normalised or plain.

    Raises:
      ValueError: when a number is below 1.
    """

    prototypes: int
    bottleneck: int
    hidden: int = 2048
    layers: int = 3
    weight_norm: bool = True

    def __post_init__(self) -> None:
        for name in ("prototypes", "bottleneck", "hidden", "layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} must be at least 1")

    def flops(self, width: int) -> float:
        """Floating-point operations of one row of ``width`` channels, forward, two a
        multiply-add."""
        sizes = [width, *[self.hidden] * (self.layers - 1), self.bottleneck, self.prototypes]
        return 2.0 * sum(a * b for a, b in zip(sizes, sizes[1:]))


class Scores(NamedTuple):
    """The two factors of the logits, as their product over all K prototypes may not fit in memory
    (``methods/dino/prototypes.py``).

    features: (..., b) float32. kernel: (b, K); the product takes its dtype.
    """

    features: jax.Array
    kernel: jax.Array

    def reshape(self, *shape: int) -> Scores:
        """With features of ``shape`` x b."""
        return self._replace(features=self.features.reshape(*shape, self.features.shape[-1]))

    def logits(self) -> jax.Array:
        """(..., K) float32."""
        return jnp.matmul(
            self.features.astype(self.kernel.dtype), self.kernel, preferred_element_type=jnp.float32
        )


class Head(nn.Module):
    """(..., D) -> :class:`Scores`, computed in ``dtype`` from float32 parameters: ``fc1`` ... and
    ``last_layer`` {"g" (1, K), "v" (b, K)}, or of plain prototypes {"kernel" (b, K)}."""

    config: HeadConfig
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> Scores:
        c = self.config
        x = _onto_sphere(x, (*[c.hidden] * (c.layers - 1), c.bottleneck), self.dtype)
        kernel = Prototypes(c, name="last_layer")()
        return Scores(x, kernel.astype(self.dtype))


class Projector(nn.Module):
    """(..., D) -> (..., output) float32, L2-normalised: a head without prototypes (SimDINO)."""

    config: MlpConfig
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        return _onto_sphere(x, (*[c.hidden] * (c.layers - 1), c.output), self.dtype)


def _onto_sphere(x: jax.Array, widths: Sequence[int], dtype: str) -> jax.Array:
    """Linear layers ``fc1`` ... of the module that calls it, GELU between them; L2-normalised."""
    for i, width in enumerate(widths, 1):
        init = nn.initializers.normal(0.02)  # the original truncates at +-2, 100 std
        x = nn.Dense(width, dtype=dtype, kernel_init=init, name=f"fc{i}")(keep_order(x))
        x = gelu(x) if i < len(widths) else x
    return l2_normalise(x.astype(jnp.float32), 1e-12)


class Prototypes(nn.Module):
    """The kernel of the last layer, which has no bias."""

    config: HeadConfig

    @nn.compact
    def __call__(self) -> jax.Array:
        """(b, K) float32."""
        c = self.config
        if not c.weight_norm:
            plain = nn.initializers.normal(0.02)
            return self.param("kernel", plain, (c.bottleneck, c.prototypes))
        g = self.param("g", nn.initializers.ones, (1, c.prototypes))
        init = uniform(1 / math.sqrt(c.bottleneck))  # PyTorch's default
        v = self.param("v", init, (c.bottleneck, c.prototypes))
        return g * v / jnp.linalg.norm(v, axis=0, keepdims=True)
