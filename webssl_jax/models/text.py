"""The text tower of CLIP (Radford et al., arXiv 2103.00020, section 2.4) and of SigLIP (Zhai et
al., arXiv 2303.15343): a transformer over token ids, one embedding a text.

CLIP's is causal and takes what stands at the end-of-text token, which has seen the whole text;
SigLIP's sees both ways and takes the last position of the fixed context, padding included.

Shape letters: B texts, T tokens, C context, V vocabulary, D width, E embedding.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from webssl_jax.models.blocks import block_stack
from webssl_jax.models.layers import gather_tokens, layer_norm, projection
from webssl_jax.models.sizes import BlockConfig

POOLINGS = ("eot", "last")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig(BlockConfig):
    """embedding: channels of the space shared with images.

    context: tokens of the longest text. vocabulary: ids run from 0 to ``vocabulary`` - 1.
    pooling: ``eot`` takes the first place of the text's largest id, which the end-of-text token has
      (CLIP); ``last`` the last place given.
    projection_bias: whether the way into the shared space has one (SigLIP).

    Raises:
      ValueError: when a field is out of range; one line.
    """

    embedding: int
    context: int = 77
    vocabulary: int = 49408
    pooling: str = "eot"
    projection_bias: bool = False
    mlp: str = "quick_gelu"
    causal: bool = True
    norm_eps: float = 1e-5
    init: str = "clip_text"

    def __post_init__(self):
        super().__post_init__()
        self._check_words(pooling=POOLINGS)
        self._check_counts("embedding", "context", "vocabulary")

    def flops(self) -> float:
        """Floating-point operations of one text of ``context`` tokens, forward; two a
        multiply-add."""
        return self.block_flops(self.context) + 2.0 * self.width * self.embedding


class TextTower(nn.Module):
    """Texts of any length up to the context, of which ``last`` pooling needs the full one."""

    config: TextConfig

    @nn.compact
    def __call__(self, tokens: jax.Array, *, train: bool = False) -> jax.Array:
        """Embeds texts.

        tokens: (B, T) int, T up to C; beyond the end-of-text token anything but a larger id.
        train: draw stochastic depth, from the rng collection ``drop_path`` when its rate is above
          0.

        Returns (B, E) float32, of any length: not normalised.

        Raises:
          ValueError: for more tokens than the context, or fewer with ``last`` pooling.
        """
        c = self.config
        count = tokens.shape[1]
        if count > c.context or (c.pooling == "last" and count < c.context):
            raise ValueError(f"texts of {count} tokens for a context of {c.context}")
        stds = (c.width**-0.5,) * 2 if c.init == "siglip" else (0.02, 0.01)
        words, places = map(nn.initializers.normal, stds)
        table = self.param("token_embed", words, (c.vocabulary, c.width))
        positions = self.param("pos_embed", places, (1, c.context, c.width))
        x = (jnp.take(table, tokens, axis=0) + positions[:, :count]).astype(c.dtype)

        (x, _), _ = block_stack(c, train)((x, None), np.zeros(c.depth, int))
        if c.pooling == "eot":
            end = jnp.argmax(tokens, axis=1)
            x = gather_tokens(x, end[:, None])[:, 0]
        else:
            x = x[:, -1]
        x = layer_norm(c, "norm", dtype="float32")(x)
        return projection(c.width, c.embedding, c.projection_bias)(x)
