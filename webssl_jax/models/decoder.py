"""The decoder of masked autoencoders (He et al., arXiv 2111.06377, section 3): from visible tokens
to all pixels.

Shape letters: B images, N patches, K visible patches, D encoder width, p patch side.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from webssl_jax.models import position
from webssl_jax.models.blocks import block_stack
from webssl_jax.models.layers import dense, gather_tokens, layer_norm
from webssl_jax.models.sizes import ViTConfig


class MAEDecoder(nn.Module):
    """Narrow blocks over visible tokens and mask tokens, each at its place; ``config`` is the
    decoder's own.

    Of the config's fields those that speak of tokens' making (registers, mask token, position kind)
    do not matter: a decoder always has one mask token and fixed sin-cos positions.
    """

    config: ViTConfig

    @nn.compact
    def __call__(
        self,
        cls: jax.Array,
        visible: jax.Array,
        restore: jax.Array,
        grid: position.Grid,
        *,
        train: bool = False,
    ) -> jax.Array:
        """Predicts the pixels of every patch.

        cls (B, D), visible (B, K, D): the encoder's output. restore (B, N): place of each patch in
        the shuffled order, whose first K are the visible ones (``methods/masking.py``). grid:
        (rows, columns) of the N patches. Returns (B, N, p * p * 3) float32 in the layout of
        ``layers.patchify``.
        """
        c = self.config
        b, kept, _ = visible.shape
        x = dense(c, c.width, "embed")(jnp.concatenate([cls[:, None], visible], axis=1))
        cls, visible = x[:, :1], x[:, 1:]

        token = self.param("mask_token", nn.initializers.normal(0.02), (1, 1, c.width)).astype(
            x.dtype
        )
        placed = gather_tokens(visible, jnp.minimum(restore, kept - 1))
        x = jnp.where((restore < kept)[:, :, None], placed, token)
        positions = position.resize(
            position.sincos_2d(c.width, c.grid), c.grid, grid, c.position_resize
        )
        # the CLS row of the table is zero
        x = jnp.concatenate([cls, x + jnp.asarray(positions, x.dtype)], axis=1)

        (x, _), _ = block_stack(c, train)((x, None), np.zeros(c.depth, int))
        x = layer_norm(c, "norm")(x[:, 1:])
        return dense(c, c.patch_size**2 * 3, "pred")(x).astype(jnp.float32)
