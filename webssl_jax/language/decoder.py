"""A decoder of the Llama family (Touvron et al., arXiv 2302.13971; Llama 3, arXiv 2407.21783):
RMSNorm, rotary positions (Su et al., arXiv 2104.09864), grouped-query attention (Ainslie et al.,
arXiv 2305.13245), SwiGLU.

A batch has texts of several lengths: ``mask`` says which tokens are real. Padding may stand before
or after a text, and what it gives is without meaning. Positions count real tokens alone, so that
padding changes nothing.

Parameters: ``token_embed`` (V, D), ``blocks`` stacked along L, ``norm``, and ``lm_head`` unless the
head is tied.

Shape letters: B texts, T tokens, S slots of the cache, D width, V vocabulary, L blocks, h heads,
k heads of keys and values, d channels a head.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from webssl_jax.language import splash
from webssl_jax.language.sizes import DecoderConfig
from webssl_jax.models.blocks import REMAT_POLICIES
from webssl_jax.models.layers import (
    Linear,
    checkpoint_name,
    gather_tokens,
    on_batch,
    on_channels,
    swiglu,
)


class Cache(NamedTuple):
    """Keys and values of tokens that were read before: both (L, B, S, k, d) in the compute dtype.

    valid (B, S) bool: which slots hold a real token. filled: int32, how many slots are taken, by
    real tokens and padding alike.
    """

    keys: jax.Array
    values: jax.Array
    valid: jax.Array
    filled: jax.Array


class DecoderOutput(NamedTuple):
    """logits (B, T or K, V) float32. hidden (L + 1, B, T, D) in the compute dtype, or None: the
    embeddings, the output of each block, the last of them after the final norm (as transformers
    gives them). cache: with the new tokens, or None. last (B, T, D): after the final norm."""

    logits: jax.Array
    hidden: jax.Array | None
    cache: Cache | None
    last: jax.Array


def empty_cache(config: DecoderConfig, texts: int, slots: int) -> Cache:
    """A cache for ``texts`` texts of at most ``slots`` tokens, padding included."""
    shape = (config.depth, texts, slots, config.kv_heads, config.head_dim)
    zeros = functools.partial(jnp.zeros, shape, config.dtype)
    return Cache(zeros(), zeros(), jnp.zeros((texts, slots), bool), jnp.int32(0))


def frequencies(config: DecoderConfig) -> np.ndarray:
    """Radians a token of each pair of channels, (d / 2,) float32, after ``rope_scaling``."""
    pairs = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    rates = 1 / np.float32(config.rope_theta) ** pairs
    scaling = config.rope_scaling
    if scaling is None:
        return rates
    turns = scaling.original_context * rates / (2 * math.pi)
    kept = np.clip((turns - scaling.low) / (scaling.high - scaling.low), 0, 1)
    return (rates * kept + rates / scaling.factor * (1 - kept)).astype(np.float32)


def rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
    """(B, T, heads, d) turned by ``angles`` (B, T, d / 2); channel i is paired with i + d / 2, as
    in the files of transformers. Computed in float32."""
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


class _Step(NamedTuple):
    """What all blocks share. angles (B, T, d / 2), real (B, T) bool, allowed (B, T, S) bool, slot:
    where the new keys and values go."""

    angles: jax.Array
    real: jax.Array
    allowed: jax.Array
    slot: jax.Array


_KeysValues = tuple[jax.Array, jax.Array]
_Carry = tuple[jax.Array, _KeysValues | None]  # (x (B, T, D), keys and values of all blocks)


class Attention(nn.Module):
    """Grouped-query attention over the cache, or over the tokens themselves. The kernels of q
    (D, h * d), of k and v (D, k * d) are head-major; head i of q reads head i // (h / k)."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, step: _Step, cache: _KeysValues | None, block: jax.Array
    ) -> tuple[jax.Array, _KeysValues | None]:
        """(B, T, D) -> (B, T, D) and the cache with block number ``block`` updated."""
        c = self.config

        def heads(name: str, count: int) -> jax.Array:
            layer = Linear(c, count * c.head_dim, use_bias=c.qkv_bias, name=name)
            split = rearrange(layer(x), "b t (h d) -> b t h d", h=count)
            if c.qk_norm and name != "v":
                split = rms_norm(c, f"{name}_norm")(split)
            return checkpoint_name(split if name == "v" else rotate(split, step.angles), "qkv")

        q, k, v = heads("q", c.heads), heads("k", c.kv_heads), heads("v", c.kv_heads)
        if cache is not None:
            place = (block, 0, step.slot, 0, 0)
            keys, values = (
                jax.lax.dynamic_update_slice(store, new[None], place)
                for store, new in zip(cache, (k, v))
            )
            cache = keys, values
            k, v = (jax.lax.dynamic_index_in_dim(store, block, keepdims=False) for store in cache)
        if cache is None and (attend := splash.on_each_device(c, x.shape[0], x.shape[1])):
            out = attend(q, k, v, step.real)
        else:
            out = jax.nn.dot_product_attention(q, k, v, mask=step.allowed[:, None])
        out = rearrange(out, "b t h d -> b t (h d)")
        return checkpoint_name(Linear(c, c.width, use_bias=False, name="out")(out), "attn"), cache


class Mlp(nn.Module):
    """w3(silu(x w1) * (x w2)); transformers calls them gate, up and down."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, T, D) -> (B, T, D)."""
        c = self.config
        gate, up = (
            checkpoint_name(Linear(c, c.hidden, use_bias=False, name=name)(x), saved)
            for name, saved in (("w1", "gate"), ("w2", "mlp"))
        )
        return Linear(c, c.width, use_bias=False, name="w3")(swiglu(gate, up))


class Block(nn.Module):
    """x += attention(norm(x)); x += mlp(norm(x)). One step of the scan over blocks; its output is x
    if ``hidden``."""

    config: DecoderConfig
    hidden: bool

    @nn.compact
    def __call__(
        self, carry: _Carry, block: jax.Array, step: _Step
    ) -> tuple[_Carry, jax.Array | None]:
        c, (x, cache) = self.config, carry
        x = on_batch(x)
        update, cache = Attention(c, name="attn")(rms_norm(c, "norm1")(x), step, cache, block)
        x = x + update
        x = on_batch(x + Mlp(c, name="mlp")(rms_norm(c, "norm2")(x)))
        return (x, cache), x if self.hidden else None


def rms_norm(config: DecoderConfig, name: str) -> nn.RMSNorm:
    """x * rsqrt(mean(x^2) + eps) * scale over the last axis, statistics in float32."""
    return nn.RMSNorm(config.norm_eps, dtype=config.dtype, name=name)


class Decoder(nn.Module):
    """A decoder of any size."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self,
        ids: jax.Array | None = None,
        *,
        embeddings: jax.Array | None = None,
        mask: jax.Array | None = None,
        cache: Cache | None = None,
        hidden: bool = False,
        at: jax.Array | None = None,
    ) -> DecoderOutput:
        """Reads tokens.

        ids: (B, T) int32. Or ``embeddings`` (B, T, D) in their place: :func:`embed` of ids, among
          which those of images may stand.
        mask: (B, T) bool, which tokens are real; None for all.
        cache: what was read before, to which these tokens are added. The caller sees to it that
          there is room.
        hidden: return all hidden states.
        at: (B, K) int, the tokens whose logits are computed; None for all. (B, 0) for none.

        Raises:
          ValueError: unless exactly one of ``ids`` and ``embeddings`` is given, or for texts longer
            than the context.
        """
        c = self.config
        table = self.param("token_embed", c.init_scheme.text_token(), (c.vocabulary, c.width))
        if (ids is None) == (embeddings is None):
            raise ValueError("a decoder reads ids or embeddings, one of them")
        x = embeddings
        if x is None:
            assert ids is not None
            x = _look_up(table, ids)
        x = x.astype(c.dtype)
        if x.shape[1] > c.context:
            raise ValueError(f"texts of {x.shape[1]} tokens for a context of {c.context}")
        mask = jnp.ones(x.shape[:2], bool) if mask is None else mask.astype(bool)
        step, valid = _plan_step(c, mask, cache)
        stores = None if cache is None else (cache.keys, cache.values)
        first = x
        (x, stores), states = _blocks(c, hidden)((x, stores), np.arange(c.depth), step)
        x = rms_norm(c, "norm")(x)
        if hidden:
            states = jnp.concatenate([first[None], states[:-1], x[None]])
        last = x
        x = x if at is None else gather_tokens(x, at)
        logits = _tied(c, table, x) if c.tied_head else LMHead(c, name="lm_head")(x)
        if cache is not None and stores is not None:
            cache = Cache(stores[0], stores[1], valid, cache.filled + mask.shape[1])
        return DecoderOutput(logits, states, cache, last)


def _tied(config: DecoderConfig, table: jax.Array, x: jax.Array) -> jax.Array:
    table = table.astype(config.dtype)
    return jnp.einsum("btd,vd->btv", x, table, preferred_element_type=jnp.float32)


class LMHead(nn.Module):
    """The output head of its own: (B, T, D) -> (B, T, V) float32."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        shape = (c.width, c.vocabulary)
        kernel = self.param("kernel", c.init_scheme.kernel("lm_head", 1), shape)
        return jnp.matmul(x, kernel.astype(c.dtype), preferred_element_type=jnp.float32)


def apply(
    config: DecoderConfig, params: dict[str, Any], *inputs: Any, **named: Any
) -> DecoderOutput:
    """``Decoder(config)`` of these parameters; arguments and errors are its own."""
    out = Decoder(config).apply({"params": params}, *inputs, **named)
    assert isinstance(out, DecoderOutput)  # no state was asked for
    return out


def head(config: DecoderConfig, params: dict[str, Any]) -> jax.Array:
    """The output head (D, V), by which ``last`` of :class:`DecoderOutput` becomes logits: for who
    does not want those of all tokens at once."""
    return params["token_embed"].T if config.tied_head else params["lm_head"]["kernel"]


def embed(params: dict[str, Any], ids: jax.Array) -> jax.Array:
    """The embeddings of ids (B, T): (B, T, D), as ``embeddings`` of :class:`Decoder` takes them."""
    return _look_up(params["token_embed"], ids)


def _look_up(table: jax.Array, ids: jax.Array) -> jax.Array:
    return on_channels(jnp.take(table, ids, axis=0))


@functools.partial(jax.jit, static_argnums=0)
def init(config: DecoderConfig, rng: jax.Array) -> dict[str, Any]:
    """Fresh parameters: matrices and embeddings normal 0.02, norms 1, biases 0."""
    return Decoder(config).init(rng, jnp.zeros((1, 1), jnp.int32))["params"]


def template(config: DecoderConfig) -> dict[str, Any]:
    """The parameters as ``ShapeDtypeStruct``."""
    return jax.eval_shape(functools.partial(init, config), jax.random.key(0))


def _blocks(config: DecoderConfig, hidden: bool) -> nn.Module:
    block: type[nn.Module] = Block
    if config.remat != "none":
        block = nn.remat(Block, policy=REMAT_POLICIES[config.remat], prevent_cse=False)
    stack = nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(0, nn.broadcast),
        length=config.depth,
    )
    return stack(config, hidden, name="blocks")


def _plan_step(c: DecoderConfig, mask: jax.Array, cache: Cache | None) -> tuple[_Step, jax.Array]:
    """Positions, what may be attended to, and which slots are then valid (B, S)."""
    if cache is None:
        valid, start = mask, jnp.int32(0)
    else:
        start = cache.filled
        valid = jax.lax.dynamic_update_slice(cache.valid, mask, (0, start))
    before = 0 if cache is None else cache.valid.sum(axis=1, keepdims=True)
    positions = jnp.maximum(before + jnp.cumsum(mask, axis=1) - 1, 0)
    angles = positions[..., None].astype(jnp.float32) * frequencies(c)
    slots = start + jnp.arange(mask.shape[1])
    allowed = valid[:, None] & (slots[:, None] >= jnp.arange(valid.shape[1]))
    if c.window is not None:  # counted in real tokens: padding may lie between prompt and answer
        key_positions = jnp.cumsum(valid, axis=1) - 1
        allowed &= positions[..., None] - key_positions[:, None] < c.window
    return _Step(angles, mask, allowed, start), valid
