"""The pre-norm transformer block, stochastic depth on subsets of a batch, and a stack of blocks as
one scan.

The stack compiles one block whatever the depth: parameters of all blocks are stacked along a
leading axis L.

What is saved of each block for the backward pass (``BlockConfig.remat``):
  none   everything; fastest where memory allows.
  full   only the block's input; the block runs a second time. Least memory.
  most   what ``named`` keeps but, of a ViT, the MLP's first layers, and of a language model the
         second of them (w2), which run again.
  dots   the outputs of linear layers; attention and element-wise operations run again.
  named  what ``checkpoint_name`` names: q, k (rotated), v, the outputs of attention and of its
         output layer, and the outputs of the MLP's first layers. Of the matrix products only the
         scores run again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from webssl_jax.models.attention import Attention, Context
from webssl_jax.models.layers import LayerScale, Mlp, Tokens, gather_tokens, layer_norm, on_batch
from webssl_jax.models.sizes import BlockConfig

REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "most": jax.checkpoint_policies.save_only_these_names("qkv", "attn", "gate"),
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "named": jax.checkpoint_policies.save_only_these_names("qkv", "attn", "gate", "mlp"),
}
_Carry = tuple[Tokens, jax.Array | None]  # (tokens, store)


class Placed(NamedTuple):
    """What the blocks are told of their tokens. coordinates: (N, 2) of the last N of them, or (B,
    N, 2), where positions are rotated (``rope.py``). keys: (B, T) bool, the tokens that may be
    attended to, where not all are."""

    coordinates: jax.Array | None = None
    keys: jax.Array | None = None

    @property
    def by_image(self) -> bool:
        """Whether it differs between images."""
        return self.keys is not None or (self.coordinates is not None and self.coordinates.ndim > 2)


class Block(nn.Module):
    """x += gamma1 * attention(norm(x)); x += gamma2 * mlp(norm(x)); each branch under stochastic
    depth in training.

    One step of the scan. The carry is (tokens (B, T, D), store (S, B, T, D) or None); the block's
    output is written to ``store[slot]``, or nowhere if ``slot`` is S. The tokens may be a tuple for
    crops of several sizes: each linear layer takes all of them, so that its weights are gathered
    over the devices once.

    drawn: (S, 5), an entry of ``Rope.draw`` for each size, in training with such. placed: a
    :class:`Placed`, or a tuple of such for a tuple of tokens; None where there is nothing to tell.
    """

    config: BlockConfig
    train: bool

    @nn.compact
    def __call__(
        self, carry: _Carry, slot: jax.Array, drawn: jax.Array | None = None, placed: Any = None
    ) -> tuple[_Carry, None]:
        x, store = carry
        context = None if placed is None else self._context(x, drawn, placed)
        x = jax.tree.map(on_batch, x)
        c = self.config

        def branch(
            index: int, layer: Callable[..., Tokens], *more: Any
        ) -> Callable[[Tokens], Tokens]:
            norm, gamma = layer_norm(c, f"norm{index}"), None
            if c.layer_scale is not None:
                gamma = LayerScale(c.width, c.layer_scale, name=f"layer_scale{index}")()
            return lambda x: layer(jax.tree.map(norm, x), gamma, *more)

        attention = branch(1, Attention(c, name="attn"), context)
        for residual in (attention, branch(2, Mlp(c, name="mlp"))):
            if self.train and c.drop_path > 0:
                group = c.drop_path_group or jax.tree.leaves(x)[0].shape[0]
                x = stochastic_depth(x, residual, c.drop_path, self.make_rng("drop_path"), group)
            else:
                x = jax.tree.map(jnp.add, x, residual(x))
        x = jax.tree.map(on_batch, x)
        if store is not None:
            store = store.at[slot].set(x, mode="drop")
        return (x, store), None

    def _context(self, x: Tokens, drawn: jax.Array | None, placed: Any) -> Any:
        """The :class:`Context` of each size of tokens."""
        rope = self.config.rope

        def of(tokens: jax.Array, one: Placed, size: int) -> Context:
            if self.train and self.config.drop_path > 0 and one.by_image:
                raise ValueError("stochastic depth is for images that keep the same patches")
            if rope is None or one.coordinates is None:
                return Context(None, one.keys)
            prefix = tokens.shape[1] - one.coordinates.shape[-2]
            moved = None if drawn is None else drawn[size]
            return Context(rope.rotation(one.coordinates, moved, prefix), one.keys)

        if isinstance(placed, Placed):
            return of(x, placed, 0)
        return tuple(of(tokens, one, i) for i, (tokens, one) in enumerate(zip(x, placed)))


def block_stack(
    config: BlockConfig, train: bool, name: str = "blocks", placed: bool = False
) -> nn.Module:
    """``config.depth`` blocks as one module of type ((tokens, store), slots (L,)) ->
    ((tokens, store), None). placed: it takes two arguments more, what :class:`Block` calls
    ``drawn``, with an axis L before the others, and ``placed``."""
    block: type[nn.Module] = Block
    if config.remat != "none":
        # The scan already keeps XLA from merging the second run with the first, so no barrier is
        # needed.
        block = nn.remat(Block, policy=REMAT_POLICIES[config.remat], prevent_cse=False)
    stack = nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True, "drop_path": True},
        in_axes=(0, 0, nn.broadcast) if placed else 0,
        length=config.depth,
    )
    return stack(config, train, name=name)


def subset_size(group: int, rate: float) -> int:
    """How many of ``group`` images go through a residual branch:
    max(int(group * (1 - rate)), 1)."""
    return max(int(group * (1 - rate)), 1)


def stochastic_depth(
    x: Tokens, branch: Callable[[Tokens], Tokens], rate: float, rng: jax.Array, group: int
) -> Tokens:
    """x + branch(x) for a random subset of the images, scaled so that the expectation is the full
    branch.

    DINOv2's stochastic depth (arXiv 2304.07193, section 5): of each ``group`` of n consecutive
    images exactly s = ``subset_size(n, rate)`` are computed, and n / s * branch is added to those;
    the others do not change. The count is exact, so shapes are static and the work for the others
    is really saved.

    x: (B, T, D), or a tuple of such for crops of several sizes. ``group`` counts images of the
    first; the others are split into as many groups. Each size draws its own subsets, as in the
    original.

    Raises:
      ValueError: if B is not a multiple of ``group``, or another size does not divide into as many
        groups.
    """
    sizes, tree = jax.tree.flatten(x)
    groups = sizes[0].shape[0] // group
    for tokens in sizes:
        if sizes[0].shape[0] % group or tokens.shape[0] % groups:
            raise ValueError(
                f"a batch of {tokens.shape[0]} images does not divide into stochastic-depth groups "
                f"of {group}"
            )
    grouped = [rearrange(tokens, "(g n) ... -> g n ...", g=groups) for tokens in sizes]
    chosen = [
        _draw_subsets(rng, jnp.arange(groups) + i * groups, tokens.shape[1], rate)
        for i, tokens in enumerate(grouped)
    ]
    subsets = [
        rearrange(gather_tokens(tokens, index), "g s ... -> (g s) ...")
        for tokens, index in zip(grouped, chosen)
    ]

    updates = jax.tree.leaves(branch(jax.tree.unflatten(tree, subsets)))
    add = jax.vmap(
        lambda rows, index, new: rows.at[index].add(
            new, unique_indices=True, mode="promise_in_bounds"
        )
    )
    out = []
    for tokens, index, update in zip(grouped, chosen, updates):
        update = update * (tokens.shape[1] / index.shape[1])
        update = rearrange(update, "(g s) ... -> g s ...", g=groups)
        out.append(rearrange(add(tokens, index, update), "g n ... -> (g n) ..."))
    return jax.tree.unflatten(tree, out)


def _draw_subsets(rng: jax.Array, groups: jax.Array, size: int, rate: float) -> jax.Array:
    """Which images of each group go through the branch, (number of groups, s) int32. groups: the
    numbers of the groups; each draws from ``rng`` by its own. size: images in a group."""
    keys = jax.vmap(lambda number: jax.random.fold_in(rng, number))(groups)
    s = subset_size(size, rate)
    return jax.vmap(lambda key: jax.random.permutation(key, size)[:s])(keys)
