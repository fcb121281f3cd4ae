"""The decoder of masked autoencoders (He et al., arXiv 2111.06377, section 3): from visible tokens
to all pixels.

Shape letters: B images, N patches, K visible patches, D encoder width, p patch side.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from webssl_jax.models.blocks import block_stack
from webssl_jax.models.layers import dense, gather_tokens, keep_order, layer_norm
from webssl_jax.models.position import Grid, sincos_2d
from webssl_jax.models.sizes import ViTConfig


class MAEDecoder(nn.Module):
    """Narrow blocks over visible tokens and mask tokens, each at its position. ``config`` is the
    decoder's own.

    A decoder always has one mask token, fixed sin-cos positions and no registers, whatever the
    config says of them.
    """

    config: ViTConfig

    @nn.compact
    def __call__(
        self,
        cls: jax.Array,
        visible: jax.Array,
        ids_restore: jax.Array,
        grid: Grid,
        *,
        train: bool = False,
    ) -> jax.Array:
        """Predicts the pixels of every patch.

        cls (B, D), visible (B, K, D): the encoder's output. ids_restore (B, N) int: the index of
        each patch in the shuffled order, whose first K are the visible ones (MAE's name;
        ``methods/masking.py``). grid: (rows, columns) of the N patches. Returns (B, N, p * p * 3)
        float32 in the layout of ``layers.patchify``.
        """
        c = self.config
        b, kept, _ = visible.shape
        x = jnp.concatenate([cls[:, None], visible], axis=1)
        x = dense(c, c.width, "embed")(keep_order(x))
        cls, visible = x[:, :1], x[:, 1:]

        mask_token = self.param("mask_token", nn.initializers.normal(0.02), (1, 1, c.width))
        mask_token = mask_token.astype(x.dtype)
        unshuffled = gather_tokens(visible, jnp.minimum(ids_restore, kept - 1))
        x = jnp.where((ids_restore < kept)[:, :, None], unshuffled, mask_token)
        positions = c.interpolation.resize(sincos_2d(c.width, c.grid), c.grid, grid)
        # CLS has position 0
        x = jnp.concatenate([cls, x + jnp.asarray(positions, x.dtype)], axis=1)

        (x, _), _ = block_stack(c, train)((x, None), np.zeros(c.depth, int))
        x = layer_norm(c, "norm")(x[:, 1:])
        return dense(c, c.patch_size**2 * 3, "pred")(keep_order(x)).astype(jnp.float32)
