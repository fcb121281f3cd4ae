"""The pre-norm transformer block, batch-subset stochastic depth, and a stack of blocks as one scan.

The stack compiles one block whatever the depth: parameters of all blocks lie stacked along a
leading axis L.

What the backward pass keeps of each block (``BlockConfig.remat``):
  none   everything; fastest where memory allows.
  full   only the block's input; the block runs a second time. Least memory.
  dots   the outputs of linear layers; attention and element-wise work run again.
  named  what is labelled: queries, keys, values, what they are mixed to, the attention's output
         and what the first layers of the MLP put out. No matrix product but that of the scores
         runs again.
"""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from webssl_jax.models.attention import Attention
from webssl_jax.models.layers import LayerScale, Mlp, Tokens, gather_tokens, layer_norm, on_batch
from webssl_jax.models.sizes import BlockConfig

_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "named": jax.checkpoint_policies.save_only_these_names("qkv", "attn", "mlp"),
}


class Block(nn.Module):
    """x += gamma1 * attention(norm(x)); x += gamma2 * mlp(norm(x)); each branch under stochastic
    depth in training.

    A step of the scan: the carry is (tokens (B, T, D), store (S, B, T, D) or None) and ``slot``
    says where in the store this block's output goes, S meaning nowhere. The tokens may be a tuple
    for crops of several sizes: they meet in the layers, whose weights are gathered once for all.
    """

    config: BlockConfig
    train: bool

    @nn.compact
    def __call__(self, carry: tuple[Tokens, jax.Array | None], slot: jax.Array):
        x, store = carry
        x = jax.tree.map(on_batch, x)
        c = self.config

        def branch(index: int, mix: Callable[..., Tokens]) -> Callable[[Tokens], Tokens]:
            norm, gain = layer_norm(c, f"norm{index}"), None
            if c.layer_scale is not None:
                gain = LayerScale(c, name=f"layer_scale{index}")()
            return lambda x: mix(jax.tree.map(norm, x), gain)

        for residual in (branch(1, Attention(c, name="attn")), branch(2, Mlp(c, name="mlp"))):
            if self.train and c.drop_path > 0:
                group = c.drop_path_group or jax.tree.leaves(x)[0].shape[0]
                x = add_on_subset(x, residual, c.drop_path, self.make_rng("drop_path"), group)
            else:
                x = jax.tree.map(jnp.add, x, residual(x))
        x = jax.tree.map(on_batch, x)
        if store is not None:
            store = store.at[slot].set(x, mode="drop")
        return (x, store), None


def block_stack(config: BlockConfig, train: bool, name: str = "blocks") -> nn.Module:
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
    x: Tokens, branch: Callable[[Tokens], Tokens], rate: float, rng: jax.Array, group: int
) -> Tokens:
    """x + branch(x) for a random part of the images, scaled so that the expectation is the full
    branch.

    DINOv2's stochastic depth (arXiv 2304.07193, section 5): of each ``group`` of n consecutive
    images exactly s = ``subset_size(n, rate)`` are computed, and n / s * branch is added to those;
    the others pass unchanged. The count is exact, so shapes are static and the work of the others
    is really saved.

    x: (B, T, D). Of a tuple, ``group`` counts the first; the others are cut into as many groups,
    and each set of crops draws its own subset, as in the original.

    Raises:
      ValueError: if B is not a multiple of ``group``, or another set does not divide into as many.
    """
    sets, tree = jax.tree.flatten(x)
    groups = sets[0].shape[0] // group
    for tokens in sets:
        if sets[0].shape[0] % group or tokens.shape[0] % groups:
            raise ValueError(
                f"a batch of {tokens.shape[0]} images does not divide into stochastic-depth groups "
                f"of {group}"
            )
    grouped = [tokens.reshape(groups, -1, *tokens.shape[1:]) for tokens in sets]
    chosen = [
        _choose(rng, jnp.arange(groups) + i * groups, tokens.shape[1], rate)
        for i, tokens in enumerate(grouped)
    ]
    subsets = [
        gather_tokens(tokens, index).reshape(-1, *tokens.shape[2:])
        for tokens, index in zip(grouped, chosen)
    ]

    updates = jax.tree.leaves(branch(tree.unflatten(subsets)))
    add = jax.vmap(
        lambda rows, index, new: rows.at[index].add(
            new, unique_indices=True, mode="promise_in_bounds"
        )
    )
    out = []
    for tokens, index, update in zip(grouped, chosen, updates):
        update = update * (tokens.shape[1] / index.shape[1])
        update = update.reshape(*index.shape, *tokens.shape[2:])
        out.append(add(tokens, index, update).reshape(-1, *tokens.shape[2:]))
    return tree.unflatten(out)


def _choose(rng: jax.Array, numbers: jax.Array, group: int, rate: float) -> jax.Array:
    """Who of each group takes part, (groups, kept) int32; a group draws by its number."""
    kept = subset_size(group, rate)
    keys = jax.vmap(lambda number: jax.random.fold_in(rng, number))(numbers)
    return jax.vmap(lambda key: jax.random.permutation(key, group)[:kept])(keys)
