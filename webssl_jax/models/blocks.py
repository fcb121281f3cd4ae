"""The pre-norm transformer block, batch-subset stochastic depth, and a stack of blocks as one scan.

The stack compiles one block whatever the depth: parameters of all blocks lie stacked along a
leading axis L.

What the backward pass keeps of each block (``ViTConfig.remat``):
  none   everything; fastest where memory allows.
  full   only the block's input; the block runs a second time. Least memory.
  dots   the outputs of linear layers; attention and element-wise work run again.
  named  what is labelled: queries, keys, values, the attention's output and the hidden
         activations of the MLP.
"""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from webssl_jax.models.attention import Attention
from webssl_jax.models.layers import LayerScale, Mlp, layer_norm, on_batch
from webssl_jax.models.sizes import ViTConfig

_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "named": jax.checkpoint_policies.save_only_these_names("qkv", "attn", "mlp"),
}


class Block(nn.Module):
    """x += gamma1 * attention(norm(x)); x += gamma2 * mlp(norm(x)); each branch under stochastic
    depth in training.

    A step of the scan: the carry is (tokens (B, T, D), store (S, B, T, D) or None) and ``slot``
    says where in the store this block's output goes, S meaning nowhere.
    """

    config: ViTConfig
    train: bool

    @nn.compact
    def __call__(self, carry: tuple[jax.Array, jax.Array | None], slot: jax.Array):
        x, store = carry
        x = on_batch(x)
        c = self.config

        def branch(index: int, mix: nn.Module) -> Callable[[jax.Array], jax.Array]:
            norm = layer_norm(c, f"norm{index}")
            if c.layer_scale is None:
                return lambda x: mix(norm(x))
            scale = LayerScale(c, name=f"layer_scale{index}")
            return lambda x: scale(mix(norm(x)))

        for residual in (branch(1, Attention(c, name="attn")), branch(2, Mlp(c, name="mlp"))):
            if self.train and c.drop_path > 0:
                group = c.drop_path_group or x.shape[0]
                x = add_on_subset(x, residual, c.drop_path, self.make_rng("drop_path"), group)
            else:
                x = x + residual(x)
        x = on_batch(x)
        if store is not None:
            store = store.at[slot].set(x, mode="drop")
        return (x, store), None


def block_stack(config: ViTConfig, train: bool, name: str = "blocks") -> nn.Module:
    """``config.depth`` blocks as one module of type ((tokens, store), slots (L,)) ->
    ((tokens, store), None)."""
    block = Block
    if config.remat != "none":
        # The scan already keeps XLA from merging the second run with the first, so no barrier is
        # needed.
        block = nn.remat(Block, policy=_POLICIES[config.remat], prevent_cse=False)
    stack = nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True, "drop_path": True},
        in_axes=0,
        length=config.depth,
    )
    return stack(config, train, name=name)


def subset_size(group: int, rate: float) -> int:
    """How many of ``group`` images go through a residual branch:
    max(int(group * (1 - rate)), 1)."""
    return max(int(group * (1 - rate)), 1)


def add_on_subset(
    x: jax.Array, branch: Callable[[jax.Array], jax.Array], rate: float, rng: jax.Array, group: int
) -> jax.Array:
    """x + branch(x) for a random part of the images, scaled so that the expectation is the full
    branch.

    DINOv2's stochastic depth (arXiv 2304.07193, section 5): of each ``group`` of n consecutive
    images exactly s = ``subset_size(n, rate)`` are computed, and n / s * branch is added to those;
    the others pass unchanged. The count is exact, so shapes are static and the work of the others
    is really saved.

    x: (B, T, D).

    Raises:
      ValueError: if B is not a multiple of ``group``.
    """
    b, t, d = x.shape
    if b % group:
        raise ValueError(
            f"a batch of {b} images does not divide into stochastic-depth groups of {group}"
        )
    groups, kept = b // group, subset_size(group, rate)
    keys = jax.vmap(lambda g: jax.random.fold_in(rng, g))(jnp.arange(groups))
    chosen = jax.vmap(lambda key: jax.random.permutation(key, group)[:kept])(keys)  # (groups, kept)

    grouped = x.reshape(groups, group, t, d)
    subset = jnp.take_along_axis(grouped, chosen[:, :, None, None], axis=1)
    update = branch(subset.reshape(groups * kept, t, d)) * (group / kept)
    add = jax.vmap(lambda rows, index, new: rows.at[index].add(new, unique_indices=True))
    return add(grouped, chosen, update.reshape(groups, kept, t, d)).reshape(b, t, d)
