"""A vision encoder, a connector and a language model in one: what it expects next of tokens, some
of which stand for an image.

Shape letters: B conversations, T tokens, D width of the language model, N cells of an image.
"""

from __future__ import annotations

from typing import Any, Protocol

import jax
import jax.numpy as jnp

from webssl_jax.language import decoder
from webssl_jax.language.dialogue import CELL, HIDDEN_CELL
from webssl_jax.language.sizes import DecoderConfig
from webssl_jax.models import connector as connectors
from webssl_jax.models.connector import ConnectorConfig
from webssl_jax.models.features import Want, compute_features
from webssl_jax.models.layers import gather_tokens, keep_order
from webssl_jax.models.sizes import ViTConfig

NETWORKS = ("encoder", "connector", "language")


class Answering(Protocol):
    """What has the three networks: a method, or ``weights.networks.Networks``."""

    @property
    def encoder(self) -> ViTConfig: ...
    @property
    def connector(self) -> ConnectorConfig: ...
    @property
    def language(self) -> DecoderConfig: ...


def image_cells(networks: Answering, params: dict[str, Any], images: jax.Array) -> jax.Array:
    """Normalised images (B, H, W, 3) -> (B, N, D): the encoder's patches through the connector."""
    c = networks.connector
    last = c.block == -1 and c.norm  # what an encoder gives anyway
    want = Want(cls=False, blocks=() if last else (c.block,), blocks_norm=c.norm)
    seen = compute_features(networks.encoder, params["encoder"], images, want)
    patches = seen.patches if last else seen.blocks[c.block][1]
    assert patches is not None  # they were asked for
    return connectors.connect(c, params["connector"], patches)


def place(language: dict[str, Any], tokens: jax.Array, cells: jax.Array) -> jax.Array:
    """(B, T, D): the embeddings of ``tokens`` (B, T), and where they stand for cells of the image,
    those of ``cells`` (B, N, D) in turn. At padding it is without meaning."""
    x = decoder.embed(language, jnp.maximum(tokens, 0))
    of_image = (tokens == CELL) | (tokens == HIDDEN_CELL)
    turn = jnp.clip(jnp.cumsum(of_image, axis=1) - 1, 0, cells.shape[1] - 1)
    return jnp.where(of_image[..., None], gather_tokens(cells, turn).astype(x.dtype), x)


def real(tokens: jax.Array) -> jax.Array:
    """(B, T) bool: tokens that may be attended to, which count as positions."""
    return (tokens >= 0) | (tokens == CELL)


def answer_loss(
    config: DecoderConfig,
    language: dict[str, Any],
    last: jax.Array,
    labels: jax.Array,
    counts: jax.Array,
    block: int,
) -> tuple[jax.Array, jax.Array]:
    """Cross entropy of the tokens that count, and the share that was the likeliest; means over all
    of them (0 where there is none).

    Tokens that count are put first in each text. Logits of ``block`` tokens of each text exist at a
    time, and the backward pass makes them again: those of all would be the largest array of the
    step. A block in which no token of the batch counts costs nothing; there are many, as answers
    are short beside an image and its question.

    Args:
      last: (B, T, D), as of ``decoder.DecoderOutput``. labels: (B, T), what is to follow each
        token. counts: (B, T) bool. block: of tokens; 0 for all.
    """
    texts, length, width = last.shape
    block = min(block or length, length)
    blocks = -(-length // block)
    last = keep_order(last)
    order = jnp.argsort(~counts, axis=1)  # stable
    last, labels, counts = (gather_tokens(x, order) for x in (last, labels, counts))

    def cut(x: jax.Array) -> jax.Array:
        rest = ((0, 0), (0, blocks * block - length)) + ((0, 0),) * (x.ndim - 2)
        return jnp.pad(x, rest).reshape(texts, blocks, block, *x.shape[2:]).swapaxes(0, 1)

    @jax.checkpoint
    def one(x: jax.Array, wanted: jax.Array, real: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = decoder.predict(config, language, x)
        right = jnp.take_along_axis(logits, wanted[..., None], axis=-1)[..., 0]
        losses = jax.nn.logsumexp(logits, axis=-1) - right
        hits = right >= logits.max(axis=-1)
        return jnp.where(real, losses, 0).sum(), (hits & real).sum()

    def add(total: tuple[jax.Array, jax.Array], part: tuple[jax.Array, ...]) -> Any:
        loss, hits = jax.lax.cond(part[2].any(), one, lambda *_: zero, *part)
        return (total[0] + loss, total[1] + hits), None

    zero = (jnp.zeros(()), jnp.zeros((), jnp.int32))
    (loss, hits), _ = jax.lax.scan(add, zero, (cut(last), cut(labels), cut(counts)))
    among = jnp.maximum(counts.sum(), 1)
    return loss / among, hits / among
