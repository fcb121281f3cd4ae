"""Multi-head self-attention (Vaswani et al., arXiv 1706.03762), softmax in float32.

One function in four forms:
  dot_product_attention  the formula. Autodiff saves the T x T attention weights of every head.
  cpu_attention          the same for training on CPUs, with a backward pass of our own.
  recompute_attention    the backward pass recomputes them, by the formulas of FlashAttention (Dao
                         et al., arXiv 2205.14135, algorithm 4) but without tiles.
  kernel_attention       two Pallas kernels for TPUs (``attention_kernel.py``), where
                         ``BlockConfig.attention`` is ``pallas``.
The Pallas kernels that come with jax take (B, h, T, d) and whole tiles of tokens. To transpose and
pad for them takes as long as XLA's attention.

Names of the backward pass, with FlashAttention's symbols: out O, probs P = softmax of the scores S,
lse L the log-sum-exp of each row of S, d_out dO, d_scores dS, delta D = rowsum(dO * O).

Shape letters: B images, T tokens, D width, h heads, d channels a head.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.sharding import PartitionSpec

from webssl_jax.models import attention_kernel
from webssl_jax.models.layers import (
    Tokens,
    batch_shards,
    checkpoint_name,
    dense,
    layer_norm,
    on_cpu,
    platform,
    tensor_shards,
)
from webssl_jax.models.rope import Rotation, rotate
from webssl_jax.models.sizes import BlockConfig, heads_per_lanes

_QKV = tuple[jax.Array, jax.Array, jax.Array]


class Context(NamedTuple):
    """What attention needs to know of the tokens. rotation: of queries and keys. keys: (B, T) bool,
    the tokens that may be attended to, where not all are."""

    rotation: Rotation | None = None
    keys: jax.Array | None = None


_NOTHING = Context()


class Attention(nn.Module):
    """Self-attention of (B, T, D), or of several such. The kernels of q, k, v are (D, h * d),
    head-major. With ``config.causal`` a token attends to itself and to earlier tokens only."""

    config: BlockConfig

    @nn.compact
    def __call__(
        self, x: Tokens, layer_scale: jax.Array | None = None, context: Any = None
    ) -> Tokens:
        """(B, T, D) -> (B, T, D). layer_scale: as in ``layers.Linear``, of the output. context: a
        :class:`Context`, or of several arrays a tuple of such."""
        c = self.config

        def project(name: str) -> Tokens:
            layer = dense(c, c.width, name, fused=3, use_bias=_has_bias(c, name))
            return checkpoint_name(layer(x), "qkv")

        if context is None:
            context = jax.tree.map(lambda _: _NOTHING, x)
        attend = functools.partial(_attend, c)
        out = jax.tree.map(attend, project("q"), project("k"), project("v"), context)
        # the rest of the block recomputes from here
        return checkpoint_name(dense(c, c.width, "out")(out, layer_scale), "attn")


def _has_bias(c: BlockConfig, name: str) -> bool:
    return c.qkv_bias and (c.key_bias or name != "k")


def _attend(
    c: BlockConfig, q: jax.Array, k: jax.Array, v: jax.Array, context: Context
) -> jax.Array:
    """Attention over (B, T, h * d), in the form that ``c`` asks for. With keys that may not be
    attended to it is the formula: neither the kernels nor the backward pass of our own know
    them."""
    if context.rotation is not None:
        q, k = (_rotated(c, x, context.rotation) for x in (q, k))
    if context.keys is not None:
        masked: Callable[..., jax.Array] = functools.partial(
            dot_product_attention, keys=context.keys
        )
        if c.remat != "none":
            masked = jax.checkpoint(masked, static_argnums=(3,))
        return _by_heads(masked, c.heads, c.causal, q, k, v)
    if c.attention == "pallas" and (kernel := _sharded_kernel(c, *q.shape[:2])):
        # the gradient of the output layer's kernel needs it
        return checkpoint_name(kernel(q, k, v), "attn")
    attend: Callable[..., jax.Array] = recompute_attention
    if c.remat == "none":
        attend = cpu_attention if on_cpu() else dot_product_attention
    return _by_heads(attend, c.heads, c.causal, q, k, v)


def _rotated(c: BlockConfig, x: jax.Array, rotation: Rotation) -> jax.Array:
    """Queries or keys (B, T, h * d), rotated. What is saved of them for the backward pass is saved
    after it, so that it does not run again."""
    together = 0
    if platform() == "tpu" and x.dtype == jnp.bfloat16:
        together = heads_per_lanes(c.heads // tensor_shards(), c.head_dim) or 1
    return checkpoint_name(rotate(x, rotation, c.heads, together), "qkv")


def _by_heads(
    attend: Callable[..., jax.Array], heads: int, causal: bool, *qkv: jax.Array
) -> jax.Array:
    """``attend``, which takes (B, T, h, d), of (B, T, h * d)."""
    out = attend(*(rearrange(x, "b t (h d) -> b t h d", h=heads) for x in qkv), causal)
    return rearrange(out, "b t h d -> b t (h d)")


def dot_product_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, causal: bool = False, keys: jax.Array | None = None
) -> jax.Array:
    """softmax(q k^T / sqrt(d)) v over (B, T, h, d). Scores and softmax are float32 whatever the
    inputs are. keys: as of :func:`attention_weights`."""
    weights = attention_weights(q, k, causal, keys).astype(v.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


def attention_weights(
    q: jax.Array, k: jax.Array, causal: bool = False, keys: jax.Array | None = None
) -> jax.Array:
    """softmax(q k^T / sqrt(d)) of (B, Tq, h, d) and (B, Tk, h, d): (B, h, Tq, Tk) float32. Causal:
    0 where the key comes after the query, Tq = Tk. keys: (B, Tk) bool, 0 where False; at least one
    of an image must be True."""
    scores = _scores(q, k, causal)
    if keys is not None:
        scores = jnp.where(keys[:, None, None], scores, -jnp.inf)
    return jax.nn.softmax(scores, axis=-1)


def _scores(q: jax.Array, k: jax.Array, causal: bool) -> jax.Array:
    scores = jnp.einsum(
        "bqhd,bkhd->bhqk", q * q.shape[-1] ** -0.5, k, preferred_element_type=jnp.float32
    )
    return _causal_mask(scores) if causal else scores


def _causal_mask(scores: jax.Array) -> jax.Array:
    """(..., T, T) with -inf where the key comes after the query."""
    return jnp.where(jnp.tri(scores.shape[-1], dtype=bool), scores, -jnp.inf)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def cpu_attention(q: jax.Array, k: jax.Array, v: jax.Array, causal: bool = False) -> jax.Array:
    """:func:`dot_product_attention` whose backward pass takes few passes over T x T on CPUs.

    The sum over a row of dP * P is that over its channels of dO * O, and the gradients of keys and
    values are products whose left factor is small. Forward and backward of 16 images, 197 tokens,
    16 heads of 32 channels take 0.09 CPU seconds instead of 0.12 with autodiff."""
    return _cpu_forward(q, k, v, causal)[0]


def _cpu_forward(
    q: jax.Array, k: jax.Array, v: jax.Array, causal: bool
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Residuals have the heads before the tokens, and queries are scaled."""
    q, k, v = (x.swapaxes(1, 2) for x in (q * q.shape[-1] ** -0.5, k, v))
    scores = jnp.einsum("bhqd,bhkd->bhqk", q, k, preferred_element_type=jnp.float32)
    probs = jax.nn.softmax(_causal_mask(scores) if causal else scores, axis=-1)
    out = jnp.einsum("bhqk,bhkd->bhqd", probs.astype(v.dtype), v)
    return out.swapaxes(1, 2), (q, k, v, out, probs)


def _cpu_backward(
    causal: bool, residuals: tuple[jax.Array, ...], d_out: jax.Array
) -> tuple[jax.Array, ...]:
    """(dq, dk, dv) from d_out, all (B, T, h, d)."""
    q, k, v, out, probs = residuals
    d_out = d_out.swapaxes(1, 2)
    delta = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(axis=-1, keepdims=True)
    d_probs = jnp.einsum("bhqd,bhkd->bhqk", d_out, v, preferred_element_type=jnp.float32)
    d_scores = (probs * (d_probs - delta)).astype(v.dtype)
    dq = jnp.einsum("bhqk,bhkd->bhqd", d_scores, k) * q.shape[-1] ** -0.5
    dk = jnp.einsum("bhqd,bhqk->bhdk", q, d_scores)
    dv = jnp.einsum("bhqd,bhqk->bhdk", d_out, probs.astype(v.dtype))
    return dq.swapaxes(1, 2), dk.transpose(0, 3, 1, 2), dv.transpose(0, 3, 1, 2)


cpu_attention.defvjp(_cpu_forward, _cpu_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def recompute_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, causal: bool = False
) -> jax.Array:
    """:func:`dot_product_attention` that saves nothing of size T x T for the backward pass.

    The backward pass recomputes the attention weights from q, k and the log-sum-exp of each row of
    scores. Under remat, ``named`` saves the output and the log-sum-exp (both named ``attn``), so
    that the forward pass does not run again. No sum runs over T x T.

    A TPU's matrix unit takes 128 channels at a time, even if a head has fewer. Heads of 64 are
    therefore computed in pairs, with one copy of the keys and values for each head of the pair in
    which the other head's channels are 0. That is as many products, and saves the relayouts that 64
    channels need. Modelled for a v5p and T = 257, forward and backward of h x d = 24 x 64 take 72
    us an image instead of 113. On a CPU it is slower.
    """
    return _recompute_forward(q, k, v, causal)[0]


# Below, g counts groups of s heads, whose c = s * d channels fill the lanes.
def _recompute_forward(
    q: jax.Array, k: jax.Array, v: jax.Array, causal: bool
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    shape, group = q.shape, heads_per_lanes(*q.shape[2:]) or 1
    q, k, v = (x.reshape(*shape[:2], shape[2] // group, -1) for x in (q, k, v))
    scores = _group_scores(q, _head_copies(k, group), causal)
    row_max = scores.max(axis=-1)
    exp_scores = jnp.exp(scores - row_max[..., None])
    row_sum = exp_scores.sum(axis=-1)
    probs = (exp_scores / row_sum[..., None]).astype(v.dtype)
    out = jnp.einsum("bsgqk,bskgc->bqgc", probs, _head_copies(v, group))
    out = checkpoint_name(out, "attn")
    lse = checkpoint_name(row_max + jnp.log(row_sum), "attn")
    return out.reshape(shape), (q, k, v, out, lse)


def _recompute_backward(
    causal: bool, residuals: tuple[jax.Array, ...], d_out: jax.Array
) -> tuple[jax.Array, ...]:
    """(dq, dk, dv) from d_out, all (B, T, h, d)."""
    q, k, v, out, lse = residuals
    shape, group = d_out.shape, lse.shape[1]
    d_out = d_out.reshape(q.shape)
    k_copies, v_copies, q_copies, d_out_copies = (_head_copies(x, group) for x in (k, v, q, d_out))
    probs = jnp.exp(_group_scores(q, k_copies, causal) - lse[..., None])
    delta = (d_out_copies.astype(jnp.float32) * out[:, None].astype(jnp.float32)).sum(axis=-1)
    d_probs = jnp.einsum("bqgc,bskgc->bsgqk", d_out, v_copies, preferred_element_type=jnp.float32)
    d_scores = (probs * (d_probs - delta.swapaxes(2, 3)[..., None])).astype(v.dtype)
    scale = shape[-1] ** -0.5
    gradients = (
        jnp.einsum("bsgqk,bskgc->bqgc", d_scores, k_copies) * scale,
        jnp.einsum("bsgqk,bsqgc->bkgc", d_scores, q_copies) * scale,
        jnp.einsum("bsgqk,bsqgc->bkgc", probs.astype(v.dtype), d_out_copies),
    )
    return tuple(x.reshape(shape) for x in gradients)


def _head_copies(x: jax.Array, group: int) -> jax.Array:
    """(B, T, g, c) -> (B, s, T, g, c): for each head of a group a copy in which the channels of the
    other heads are 0."""
    if group == 1:
        return x[:, None]
    head_of_channel = np.arange(x.shape[-1]) // (x.shape[-1] // group)
    copies = [jnp.where(head_of_channel == head, x, 0) for head in range(group)]
    return jnp.stack(copies, axis=1)


def _group_scores(q: jax.Array, k_copies: jax.Array, causal: bool) -> jax.Array:
    """:func:`_scores` of (B, T, g, c) and :func:`_head_copies` of the keys: (B, s, g, Tq, Tk)."""
    scale = (q.shape[-1] // k_copies.shape[1]) ** -0.5
    scores = jnp.einsum(
        "bqgc,bskgc->bsgqk", q * scale, k_copies, preferred_element_type=jnp.float32
    )
    return _causal_mask(scores) if causal else scores


recompute_attention.defvjp(_recompute_forward, _recompute_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def kernel_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, heads: int, causal: bool = False
) -> jax.Array:
    """Attention over (B, T, h * d): on TPUs the kernels of ``attention_kernel.py``, on other
    devices :func:`recompute_attention`."""
    return _kernel_forward(q, k, v, heads, causal)[0]


def _kernel_forward(
    q: jax.Array, k: jax.Array, v: jax.Array, heads: int, causal: bool
) -> tuple[jax.Array, _QKV]:
    kernel = functools.partial(attention_kernel.forward, heads=heads, causal=causal)
    xla = functools.partial(_by_heads, recompute_attention, heads, causal)
    return jax.lax.platform_dependent(q, k, v, tpu=kernel, default=xla), (q, k, v)


def _kernel_backward(heads: int, causal: bool, qkv: _QKV, d_out: jax.Array) -> _QKV:
    kernel = functools.partial(attention_kernel.backward, heads=heads, causal=causal)

    def xla(q: jax.Array, k: jax.Array, v: jax.Array, d_out: jax.Array) -> _QKV:
        attend = functools.partial(_by_heads, recompute_attention, heads, causal)
        return jax.vjp(attend, q, k, v)[1](d_out)

    return jax.lax.platform_dependent(*qkv, d_out, tpu=kernel, default=xla)


kernel_attention.defvjp(_kernel_forward, _kernel_backward)


def _sharded_kernel(
    c: BlockConfig, images: int, tokens: int
) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array] | None:
    """:func:`kernel_attention` of (images, tokens, h * d), which each device of the current mesh
    runs on its own images and heads: the compiler cannot partition a kernel.

    None where the kernels do not apply: for more tokens than they take, and for a batch (a few
    pictures) or heads that the shards do not divide.
    """
    axes, batch = batch_shards()
    tensor = tensor_shards()
    if tokens > attention_kernel.MAX_TOKENS or images % batch or c.heads % tensor:
        return None
    if heads_per_lanes(c.heads // tensor, c.head_dim) is None:
        return None

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return kernel_attention(q, k, v, c.heads // tensor, c.causal)

    if batch * tensor == 1:
        return attend
    spec = PartitionSpec(axes, None, "tensor")
    return jax.shard_map(attend, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)


def cls_attention(
    config: BlockConfig,
    block: Mapping[str, Any],
    x: jax.Array,
    rotation: Rotation | None = None,
    queries: int | None = 1,
) -> jax.Array:
    """The attention weights of one block's CLS token: (B, h, T) float32, rows add up to 1.

    A block does not return its weights, so they are computed again from its input. block: its
    parameters, without the axis of stacked blocks. x: (B, T, D), the input of the block, CLS first.
    rotation: of its queries and keys. queries: the mean weights of so many first tokens, None for
    all of them.
    """
    c = config
    normalised: Any = layer_norm(c, None).apply({"params": block["norm1"]}, x)

    def heads(name: str, tokens: jax.Array) -> jax.Array:
        layer = dense(c, c.width, None, use_bias=_has_bias(c, name))
        projected: Any = layer.apply({"params": block["attn"][name]}, tokens)
        if rotation is not None:
            own = Rotation(*(table[..., : tokens.shape[1], :] for table in rotation))
            projected = rotate(projected, own, c.heads)
        return rearrange(projected, "b t (h d) -> b t h d", h=c.heads)

    weights = attention_weights(heads("q", normalised[:, :queries]), heads("k", normalised))
    return weights[:, :, 0] if queries == 1 else weights.mean(axis=2)
