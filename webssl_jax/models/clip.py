"""The image tower of CLIP (Radford et al., arXiv 2103.00020): a ViT and a way into the space that
images and texts share; and of SigLIP (Zhai et al., arXiv 2303.15343), whose space is that of its
pooled tokens.

Its parameters are ``encoder``, those of a ``ViT`` of the same config, so that everything that takes
an encoder takes this one, and for CLIP ``projection``.

Shape letters: B images, H x W pixels, D width, E embedding.
"""

from __future__ import annotations

import flax.linen as nn
import jax

from webssl_jax.models.layers import projection
from webssl_jax.models.sizes import ViTConfig
from webssl_jax.models.vit import ViT


class CLIPVision(nn.Module):
    """Images to embeddings of ``embedding`` channels, with pooling ``map`` the encoder's width."""

    config: ViTConfig
    embedding: int

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """Normalised images (B, H, W, 3) -> (B, E) float32, of any length: CLS after the final
        norm, projected, or the pooled tokens as they are. ``train`` as in ``ViT``."""
        cls = ViT(self.config, name="encoder")(images, train=train).cls
        if self.config.pooling == "map":
            return cls
        return projection(self.config.width, self.embedding)(cls)
