"""The predictor of I-JEPA (Assran et al., arXiv 2301.08243, section 3): from the visible patches of
an image and the places of others to what an encoder makes of those.

Shape letters: B rows, K visible patches, T places, D width of the encoder.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from webssl_jax.models.blocks import Placed, block_stack
from webssl_jax.models.layers import dense, gather_tokens, keep_order, layer_norm
from webssl_jax.models.position import Grid, sincos_2d
from webssl_jax.models.sizes import ViTConfig


class Predictor(nn.Module):
    """Narrow blocks over visible tokens and a mask token for every place to predict, each with its
    position. ``config`` is the predictor's own; its positions are fixed sin-cos ones, and it has
    neither CLS nor registers, whatever the config says of them."""

    config: ViTConfig
    width: int

    @nn.compact
    def __call__(
        self,
        visible: jax.Array,
        places: jax.Array,
        present: jax.Array,
        wanted: jax.Array,
        wanted_present: jax.Array,
        grid: Grid,
    ) -> jax.Array:
        """Predicts one block of patches after the other: they do not see each other.

        visible: (B, K, D), the encoder's output for the patches ``places`` (B, K) int of a grid of
        (rows, columns), of which those with ``present`` (B, K) are there. wanted, wanted_present:
        the same (B, M, T) of M blocks. Returns (B, M, T, ``width``) float32.
        """
        c = self.config
        b, blocks, count = wanted.shape
        table = jnp.asarray(sincos_2d(c.width, grid), c.dtype)
        table = jnp.broadcast_to(table, (b, *table.shape))

        def of_each(x: jax.Array) -> jax.Array:
            """(B, K, ...) -> (B * M, K, ...): the same for every block of an image."""
            return jnp.repeat(x, blocks, axis=0)

        mask_token = self.param("mask_token", c.init_scheme.mask_token(), (1, 1, c.width))
        seen = dense(c, c.width, "embed")(keep_order(visible)) + gather_tokens(table, places)
        asked = gather_tokens(table, wanted.reshape(b, -1)) + mask_token.astype(c.dtype)
        x = jnp.concatenate([of_each(seen), asked.reshape(b * blocks, count, -1)], axis=1)
        keys = [of_each(present), wanted_present.reshape(b * blocks, count)]
        placed = Placed(keys=jnp.concatenate(keys, axis=1))
        stack = block_stack(c, train=False, placed=True)
        (x, _), _ = stack((x, None), np.zeros(c.depth, int), None, placed)
        x = layer_norm(c, "norm")(x[:, -count:])
        out = dense(c, self.width, "out")(keep_order(x)).astype(jnp.float32)
        return out.reshape(b, blocks, count, self.width)
