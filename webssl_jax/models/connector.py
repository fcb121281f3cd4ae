"""The connector of LLaVA and Cambrian-1 (Liu et al., arXiv 2310.03744; Tong et al., arXiv
2406.16860) between a vision encoder and a language model: patches on a grid of a fixed size, and a
layer, GELU and another layer over each.

Shape letters: B images, h x w patches, g cells a side, D channels of the encoder, E channels of the
language model.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from webssl_jax.models.init_schemes import uniform
from webssl_jax.models.layers import keep_order
from webssl_jax.models.sizes import DTYPES


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConnectorConfig:
    """One connector.

    outputs: E. grid: g; patches of another number are resized to it. newline: a learned embedding
    after each row of the grid (Cambrian's ``image_newline``). block: of the encoder, counted from
    its last, whose patches are read. norm: whether they go through the encoder's final norm. dtype:
    of the computation.

    Raises:
      ValueError: when a field is out of range; one line.
    """

    outputs: int
    grid: int = 24
    newline: bool = False
    block: int = -1
    norm: bool = True
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if min(self.outputs, self.grid) < 1:
            raise ValueError(f"outputs = {self.outputs}, grid = {self.grid} must be at least 1")
        if self.block > -1:
            raise ValueError(f"block = {self.block} is counted from the last, which is -1")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype = {self.dtype!r} is not one of {', '.join(DTYPES)}")

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of what an image becomes, newlines included."""
        return self.grid, self.grid + self.newline

    @property
    def cells(self) -> int:
        """Embeddings an image."""
        return math.prod(self.shape)

    def flops(self, inputs: int) -> float:
        """Floating-point operations of one image, forward, from ``inputs`` channels."""
        return 2.0 * self.grid**2 * (inputs + self.outputs) * self.outputs


class Connector(nn.Module):
    """``mlp2x_gelu`` over a grid."""

    config: ConnectorConfig

    @nn.compact
    def __call__(self, patches: jax.Array) -> jax.Array:
        """(B, h, w, D) -> (B, cells, E), rows one after the other."""
        c = self.config
        x = resize(patches, c.grid)
        x = self._layer("fc1", x.shape[-1])(keep_order(x))
        x = self._layer("fc2", c.outputs)(keep_order(nn.gelu(x, approximate=False)))
        if c.newline:
            begins = nn.initializers.normal(c.outputs**-0.5)
            newline = self.param("newline", begins, (c.outputs,)).astype(c.dtype)
            ends = jnp.broadcast_to(newline, (*x.shape[:2], 1, c.outputs))
            x = jnp.concatenate([x, ends], axis=2)
        return x.reshape(len(x), c.cells, c.outputs)

    def _layer(self, name: str, inputs: int) -> nn.Dense:
        """Begins as PyTorch's does."""
        begins = uniform(1 / math.sqrt(inputs))
        c = self.config
        return nn.Dense(c.outputs, dtype=c.dtype, kernel_init=begins, bias_init=begins, name=name)


def resize(patches: jax.Array, grid: int) -> jax.Array:
    """(B, h, w, D) -> (B, grid, grid, D) float32: bilinear, without antialiasing, half-pixel
    centres (PyTorch's ``interpolate`` with ``align_corners=False``)."""
    batch, h, w, channels = patches.shape
    patches = patches.astype(jnp.float32)
    if (h, w) == (grid, grid):
        return patches
    return jax.image.resize(patches, (batch, grid, grid, channels), "linear", antialias=False)


def connect(config: ConnectorConfig, params: dict[str, Any], patches: jax.Array) -> jax.Array:
    """(B, h, w, D) -> (B, cells, E), by these parameters."""
    made = Connector(config).apply({"params": params}, patches)
    assert isinstance(made, jax.Array)  # no state was asked for
    return made


@functools.partial(jax.jit, static_argnums=(0, 1))
def init(config: ConnectorConfig, inputs: int, rng: jax.Array) -> dict[str, Any]:
    """Fresh parameters, for patches of ``inputs`` channels."""
    return Connector(config).init(rng, jnp.zeros((1, 1, 1, inputs)))["params"]
