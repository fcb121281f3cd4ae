"""Self-attention for TPUs as two Pallas kernels, forward and backward.

XLA writes arrays of size T x T to HBM several times between its operations. Here one grid step
takes all tokens of one image, or of a few small ones, and 128 channels of them: one head, or the
several that fill a TPU's lanes. No array of size T x T leaves the chip's vector memory. The kernels
read and write the layers' own (B, T, h * d), so nothing is transposed or padded around them.

The formulas, with p = softmax(s) over keys, s = q k^T / sqrt(d), out = p v, and sums over rows:

    d_p = d_out v^T,  d_s = p (d_p - sum(p d_p)),
    dq = d_s k / sqrt(d),  dk = d_s^T q / sqrt(d),  dv = p^T d_out

FlashAttention (Dao et al., arXiv 2205.14135) takes keys in tiles, and so must save the output and
the log-sum-exp of each row for the backward pass. Here all tokens are there at once, and neither is
saved: sum(p d_p) is its delta. Products take the inputs' dtype, softmax is float32.

Shape letters: B images, T tokens, h heads, d channels a head; in a kernel R rows (tokens, padded to
a multiple of 16), K keys (padded to a multiple of 128), C channels of the heads of one grid step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from webssl_jax.models.sizes import LANES, heads_per_lanes

# About ten arrays of T x T are in vector memory at a time. A v4's 16 MiB do not hold those of 1025
# tokens; the other chips compile up to 1370.
MAX_TOKENS = 768
_VMEM_BYTES = 48 * 2**20
_SUBLANES = 16  # rows of bfloat16 in one vector register
# Of all images of one grid step: with fewer, the kernel waits for HBM.
_ROWS_PER_STEP = 272
_A_BT = (((1,), (1,)), ((), ()))  # dimension numbers of a b^T
_A_B = (((1,), (0,)), ((), ()))  # of a b

Ref = Any  # a reference to an array in vector memory; jax exports no type for it


def forward(
    q: jax.Array, k: jax.Array, v: jax.Array, heads: int, causal: bool, interpret: bool = False
) -> jax.Array:
    """softmax(q k^T / sqrt(d)) v of each head: three (B, T, h * d) -> (B, T, h * d), T at most
    :data:`MAX_TOKENS`. interpret: run without a TPU, slowly."""
    (out,) = _call(_forward_kernel, 1, 2, heads, causal, interpret, q, k, v)
    return out


def backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    d_out: jax.Array,
    heads: int,
    causal: bool,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(dq, dk, dv) from the gradient of :func:`forward`'s output, all (B, T, h * d)."""
    dq, dk, dv = _call(_backward_kernel, 3, 5, heads, causal, interpret, q, k, v, d_out)
    return dq, dk, dv


def _call(
    kernel: Callable[..., None],
    outputs: int,
    products: int,
    heads: int,
    causal: bool,
    interpret: bool,
    *arrays: jax.Array,
) -> tuple[jax.Array, ...]:
    """Runs ``kernel`` on (B, T, h * d) arrays, over a grid of groups of images and of heads.
    products: its matrix products of T x T x d a head, for the cost estimate."""
    images, tokens, width = arrays[0].shape
    group = heads_per_lanes(heads, width // heads)
    assert group is not None  # attention._sharded_kernel asks before
    channels, rows = group * width // heads, _round_up(tokens, _SUBLANES)
    limit = max(_ROWS_PER_STEP // rows, 1)
    step = max(number for number in range(1, limit + 1) if images % number == 0)
    block = pl.BlockSpec((step, rows, channels), lambda image, group: (image, 0, group))
    array = jax.ShapeDtypeStruct(arrays[0].shape, arrays[0].dtype)
    bytes_accessed = (len(arrays) + outputs) * array.size * array.dtype.itemsize
    return pl.pallas_call(
        functools.partial(
            kernel, tokens=tokens, group=group, scale=(width // heads) ** -0.5, causal=causal
        ),
        grid=(images // step, width // channels),
        in_specs=[block] * len(arrays),
        out_specs=(block,) * outputs,
        out_shape=(array,) * outputs,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=_VMEM_BYTES
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * products * images * tokens**2 * width,
            transcendentals=images * heads * tokens**2,
            bytes_accessed=bytes_accessed,
        ),
        name=f"attention{kernel.__name__.removesuffix('_kernel')}",
        interpret=interpret,
    )(*arrays)


def _forward_kernel(*refs: Ref, **attributes: Any) -> None:
    for image in range(refs[0].shape[0]):
        _forward_image(*(ref.at[image] for ref in refs), **attributes)


def _forward_image(
    q_ref: Ref,
    k_ref: Ref,
    v_ref: Ref,
    out_ref: Ref,
    *,
    tokens: int,
    group: int,
    scale: float,
    causal: bool,
) -> None:
    dtype, keys = out_ref.dtype, _round_up(tokens, LANES)
    k, v = _load(k_ref, tokens, keys), _load(v_ref, tokens, keys)
    # rows after the last token hold anything; their results are not written
    q = (q_ref[...].astype(jnp.float32) * scale).astype(dtype)
    out: Any = 0.0
    for head in range(group):
        scores = _product(q, _mask_other_heads(k, head, group, dtype), _A_BT)
        exp_scores, row_sum = _softmax(scores, tokens, causal)
        weighted = _product(exp_scores.astype(dtype), _mask_other_heads(v, head, group, dtype))
        out += weighted / row_sum
    out_ref[...] = out.astype(dtype)


def _backward_kernel(*refs: Ref, **attributes: Any) -> None:
    for image in range(refs[0].shape[0]):
        _backward_image(*(ref.at[image] for ref in refs), **attributes)


def _backward_image(
    q_ref: Ref,
    k_ref: Ref,
    v_ref: Ref,
    d_out_ref: Ref,
    dq_ref: Ref,
    dk_ref: Ref,
    dv_ref: Ref,
    *,
    tokens: int,
    group: int,
    scale: float,
    causal: bool,
) -> None:
    dtype, rows, keys = dq_ref.dtype, dq_ref.shape[0], _round_up(tokens, LANES)
    q, k, v, d_out = (_load(ref, tokens, keys) for ref in (q_ref, k_ref, v_ref, d_out_ref))
    q = q * scale
    # a^T b needs one transpose: that of q and d_out, which are small, not that of T x T
    q_t, d_out_t = q.T.astype(dtype), d_out.T.astype(dtype)
    q, d_out = q[:rows].astype(dtype), d_out[:rows].astype(dtype)
    head_dim = q.shape[1] // group
    dq: Any = 0.0
    dk_t, dv_t = [], []
    for head in range(group):
        k_head = _mask_other_heads(k, head, group, dtype)
        exp_scores, row_sum = _softmax(_product(q, k_head, _A_BT), tokens, causal)
        probs = exp_scores / row_sum
        d_scores = probs * _product(d_out, _mask_other_heads(v, head, group, dtype), _A_BT)
        d_scores -= probs * d_scores.sum(axis=-1, keepdims=True)
        dq += _product(d_scores.astype(dtype), k_head)
        channels = slice(head * head_dim, (head + 1) * head_dim)
        dk_t.append(_product(q_t[channels], _pad_rows(d_scores, keys).astype(dtype)))
        dv_t.append(_product(d_out_t[channels], _pad_rows(probs, keys).astype(dtype)))
    dq_ref[...] = (dq * scale).astype(dtype)
    dk_ref[...] = jnp.concatenate(dk_t, axis=0).T[:rows].astype(dtype)
    dv_ref[...] = jnp.concatenate(dv_t, axis=0).T[:rows].astype(dtype)


def _load(ref: Ref, tokens: int, rows: int) -> jax.Array:
    """(rows, C) float32: the tokens of an image, and zeros after them. A block reaches beyond the
    array and holds anything there."""
    x = ref[...].astype(jnp.float32)
    if x.shape[0] > tokens:
        x = jnp.where(jax.lax.broadcasted_iota(jnp.int32, x.shape, 0) < tokens, x, 0.0)
    return _pad_rows(x, rows)


def _pad_rows(x: jax.Array, rows: int) -> jax.Array:
    """``x`` with rows of zeros after it."""
    if x.shape[0] == rows:
        return x
    return jnp.concatenate([x, jnp.zeros((rows - x.shape[0], x.shape[1]), x.dtype)], axis=0)


def _mask_other_heads(x: jax.Array, head: int, group: int, dtype: DTypeLike) -> jax.Array:
    """``x`` with 0 in the channels of the group's other heads. A product of 128 channels costs as
    much as one of fewer, so the heads need not be split."""
    if group > 1:
        lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
        head_dim = x.shape[1] // group
        x = jnp.where((lane >= head * head_dim) & (lane < (head + 1) * head_dim), x, 0.0)
    return x.astype(dtype)


def _softmax(scores: jax.Array, tokens: int, causal: bool) -> tuple[jax.Array, jax.Array]:
    """(exp_scores (R, K), row_sum (R, 1)), whose quotient is the softmax of (R, K). Keys after the
    last token get 0; causal: those after the row's own token, too."""
    if causal:
        row = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0)
        visible = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1) <= row
        scores = jnp.where(visible, scores, -jnp.inf)
    full = tokens // LANES * LANES
    if full < scores.shape[1]:  # only the last lanes hold padding
        last = scores[:, full:]
        lane = jax.lax.broadcasted_iota(jnp.int32, last.shape, 1)
        last = jnp.where(lane < tokens - full, last, -jnp.inf)
        scores = jnp.concatenate([scores[:, :full], last], axis=1) if full else last
    exp_scores = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
    return exp_scores, exp_scores.sum(axis=-1, keepdims=True)


def _product(
    a: jax.Array, b: jax.Array, dimensions: jax.lax.DotDimensionNumbers = _A_B
) -> jax.Array:
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
