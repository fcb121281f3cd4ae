"""The image tower of CLIP (Radford et al., arXiv 2103.00020): a ViT and a projection into the
space that images and texts share. And of SigLIP (Zhai et al., arXiv 2303.15343), which has no
projection: the space is that of its pooled tokens.

Its parameters are ``encoder``, those of a ``ViT`` of the same config, so that all code for encoders
works with it, and for CLIP ``projection``.

Shape letters: B images, H x W pixels, D width, E embedding.
"""

from __future__ import annotations

import flax.linen as nn
import jax

from webssl_jax.models.layers import projection
from webssl_jax.models.sizes import ViTConfig
from webssl_jax.models.vit import ViT, ViTOutput


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
        return projection(self.config.width, self.embedding)(output.cls)
