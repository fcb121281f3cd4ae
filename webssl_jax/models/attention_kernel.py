"""Self-attention for TPUs as two Pallas kernels, forward and backward.

XLA writes what is tokens x tokens to HBM between its operations, several times. Here a kernel takes
all tokens of one image, or of a few small ones, and 128 channels of them, one head or the several
that fill a TPU's lanes; nothing that is tokens x tokens ever leaves the chip's vector memory. It
reads and writes the layers' own (B, T, h * d), so nothing is transposed or filled up around it.

With s = q k^T / sqrt(d), p = softmax(s) and g the gradient of the output o = p v, by rows:

    dp = g v^T,  ds = p (dp - sum(p dp)),  dq = ds k / sqrt(d),  dk = ds^T q / sqrt(d),  dv = p^T g

All tokens are there at once, so neither the forward pass's sums nor its output are kept for the
backward pass, as FlashAttention (Dao et al., arXiv 2205.14135) must. Products take the inputs'
dtype, softmax is float32.

Shape letters: B images, T tokens, h heads, d channels a head; in a kernel R rows (tokens, filled up
to a multiple of 16), K keys (filled up to one of 128), C channels of the heads taken together.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from webssl_jax.models.sizes import LANES, heads_together

# Some ten arrays of tokens x tokens are in vector memory at a time. A v4's 16 MiB do not hold those
# of 1025 tokens; the other chips compile up to 1370.
MOST_TOKENS = 768
_VMEM_BYTES = 48 * 2**20
_ROWS = 16  # of bfloat16 that lie in one register
# Of all images that a kernel takes at a time: with fewer it waits for HBM.
_ROWS_AT_ONCE = 272
_TO_ROWS = (((1,), (1,)), ((), ()))  # a b^T
_PLAIN = (((1,), (0,)), ((), ()))  # a b


def forward(
    q: jax.Array, k: jax.Array, v: jax.Array, heads: int, causal: bool, interpret: bool = False
) -> jax.Array:
    """softmax(q k^T / sqrt(d)) v of each head: three (B, T, h * d) -> (B, T, h * d), T at most
    :data:`MOST_TOKENS`. interpret: run it without a TPU, slowly."""
    (out,) = _call(_forward_kernel, 1, 2, heads, causal, interpret, q, k, v)
    return out


def backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    slope: jax.Array,
    heads: int,
    causal: bool,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradients of q, k and v from that of :func:`forward`'s output, all (B, T, h * d)."""
    return _call(_backward_kernel, 3, 5, heads, causal, interpret, q, k, v, slope)


def _call(
    kernel: Callable[..., None],
    outputs: int,
    products: int,
    heads: int,
    causal: bool,
    interpret: bool,
    *arrays: jax.Array,
) -> tuple[jax.Array, ...]:
    images, tokens, width = arrays[0].shape
    share = heads_together(heads, width // heads)
    channels, rows = share * width // heads, _up(tokens, _ROWS)
    most = max(_ROWS_AT_ONCE // rows, 1)
    at_once = max(number for number in range(1, most + 1) if images % number == 0)
    block = pl.BlockSpec((at_once, rows, channels), lambda image, group: (image, 0, group))
    array = jax.ShapeDtypeStruct(arrays[0].shape, arrays[0].dtype)
    moved = (len(arrays) + outputs) * array.size * array.dtype.itemsize
    return pl.pallas_call(
        functools.partial(
            kernel, tokens=tokens, share=share, scale=(width // heads) ** -0.5, causal=causal
        ),
        grid=(images // at_once, width // channels),
        in_specs=[block] * len(arrays),
        out_specs=(block,) * outputs,
        out_shape=(array,) * outputs,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=_VMEM_BYTES
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * products * images * tokens**2 * width,
            transcendentals=images * heads * tokens**2,
            bytes_accessed=moved,
        ),
        name=f"attention{kernel.__name__.removesuffix('_kernel')}",
        interpret=interpret,
    )(*arrays)


def _forward_kernel(*refs, **attributes):
    for image in range(refs[0].shape[0]):
        _forward_image(*(ref.at[image] for ref in refs), **attributes)


def _forward_image(q_ref, k_ref, v_ref, out_ref, *, tokens, share, scale, causal):
    dtype, keys = out_ref.dtype, _up(tokens, LANES)
    k, v = _read(k_ref, tokens, keys), _read(v_ref, tokens, keys)
    # rows beyond the last token hold anything, and what comes of them is not written
    q = (q_ref[...].astype(jnp.float32) * scale).astype(dtype)
    out = 0.0
    for head in range(share):
        scores = _product(q, _own(k, head, share, dtype), _TO_ROWS)
        parts, total = _softmax(scores, tokens, causal)
        out += _product(parts.astype(dtype), _own(v, head, share, dtype)) / total
    out_ref[...] = out.astype(dtype)


def _backward_kernel(*refs, **attributes):
    for image in range(refs[0].shape[0]):
        _backward_image(*(ref.at[image] for ref in refs), **attributes)


def _backward_image(
    q_ref, k_ref, v_ref, slope_ref, dq_ref, dk_ref, dv_ref, *, tokens, share, scale, causal
):
    dtype, rows, keys = dq_ref.dtype, dq_ref.shape[0], _up(tokens, LANES)
    q, k, v, slope = (_read(ref, tokens, keys) for ref in (q_ref, k_ref, v_ref, slope_ref))
    q = q * scale
    # Products of a^T b take these, which are small, and not the transpose of tokens x tokens.
    q_columns, slope_columns = q.T.astype(dtype), slope.T.astype(dtype)
    q, slope = q[:rows].astype(dtype), slope[:rows].astype(dtype)
    channels = q.shape[1] // share
    dq, dk, dv = 0.0, [], []
    for head in range(share):
        own_k = _own(k, head, share, dtype)
        parts, total = _softmax(_product(q, own_k, _TO_ROWS), tokens, causal)
        weights = parts / total
        bent = weights * _product(slope, _own(v, head, share, dtype), _TO_ROWS)
        bent -= weights * bent.sum(axis=-1, keepdims=True)
        dq += _product(bent.astype(dtype), own_k)
        mine = slice(head * channels, (head + 1) * channels)
        dk.append(_product(q_columns[mine], _filled_up(bent, keys).astype(dtype)))
        dv.append(_product(slope_columns[mine], _filled_up(weights, keys).astype(dtype)))
    dq_ref[...] = (dq * scale).astype(dtype)
    dk_ref[...] = jnp.concatenate(dk, axis=0).T[:rows].astype(dtype)
    dv_ref[...] = jnp.concatenate(dv, axis=0).T[:rows].astype(dtype)


def _read(ref, tokens: int, rows: int) -> jax.Array:
    """(rows, C) float32 of an image in a block: its tokens, and zeros after them, where a block
    reaches beyond the array and holds anything."""
    x = ref[...].astype(jnp.float32)
    if x.shape[0] > tokens:
        x = jnp.where(jax.lax.broadcasted_iota(jnp.int32, x.shape, 0) < tokens, x, 0.0)
    return _filled_up(x, rows)


def _filled_up(x: jax.Array, rows: int) -> jax.Array:
    """``x`` with rows of zeros after it."""
    if x.shape[0] == rows:
        return x
    return jnp.concatenate([x, jnp.zeros((rows - x.shape[0], x.shape[1]), x.dtype)], axis=0)


def _own(x: jax.Array, head: int, share: int, dtype) -> jax.Array:
    """``x`` with 0 for the channels of the other heads: a product of 128 channels costs as much as
    one of fewer, and so the heads need not be taken apart."""
    if share > 1:
        lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
        channels = x.shape[1] // share
        x = jnp.where((lane >= head * channels) & (lane < (head + 1) * channels), x, 0.0)
    return x.astype(dtype)


def _softmax(scores: jax.Array, tokens: int, causal: bool) -> tuple[jax.Array, jax.Array]:
    """(R, K) -> (R, K) and (R, 1): the softmax is the first over the second. Keys after the last
    token get 0; causal: those after the row's own, too."""
    if causal:
        row = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0)
        seen = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1) <= row
        scores = jnp.where(seen, scores, -jnp.inf)
    whole = tokens // LANES * LANES
    if whole < scores.shape[1]:  # in the last lanes only
        rest = scores[:, whole:]
        lane = jax.lax.broadcasted_iota(jnp.int32, rest.shape, 1)
        rest = jnp.where(lane < tokens - whole, rest, -jnp.inf)
        scores = jnp.concatenate([scores[:, :whole], rest], axis=1) if whole else rest
    parts = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
    return parts, parts.sum(axis=-1, keepdims=True)


def _product(a: jax.Array, b: jax.Array, dimensions=_PLAIN) -> jax.Array:
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _up(number: int, unit: int) -> int:
    return -(-number // unit) * unit
