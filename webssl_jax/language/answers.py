"""A vision encoder, a connector and a language model in one: what it expects next of tokens, some
of which stand for an image.

Shape letters: B conversations, T tokens, D width of the language model, N cells of an image.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from webssl_jax.language import decoder
from webssl_jax.language.dialogue import CELL, HIDDEN_CELL
from webssl_jax.language.sizes import DecoderConfig
from webssl_jax.models import connector as connectors
from webssl_jax.models.connector import ConnectorConfig
from webssl_jax.models.features import Want, compute_features
from webssl_jax.models.layers import batch_shards, gather_tokens, tensor_shards
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

    Logits of ``block`` tokens a text exist at a time: those of all would be the largest array of
    the step. Each device puts the tokens that count first, of all its texts, and does not compute a
    block without any; there are many, as answers are short beside an image and its question. It
    gathers the output head once, and the head's gradient is summed over devices once.

    Args:
      last: (B, T, D), as of ``decoder.DecoderOutput``. labels: (B, T), what is to follow each
        token. counts: (B, T) bool. block: of tokens; 0 for all.
    """
    head = decoder.head(config, language).astype(config.dtype)
    axes, shards = batch_shards()
    tensor = tensor_shards()
    sums: Callable[..., tuple[jax.Array, jax.Array]]
    if shards * tensor > 1 and len(last) % shards == 0:
        rows, each = PartitionSpec(axes), PartitionSpec((*axes, "tensor"))
        sums = jax.shard_map(
            functools.partial(_answer_sums, block, tensor),
            in_specs=(PartitionSpec(), rows, rows, rows),
            out_specs=each,
            check_vma=False,
        )
    else:
        sums = functools.partial(_answer_sums, block, 1)
    loss, hits = (x.sum() for x in sums(head, last, labels, counts))
    among = jnp.maximum(counts.sum(), 1)
    return loss / among, hits / among


def _answer_sums(
    block: int, tensor: int, head: jax.Array, last: jax.Array, labels: jax.Array, counts: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Of one device's texts, ((1,), (1,)): the sums of losses and of hits over tokens that count.
    tensor: so many devices have these texts, and take blocks in turn."""
    texts, length, _ = last.shape
    size = texts * min(block or length, length)
    rounds = -(-texts * length // (size * tensor))
    order = jnp.argsort(~counts.reshape(-1))  # stable

    def cut(x: jax.Array) -> jax.Array:
        """(B, T, ...) -> (rounds, size, ...): the blocks of this device."""
        x = jnp.asarray(x).reshape(-1, *x.shape[2:])
        x = x.at[order].get(mode="promise_in_bounds", unique_indices=True)
        x = jnp.pad(x, ((0, rounds * tensor * size - len(x)),) + ((0, 0),) * (x.ndim - 1))
        x = x.reshape(rounds, tensor, size, *x.shape[1:])
        return x[:, 0] if tensor == 1 else x[:, jax.lax.axis_index("tensor")]

    loss, hits = _sums(head, cut(last), cut(labels), cut(counts))
    return loss[None], hits[None]


@jax.custom_vjp
def _sums(
    head: jax.Array, x: jax.Array, wanted: jax.Array, real: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Sums over rounds R of blocks of S tokens: of losses, and of hits. head (D, V), x (R, S, D),
    wanted and real (R, S). With the logits of a block the gradients are made at once, so that no
    product is needed twice: they wait for the factor that the loss has above."""
    loss, hits, _, _ = _rounds(head, x, wanted, real, by_head=False, by_x=False)
    return loss, hits


def _rounds(
    head: jax.Array, x: jax.Array, wanted: jax.Array, real: jax.Array, by_head: bool, by_x: bool
) -> tuple[jax.Array, jax.Array, jax.Array | None, jax.Array | None]:
    """The sums and the loss's gradients: by head (D, V) in float32, by x (R, S, D); each None
    unless asked for."""

    def one(total: Any, x: jax.Array, wanted: jax.Array, real: jax.Array) -> Any:
        loss, hits, d_head = total
        logits = jnp.matmul(x, head, preferred_element_type=jnp.float32)
        right = jnp.take_along_axis(logits, wanted[:, None], axis=-1)
        lse = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        hits += ((right >= logits.max(axis=-1, keepdims=True)) & real[:, None]).sum()
        loss += jnp.where(real[:, None], lse - right, 0).sum()
        is_wanted = wanted[:, None] == jnp.arange(head.shape[1])
        d_logits = jnp.where(real[:, None], jnp.exp(logits - lse) - is_wanted, 0).astype(x.dtype)
        if by_head:
            d_head += jnp.matmul(x.T, d_logits, preferred_element_type=jnp.float32)
        return (loss, hits, d_head), jnp.matmul(d_logits, head.T) if by_x else None

    def skip(total: Any, x: jax.Array, *_: jax.Array) -> Any:
        return total, jnp.zeros_like(x) if by_x else None

    def add(total: Any, part: tuple[jax.Array, ...]) -> Any:
        return jax.lax.cond(part[2].any(), one, skip, total, *part)

    d_head = jnp.zeros(head.shape, jnp.float32) if by_head else None
    zero = (jnp.zeros(()), jnp.zeros((), jnp.int32), d_head)
    (loss, hits, d_head), d_x = jax.lax.scan(add, zero, (x, wanted, real))
    return loss, hits, d_head, d_x


def _sums_forward(head: Any, x: Any, wanted: Any, real: Any) -> Any:
    """Its arguments say of themselves whether a gradient goes through them."""
    loss, hits, d_head, d_x = _rounds(
        head.value, x.value, wanted.value, real.value, head.perturbed, x.perturbed
    )
    return (loss, hits), (d_head, d_x, jnp.zeros((0,), head.value.dtype))


def _sums_backward(saved: Any, cotangents: Any) -> Any:
    d_head, d_x, like = saved
    factor = cotangents[0]
    d_head = None if d_head is None else (d_head * factor).astype(like.dtype)
    d_x = None if d_x is None else (d_x * factor).astype(d_x.dtype)
    return d_head, d_x, None, None


_sums.defvjp(_sums_forward, _sums_backward, symbolic_zeros=True)
