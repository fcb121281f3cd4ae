"""Answers, token by token, of fixed shapes: one compilation for each size of prompts and answer.

Shape letters: B texts, T tokens of the prompt, N tokens of the answer, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from webssl_jax.language import decoder
from webssl_jax.language.decoder import Cache, empty_cache
from webssl_jax.language.sizes import DecoderConfig


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn, in the order of transformers.

    temperature: 0 takes the likeliest token (greedy). top_k: of the so many likeliest alone.
    top_p: of the fewest tokens whose probabilities add up to that (Holtzman et al., arXiv
      1904.09751).

    Raises:
      ValueError: when a field is out of range; one line.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature = {self.temperature} must be zero or positive")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k = {self.top_k} must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p = {self.top_p} must lie in (0, 1]")
        if self.temperature == 0 and (self.top_k is not None or self.top_p is not None):
            raise ValueError("top_k and top_p need a temperature above 0")


GREEDY = Sampling()


class Generated(NamedTuple):
    """tokens (B, N) int32: after the end of an answer, the first of the end tokens (0 without any).
    lengths (B,) int32: tokens of each answer, its end token included."""

    tokens: jax.Array
    lengths: jax.Array


def draw(logits: jax.Array, sampling: Sampling, rng: jax.Array) -> jax.Array:
    """(B, V) -> the next tokens (B,) int32."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    if sampling.top_k is not None:
        least = jax.lax.top_k(logits, min(sampling.top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if sampling.top_p is not None:
        descending = -jnp.sort(-logits, axis=-1)
        probs = jax.nn.softmax(descending, axis=-1)
        kept = jnp.cumsum(probs, axis=-1) - probs < sampling.top_p  # the likeliest always
        least = jnp.where(kept, descending, jnp.inf).min(axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return jax.random.categorical(rng, logits).astype(jnp.int32)


class _State(NamedTuple):
    written: jax.Array
    token: jax.Array
    done: jax.Array
    cache: Cache
    tokens: jax.Array
    rng: jax.Array


@functools.partial(jax.jit, static_argnames=("config", "new_tokens", "sampling"))
def generate(
    config: DecoderConfig,
    params: dict[str, Any],
    ids: jax.Array | None,
    mask: jax.Array,
    rng: jax.Array,
    end_ids: jax.Array,
    *,
    new_tokens: int,
    sampling: Sampling = GREEDY,
    embeddings: jax.Array | None = None,
) -> Generated:
    """Answers to prompts; stops when all have ended.

    Args:
      ids: (B, T) int32, or None with ``embeddings`` (B, T, D).
      mask: (B, T) bool, which tokens are real; padding on either side.
      rng: a key; not used where ``sampling`` is greedy.
      end_ids: (E,) int32, the tokens that end an answer; there may be none.
      new_tokens: N, most tokens of an answer.
    """
    texts, length = mask.shape
    fill = end_ids[0] if len(end_ids) else 0
    cache = empty_cache(config, texts, length + new_tokens)
    # of the last real token; its logits are the first token's
    last = length - 1 - jnp.argmax(mask[:, ::-1], axis=1)[:, None]

    def read(cache: Cache, **inputs: Any) -> tuple[jax.Array, Cache]:
        out = decoder.apply(config, params, cache=cache, **inputs)
        assert out.cache is not None  # one was given
        return out.logits[:, 0], out.cache

    def choose(logits: jax.Array, rng: jax.Array, done: jax.Array) -> tuple[jax.Array, jax.Array]:
        token = jnp.where(done, fill, draw(logits, sampling, rng))
        return token, done | (token[:, None] == end_ids).any(axis=1)

    def step(state: _State) -> _State:
        real = ~state.done[:, None]
        logits, cache = read(state.cache, ids=state.token[:, None], mask=real)
        rng, use = jax.random.split(state.rng)
        token, done = choose(logits, use, state.done)
        tokens = jax.lax.dynamic_update_slice(state.tokens, token[:, None], (0, state.written))
        return _State(state.written + 1, token, done, cache, tokens, rng)

    logits, cache = read(cache, ids=ids, embeddings=embeddings, mask=mask, at=last)
    rng, use = jax.random.split(rng)
    token, done = choose(logits, use, jnp.zeros(texts, bool))
    tokens = jnp.full((texts, new_tokens), fill, jnp.int32)
    tokens = tokens.at[:, 0].set(token)
    state = _State(jnp.int32(1), token, done, cache, tokens, rng)
    goes_on = lambda state: (state.written < new_tokens) & ~state.done.all()  # noqa: E731
    tokens = jax.lax.while_loop(goes_on, step, state).tokens
    ended = (tokens[..., None] == end_ids).any(axis=-1)
    lengths = jnp.where(ended.any(axis=1), ended.argmax(axis=1) + 1, new_tokens)
    return Generated(tokens, lengths.astype(jnp.int32))
