"""Multi-head self-attention (Vaswani et al. 2017), softmax in float32.

Written out for XLA, but for the backward pass of :func:`lean_attention`, which is by hand, by the
formulas of FlashAttention (Dao et al., arXiv 2205.14135, algorithm 4) but without its tiles; or, by
``BlockConfig.attention``, two Pallas kernels of our own (``attention_kernel.py``). The usual ones
want heads apart and tokens in whole tiles, and transposing and filling up for them takes as long as
XLA's attention.

Shape letters: B images, T tokens, D width, h heads, d channels a head.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from webssl_jax.models import attention_kernel
from webssl_jax.models.layers import Tokens, batch_cut, dense, layer_norm, save_as
from webssl_jax.models.sizes import BlockConfig, heads_together


class Attention(nn.Module):
    """(B, T, D) -> (B, T, D), or several such. Kernels of q, k, v are (D, h * d), head-major. With
    ``config.causal`` a token sees itself and those before it only."""

    config: BlockConfig

    @nn.compact
    def __call__(self, x: Tokens, gain: jax.Array | None = None) -> Tokens:
        c = self.config

        def project(name: str) -> Tokens:
            return save_as("qkv", dense(c, c.width, name, fused=3, use_bias=c.qkv_bias)(x))

        mix = functools.partial(_mix, c)
        mixed = jax.tree.map(mix, project("q"), project("k"), project("v"))
        # what follows in the block starts from it
        return save_as("attn", dense(c, c.width, "out")(mixed, gain))


def _mix(c: BlockConfig, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Attention over (B, T, h * d), in the way that ``c`` asks for."""
    if c.attention == "pallas" and (mix := _on_shards(c, *q.shape[:2])):
        # the weights' gradients of the layer that follows start from it
        return save_as("attn", mix(q, k, v))
    plain = dot_product_attention if c.remat == "none" else lean_attention
    return _by_heads(plain, c.heads, c.causal, q, k, v)


def _by_heads(attend: Callable, heads: int, causal: bool, *qkv: jax.Array) -> jax.Array:
    """``attend`` of (B, T, h, d), over (B, T, h * d)."""
    shape = qkv[0].shape
    mixed = attend(*(x.reshape(*shape[:2], heads, -1) for x in qkv), causal)
    return mixed.reshape(shape)


def dot_product_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, causal: bool = False
) -> jax.Array:
    """softmax(q k^T / sqrt(d)) v over (B, T, h, d). Scores and softmax are float32 whatever the
    inputs are."""
    return jnp.einsum("bhqk,bkhd->bqhd", attention_weights(q, k, causal).astype(v.dtype), v)


def attention_weights(q: jax.Array, k: jax.Array, causal: bool = False) -> jax.Array:
    """softmax(q k^T / sqrt(d)) of (B, Tq, h, d) and (B, Tk, h, d): (B, h, Tq, Tk) float32. Causal:
    0 where the key comes after the query, Tq = Tk."""
    return jax.nn.softmax(_scores(q, k, causal), axis=-1)


def _scores(q: jax.Array, k: jax.Array, causal: bool) -> jax.Array:
    scores = jnp.einsum(
        "bqhd,bkhd->bhqk", q * q.shape[-1] ** -0.5, k, preferred_element_type=jnp.float32
    )
    return _masked(scores) if causal else scores


def _masked(scores: jax.Array) -> jax.Array:
    """(..., T, T) with -inf where the key comes after the query."""
    return jnp.where(jnp.tri(scores.shape[-1], dtype=bool), scores, -jnp.inf)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def lean_attention(q: jax.Array, k: jax.Array, v: jax.Array, causal: bool = False) -> jax.Array:
    """:func:`dot_product_attention`, for blocks that run again in the backward pass.

    Of everything that is T x T that pass keeps nothing: from the output, labelled ``attn``, and the
    logarithm of each row's sum it works the weights out again, and it never adds up along T x T.

    A TPU's products take 128 channels, whether or not a head has so many. Where heads have 64, two
    are taken together, and of keys and values there is a copy for each in which the other's
    channels are 0: as many products, but nothing has to be laid out anew for 64 channels. As
    modelled for a v5p and T = 257, forward and backward of h x d = 24 x 64 take 72 us an image
    instead of 113. A CPU is the slower for all this.
    """
    return _lean_forward(q, k, v, causal)[0]


# From here on p counts groups of s heads, c the channels of a group: c = s d.
def _lean_forward(q, k, v, causal):
    shape, share = q.shape, _share(*q.shape[2:])
    q, k, v = (x.reshape(*shape[:2], shape[2] // share, -1) for x in (q, k, v))
    scores = _group_scores(q, _apart(k, share), causal)
    largest = scores.max(axis=-1)
    parts = jnp.exp(scores - largest[..., None])
    total = parts.sum(axis=-1)
    weights = (parts / total[..., None]).astype(v.dtype)
    mixed = jnp.einsum("bspqk,bskpc->bqpc", weights, _apart(v, share))
    mixed, logs = save_as("attn", mixed), save_as("attn", largest + jnp.log(total))
    return mixed.reshape(shape), (q, k, v, mixed, logs)


def _lean_backward(causal, kept, slope):
    """The gradients of q, k, v from that of the output, ``slope`` (B, T, h, d)."""
    q, k, v, mixed, logs = kept
    shape, share = slope.shape, logs.shape[1]
    slope = slope.reshape(q.shape)
    keys, values, queries, slopes = (_apart(x, share) for x in (k, v, q, slope))
    weights = jnp.exp(_group_scores(q, keys, causal) - logs[..., None])
    # sum_k weights * (slope v^T): what normalising takes from the gradient of each row's scores
    taken = (slopes.astype(jnp.float32) * mixed[:, None].astype(jnp.float32)).sum(axis=-1)
    bent = jnp.einsum("bqpc,bskpc->bspqk", slope, values, preferred_element_type=jnp.float32)
    bent = (weights * (bent - taken.swapaxes(2, 3)[..., None])).astype(v.dtype)
    scale = shape[-1] ** -0.5
    gradients = (
        jnp.einsum("bspqk,bskpc->bqpc", bent, keys) * scale,
        jnp.einsum("bspqk,bsqpc->bkpc", bent, queries) * scale,
        jnp.einsum("bspqk,bsqpc->bkpc", weights.astype(v.dtype), slopes),
    )
    return tuple(x.reshape(shape) for x in gradients)


def _share(heads: int, channels: int) -> int:
    """How many heads are taken together: those that fill a TPU's lanes exactly, else 1."""
    return heads_together(heads, channels) or 1


def _apart(x: jax.Array, share: int) -> jax.Array:
    """(B, T, p, c) -> (B, s, T, p, c): for each head of a group a copy with only its channels."""
    if share == 1:
        return x[:, None]
    owner = np.arange(x.shape[-1]) // (x.shape[-1] // share)
    return jnp.stack([jnp.where(owner == head, x, 0) for head in range(share)], axis=1)


def _group_scores(q: jax.Array, keys: jax.Array, causal: bool) -> jax.Array:
    """:func:`_scores` of (B, T, p, c) and :func:`_apart` of the keys: (B, s, p, Tq, Tk)."""
    scale = (q.shape[-1] // keys.shape[1]) ** -0.5
    scores = jnp.einsum("bqpc,bskpc->bspqk", q * scale, keys, preferred_element_type=jnp.float32)
    return _masked(scores) if causal else scores


lean_attention.defvjp(_lean_forward, _lean_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def kernel_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, heads: int, causal: bool = False
) -> jax.Array:
    """:func:`lean_attention` over (B, T, h * d), on TPUs by ``attention_kernel.py``; on other
    devices it is that function."""
    return _kernel_forward(q, k, v, heads, causal)[0]


def _kernel_forward(q, k, v, heads, causal):
    kernel = functools.partial(attention_kernel.forward, heads=heads, causal=causal)
    lean = functools.partial(_by_heads, lean_attention, heads, causal)
    return jax.lax.platform_dependent(q, k, v, tpu=kernel, default=lean), (q, k, v)


def _kernel_backward(heads, causal, kept, slope):
    kernel = functools.partial(attention_kernel.backward, heads=heads, causal=causal)

    def lean(q, k, v, slope):
        return jax.vjp(functools.partial(_by_heads, lean_attention, heads, causal), q, k, v)[1](
            slope
        )

    return jax.lax.platform_dependent(*kept, slope, tpu=kernel, default=lean)


kernel_attention.defvjp(_kernel_forward, _kernel_backward)


def _on_shards(c: BlockConfig, images: int, tokens: int) -> Callable | None:
    """:func:`kernel_attention` of (images, tokens, h * d), on each device of the mesh in force with
    its own images and heads: the compiler cannot cut a kernel. None where the kernels do not serve:
    more tokens than they take, or a batch (a few pictures) or heads that do not divide."""
    axes, ways = batch_cut()
    parts = jax.sharding.get_abstract_mesh().shape.get("tensor", 1)
    if tokens > attention_kernel.MOST_TOKENS or images % ways or c.heads % parts:
        return None
    if heads_together(c.heads // parts, c.head_dim) is None:
        return None

    def attend(*qkv: jax.Array) -> jax.Array:
        return kernel_attention(*qkv, c.heads // parts, c.causal)

    if ways * parts == 1:
        return attend
    cut = PartitionSpec(axes, None, "tensor")
    return jax.shard_map(attend, in_specs=(cut,) * 3, out_specs=cut, check_vma=False)


def cls_attention(config: BlockConfig, block: Mapping[str, Any], x: jax.Array) -> jax.Array:
    """How one block's CLS token spreads its attention: (B, h, T) float32, rows adding up to 1.

    The block itself keeps no weights, so they are computed again from what entered it. ``block``:
    its parameters, without the axis of stacked layers. ``x``: (B, T, D), the tokens before its
    first norm, CLS first.
    """
    c = config
    x = layer_norm(c, None).apply({"params": block["norm1"]}, x)

    def heads(name: str, tokens: jax.Array) -> jax.Array:
        layer = dense(c, c.width, None, use_bias=c.qkv_bias)
        projected = layer.apply({"params": block["attn"][name]}, tokens)
        return projected.reshape(*tokens.shape[:2], c.heads, c.head_dim)

    return attention_weights(heads("q", x[:, :1]), heads("k", x))[:, :, 0]
