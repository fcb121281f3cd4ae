"""Causal attention of a decoder on TPUs by jax's own Splash kernels (FlashAttention, Dao et al.,
arXiv 2205.14135, in tiles; those that come after all of their queries are left out).

XLA's attention writes arrays of (heads, T, T) to HBM several times; of 2,048 tokens they are larger
than all else that a block makes.

Shape letters: B texts, T tokens, h heads, k heads of keys and values, d channels a head.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
from jax.experimental.pallas.ops.tpu import splash_attention as kernels
from jax.sharding import PartitionSpec

from webssl_jax.language.sizes import DecoderConfig
from webssl_jax.models.layers import batch_shards, platform, tensor_shards

# Of queries and of keys; the first that divides the tokens is taken. Larger ones would leave out
# less of what is not attended to.
BLOCKS = (512, 256, 128)

Attend = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, real: jax.Array, interpret: bool = False
) -> jax.Array:
    """softmax(q k^T / sqrt(d)) v of real tokens over themselves and real ones before them.

    What it gives at other tokens is finite and without meaning. The output, and the log-sum-exp
    that the backward pass needs besides, are named ``attn`` for remat.

    Args:
      q: (B, T, h, d). k, v: (B, T, k, d), T divisible by the smallest of :data:`BLOCKS`.
      real: (B, T) bool. interpret: run without a TPU, slowly.

    Returns:
      (B, T, h, d).
    """
    length, heads = q.shape[1:3]
    block = next(size for size in BLOCKS if length % size == 0)
    mask = kernels.MultiHeadMask([kernels.CausalMask((length, length))] * heads)
    kernel = kernels.make_splash_mha(
        mask,
        block_sizes=kernels.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name="attn",
        interpret=interpret,
    )
    # Padding attends to padding alone: no row of scores is empty.
    segments = kernels.SegmentIds(*[real.astype("int32")] * 2)
    q, k, v = (x.swapaxes(1, 2) for x in (q * q.shape[-1] ** -0.5, k, v))
    return jax.vmap(kernel)(q, k, v, segments).swapaxes(1, 2)


def on_each_device(
    c: DecoderConfig, texts: int, tokens: int, interpret: bool = False
) -> Attend | None:
    """:func:`attend`, which each device of the current mesh runs on its own texts and heads: the
    compiler cannot partition a kernel.

    None where the kernels are not asked for or do not apply: on other devices than TPUs (unless
    ``interpret``), under a window of attention, and where blocks do not divide the tokens, or the
    shards texts or heads.
    """
    if c.attention != "pallas" or c.window is not None or tokens % BLOCKS[-1]:
        return None
    axes, shards = batch_shards()
    tensor = tensor_shards()
    if texts % shards or c.kv_heads % tensor or not (interpret or platform() == "tpu"):
        return None
    run = functools.partial(attend, interpret=interpret)
    if shards * tensor == 1:
        return run
    spec, rows = PartitionSpec(axes, None, "tensor"), PartitionSpec(axes)
    return jax.shard_map(run, in_specs=(spec,) * 3 + (rows,), out_specs=spec, check_vma=False)
