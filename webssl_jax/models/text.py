"""The text tower of CLIP (Radford et al., arXiv 2103.00020, section 2.4) and of SigLIP (Zhai et
al., arXiv 2303.15343): a transformer over token ids that gives one embedding a text.

CLIP's is causal and pools the end-of-text token, which attends to the whole text. SigLIP's is
bidirectional and pools the last token of the fixed context, padding included.

Shape letters: B texts, T tokens, C context, V vocabulary, D width, E embedding.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from webssl_jax.models.blocks import block_stack
from webssl_jax.models.layers import gather_tokens, keep_order, layer_norm, projection
from webssl_jax.models.sizes import BlockConfig

POOLINGS = ("eot", "last")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig(BlockConfig):
    """One text tower.

    embedding: channels of the space shared with images.
    context: tokens of the longest text.
    vocabulary: number of token ids, which begin at 0.
    pooling: ``eot`` takes the end-of-text token, found as the first of the largest id in the text
      (CLIP); ``last`` takes the last token.
    projection_bias: whether the projection into the shared space has a bias (SigLIP).
    causal: whether a token attends only to itself and to earlier tokens.

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

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_choices(pooling=POOLINGS)
        self._check_positive("embedding", "context", "vocabulary")

    def flops(self) -> float:
        """Floating-point operations of one text of ``context`` tokens, forward; two a
        multiply-add."""
        return self.block_flops(self.context) + 2.0 * self.width * self.embedding


class TextTower(nn.Module):
    """Embeds texts of any length up to the context; ``last`` pooling needs the full context."""

    config: TextConfig

    @nn.compact
    def __call__(self, tokens: jax.Array, *, train: bool = False) -> jax.Array:
        """Embeds texts.

        tokens: (B, T) int, T up to C; after the end-of-text token any ids that are not larger.
        train: draw stochastic depth, from the rng collection ``drop_path`` when its rate is above
          0.

        Returns (B, E) float32, not normalised.

        Raises:
          ValueError: for more tokens than the context, or fewer with ``last`` pooling.
        """
        c = self.config
        count = tokens.shape[1]
        if count > c.context or (c.pooling == "last" and count < c.context):
            raise ValueError(f"texts of {count} tokens for a context of {c.context}")
        init = c.init_scheme
        table = self.param("token_embed", init.text_token(), (c.vocabulary, c.width))
        positions = self.param("pos_embed", init.text_position(), (1, c.context, c.width))
        x = (jnp.take(table, tokens, axis=0) + positions[:, :count]).astype(c.dtype)

        (x, _), _ = block_stack(c, train)((x, None), np.zeros(c.depth, int))
        if c.pooling == "eot":
            eot = jnp.argmax(tokens, axis=1)
            x = gather_tokens(x, eot[:, None])[:, 0]
        else:
            x = x[:, -1]
        x = layer_norm(c, "norm", dtype="float32")(x)
        return projection(c.width, c.embedding, c.projection_bias)(keep_order(x))
