"""The image tower of CLIP (Radford et al., arXiv 2103.00020): a ViT and a projection into the
space that images and texts share. And of SigLIP (Zhai et al., arXiv 2303.15343), which has no
projection: the space is that of its pooled tokens.

Its parameters are ``encoder``, those of a ``ViT`` of the same config, so that all code for encoders
works with it, and for CLIP ``projection``.

Shape letters: B images, H x W pixels, D width, E embedding.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from webssl_jax.models.layers import keep_order, l2_normalise, projection
from webssl_jax.models.sizes import ViTConfig
from webssl_jax.models.text import TextConfig, TextTower
from webssl_jax.models.vit import ViT, ViTOutput, train_rngs

# What the originals begin with: what cosines are multiplied by, and what is added to them.
STARTS: dict[str, tuple[float, float | None]] = {
    "softmax": (1 / 0.07, None),
    "sigmoid": (10.0, -10.0),
}


class CLIPVision(nn.Module):
    """Images to embeddings of ``embedding`` channels, with pooling ``map`` the encoder's width."""

    config: ViTConfig
    embedding: int

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """Normalised images (B, H, W, 3) -> (B, E) float32, not normalised: the projection of CLS
        after the final norm, or the pooled tokens. ``train`` as in ``ViT``."""
        output = ViT(self.config, name="encoder")(images, train=train)
        assert isinstance(output, ViTOutput)
        if self.config.pooling == "map":
            return output.cls
        return projection(self.config.width, self.embedding)(keep_order(output.cls))


def init_towers(
    encoder: ViTConfig,
    text: TextConfig,
    rng: jax.Array,
    images: jax.Array,
    scale: float,
    bias: float | None,
) -> dict[str, Any]:
    """Fresh parameters: ``encoder`` and, but for SigLIP's, ``projection`` of the image tower,
    ``text``, ``logit_scale`` (the scale's logarithm) and, with a bias, ``logit_bias``. images: of
    the shape (1, H, W, 3)."""
    image_rng, text_rng = jax.random.split(rng)
    tokens = jnp.zeros((1, text.context), jnp.int32)
    params = dict(CLIPVision(encoder, text.embedding).init(image_rng, images)["params"])
    params["text"] = TextTower(text).init(text_rng, tokens)["params"]
    params["logit_scale"] = jnp.float32(math.log(scale))
    if bias is not None:
        params["logit_bias"] = jnp.float32(bias)
    return params


def embed_images(
    encoder: ViTConfig,
    text: TextConfig,
    params: dict[str, Any],
    images: jax.Array,
    drop_path_rng: jax.Array | None = None,
) -> jax.Array:
    """Normalised images (B, H, W, 3) -> (B, E) float32, L2-normalised. ``drop_path_rng`` draws
    stochastic depth, in training."""
    own: dict[str, Any] = {"encoder": params["encoder"]}
    if "projection" in params:
        own["projection"] = params["projection"]
    rngs = {} if drop_path_rng is None else train_rngs(encoder, drop_path_rng)
    return _embed(CLIPVision(encoder, text.embedding), own, images, rngs)


def embed_texts(
    text: TextConfig,
    params: dict[str, Any],
    tokens: jax.Array,
    drop_path_rng: jax.Array | None = None,
) -> jax.Array:
    """int32 (B, C) -> (B, E) float32, L2-normalised. ``drop_path_rng`` as for images."""
    rngs = {} if drop_path_rng is None else train_rngs(text, drop_path_rng)
    return _embed(TextTower(text), params["text"], tokens, rngs)


def _embed(
    tower: nn.Module, params: dict[str, Any], inputs: jax.Array, rngs: dict[str, jax.Array]
) -> jax.Array:
    out = tower.apply({"params": params}, inputs, train=bool(rngs), rngs=rngs)
    assert isinstance(out, jax.Array)  # no state was asked for
    return l2_normalise(out.astype(jnp.float32), 1e-12)
