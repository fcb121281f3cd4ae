"""Initial values of the parameters, as the original codebases draw them.

``BlockConfig.init`` names a scheme; :data:`INIT_SCHEMES` gives its class. A new scheme is one class
and one row of that table.

Shape letters: D width, L blocks.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

Initializer = Callable[..., jax.Array]  # (key, shape, dtype) -> array


def uniform(limit: float) -> Initializer:
    """Uniform in [-limit, limit)."""
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(
        key, shape, dtype, -limit, limit
    )


def xavier_uniform(fused: int = 1) -> Initializer:
    """Xavier-uniform for a kernel (in, out) that is one of ``fused`` equal parts of a matrix (in,
    fused * out)."""
    return lambda key, shape, dtype=jnp.float32: uniform(
        math.sqrt(6 / (shape[0] + fused * shape[1]))
    )(key, shape, dtype)


@dataclasses.dataclass(frozen=True)
class InitScheme(abc.ABC):
    """Initialisers for the parameters of one network, of ``width`` channels and ``depth`` blocks.

    A scheme overrides what differs from here: PyTorch's default for the patch embedding, biases 0,
    tokens normal 1e-6, mask token 0, position tables normal 0.02. ``layer`` is the last part of the
    layer's path (``q``, ``out``, ``fc1``), ``inputs`` its fan-in.
    """

    width: int
    depth: int

    @abc.abstractmethod
    def kernel(self, layer: str | None, fused: int) -> Initializer:
        """For the kernel (in, out) of a linear layer; the original stores it as one of ``fused``
        equal parts of a larger matrix."""

    def bias(self, layer: str | None, inputs: int) -> Initializer:
        """For the bias of a linear layer."""
        return nn.initializers.zeros

    def patch_kernel(self, inputs: int) -> Initializer:
        """For the patch embedding's kernel (p, p, 3, D)."""
        return uniform(1 / math.sqrt(inputs))

    def patch_bias(self, inputs: int) -> Initializer:
        """For the patch embedding's bias."""
        return uniform(1 / math.sqrt(inputs))

    def token(self) -> Initializer:
        """For CLS and register tokens."""
        return nn.initializers.normal(1e-6)

    def mask_token(self) -> Initializer:
        """For the token that replaces masked patches."""
        return nn.initializers.zeros

    def position(self) -> Initializer:
        """For a learned position table of image patches."""
        return nn.initializers.normal(0.02)

    def text_token(self) -> Initializer:
        """For the embeddings of text tokens."""
        return nn.initializers.normal(0.02)

    def text_position(self) -> Initializer:
        """For the learned position table of a text tower."""
        return nn.initializers.normal(0.01)


class MAE(InitScheme):
    """MAE: kernels Xavier-uniform, with q, k, v counted as one matrix; tokens normal 0.02."""

    def kernel(self, layer: str | None, fused: int) -> Initializer:
        return xavier_uniform(fused)

    def patch_kernel(self, inputs: int) -> Initializer:
        return uniform(math.sqrt(6 / (inputs + self.width)))

    def token(self) -> Initializer:
        return nn.initializers.normal(0.02)

    def mask_token(self) -> Initializer:
        return nn.initializers.normal(0.02)


class DINOv2(InitScheme):
    """DINOv2: kernels normal 0.02. The original truncates at +-2, which is 100 standard deviations
    and changes nothing."""

    def kernel(self, layer: str | None, fused: int) -> Initializer:
        return nn.initializers.normal(0.02)


class DINOv3(DINOv2):
    """DINOv3: as DINOv2, but CLS and registers are normal 0.02."""

    def token(self) -> Initializer:
        return nn.initializers.normal(0.02)


class IJEPA(DINOv2):
    """I-JEPA: kernels and the mask token normal 0.02, the patch embedding's too; biases 0. The
    original's constructor divides the last layers of a block by sqrt(2 * its number), but its
    training draws them anew without that."""

    def patch_kernel(self, inputs: int) -> Initializer:
        return nn.initializers.normal(0.02)

    def patch_bias(self, inputs: int) -> Initializer:
        return nn.initializers.zeros

    def mask_token(self) -> Initializer:
        return nn.initializers.normal(0.02)


class MoCo(InitScheme):
    """MoCo v3: kernels Xavier-uniform, each of q, k, v by itself, and the patch embedding as a
    linear layer; CLS normal 1e-6."""

    def kernel(self, layer: str | None, fused: int) -> Initializer:
        return xavier_uniform()

    def patch_kernel(self, inputs: int) -> Initializer:
        return uniform(math.sqrt(6 / (inputs + self.width)))

    def patch_bias(self, inputs: int) -> Initializer:
        return nn.initializers.zeros


class CLIP(InitScheme):
    """The image tower of OpenAI's CLIP. PyTorch's defaults: q, k, v as in MAE; other kernels and
    the biases of the MLP uniform +-1/sqrt(inputs). CLS and positions normal 1/sqrt(D)."""

    def kernel(self, layer: str | None, fused: int) -> Initializer:
        if layer in ("q", "k", "v"):
            return xavier_uniform(fused)
        return lambda key, shape, dtype=jnp.float32: uniform(shape[0] ** -0.5)(key, shape, dtype)

    def bias(self, layer: str | None, inputs: int) -> Initializer:
        return _clip_bias(layer, inputs)

    def token(self) -> Initializer:
        return nn.initializers.normal(self.width**-0.5)

    def position(self) -> Initializer:
        return nn.initializers.normal(self.width**-0.5)


class CLIPText(InitScheme):
    """The text tower of OpenAI's CLIP. Kernels normal: 1/sqrt(D) for q, k, v; 1/sqrt(2 D) for fc1;
    1/sqrt(2 D L) for the last layer of a branch (out, fc2). Biases as in :class:`CLIP`."""

    def kernel(self, layer: str | None, fused: int) -> Initializer:
        factors = {"fc1": 2, "out": 2 * self.depth, "fc2": 2 * self.depth}
        factor = factors.get(layer, 1) if layer else 1
        return nn.initializers.normal((factor * self.width) ** -0.5)

    def bias(self, layer: str | None, inputs: int) -> Initializer:
        return _clip_bias(layer, inputs)


class SigLIP(InitScheme):
    """big_vision's: kernels Xavier-uniform, each matrix by itself; biases of the MLP normal 1e-6,
    others 0; positions and text tokens normal 1/sqrt(D); the patch kernel truncated normal
    1/sqrt(inputs) (LeCun), its bias 0."""

    def kernel(self, layer: str | None, fused: int) -> Initializer:
        return xavier_uniform()

    def bias(self, layer: str | None, inputs: int) -> Initializer:
        return nn.initializers.normal(1e-6) if layer in ("fc1", "fc2") else nn.initializers.zeros

    def patch_kernel(self, inputs: int) -> Initializer:
        return nn.initializers.lecun_normal()

    def patch_bias(self, inputs: int) -> Initializer:
        return nn.initializers.zeros

    def position(self) -> Initializer:
        return nn.initializers.normal(self.width**-0.5)

    def text_token(self) -> Initializer:
        return nn.initializers.normal(self.width**-0.5)

    def text_position(self) -> Initializer:
        return nn.initializers.normal(self.width**-0.5)


def _clip_bias(layer: str | None, inputs: int) -> Initializer:
    """PyTorch's default for the layers of the MLP; 0 for those of attention."""
    mlp = layer in ("fc1", "fc2", "w1", "w2", "w3")
    return uniform(inputs**-0.5) if mlp else nn.initializers.zeros


INIT_SCHEMES: dict[str, type[InitScheme]] = {
    "mae": MAE,
    "dinov2": DINOv2,
    "dinov3": DINOv3,
    "ijepa": IJEPA,
    "moco": MoCo,
    "clip": CLIP,
    "clip_text": CLIPText,
    "siglip": SigLIP,
}
