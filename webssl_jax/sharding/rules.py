"""Which axis of which parameter lies on which mesh axis: one ordered table for parameters, teacher
and optimiser.

A rule is (regex over the path, partition spec); the first match wins. Paths of optimiser moments
and teachers end in the parameter's own path, so one table serves all. Matrices are cut on their
input axis by ``fsdp`` and on their output axis by ``tensor`` where the layer opens (q, k, v, fc1),
the other way round where it closes (out, fc2), so a tensor-parallel block needs one reduction.
"""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from webssl_jax import params as paths
from webssl_jax.config import UserError

# The leading None of block rules is the axis of stacked layers.
RULES = (
    (r"blocks/attn/(q|k|v)/kernel$", (None, "fsdp", "tensor")),
    (r"blocks/attn/out/kernel$", (None, "tensor", "fsdp")),
    (r"blocks/mlp/(fc1|w1|w2)/kernel$", (None, "fsdp", "tensor")),
    (r"blocks/mlp/(fc2|w3)/kernel$", (None, "tensor", "fsdp")),
    (r"blocks/.*/(bias|scale|gamma)$", (None, "fsdp")),
    (r"patch_embed/kernel$", (None, None, None, "fsdp")),
    (r"(embed|pred)/kernel$", ("fsdp", "tensor")),
    (r"(cls_token|mask_token|pos_embed|register_tokens)$", (None, None, "fsdp")),
    (r"/(bias|scale)$", ("fsdp",)),
)


def spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The partition of one leaf. An axis that does not divide by its mesh axis stays whole."""
    axes = paths.lookup(RULES, path, ())
    if len(axes) != len(shape):
        return PartitionSpec()
    return PartitionSpec(
        *(
            axis if axis and size % mesh.shape[axis] == 0 else None
            for axis, size in zip(axes, shape, strict=True)
        )
    )


def shardings(tree, mesh: Mesh):
    """A tree of ``NamedSharding`` for any tree of arrays or shapes: the whole train state goes
    through here."""
    return paths.map_with_path(lambda path, x: NamedSharding(mesh, spec(path, x.shape, mesh)), tree)


def sharded_fraction(tree, mesh: Mesh) -> tuple[float, list[tuple[str, int]]]:
    """Share of parameter bytes that is cut over ``fsdp``/``tensor``, and the largest leaves that
    are not."""
    whole, total = [], 0
    for path, leaf in paths.flatten(tree).items():
        size = int(np.prod(leaf.shape)) * leaf.dtype.itemsize
        total += size
        if all(axis is None for axis in spec(path, leaf.shape, mesh)):
            whole.append((path, size))
    whole.sort(key=lambda row: -row[1])
    return 1 - sum(size for _, size in whole) / max(total, 1), whole


def check(tree, mesh: Mesh, max_unsharded_fraction: float) -> None:
    """Fails when too many parameter bytes would lie whole on every device.

    Raises:
      UserError: naming the largest unsharded parameters.
    """
    if mesh.shape["fsdp"] * mesh.shape["tensor"] == 1:
        return  # plain data parallel keeps a copy everywhere, on purpose
    fraction, whole = sharded_fraction(tree, mesh)
    if 1 - fraction > max_unsharded_fraction:
        worst = ", ".join(f"{path} ({size / 2**20:.1f} MiB)" for path, size in whole[:3])
        raise UserError(
            f"{100 * (1 - fraction):.1f}% of the parameter bytes would not be sharded over "
            f"{dict(mesh.shape)}: {worst}; choose sizes that divide, or raise "
            "config.sharding.max_unsharded_fraction"
        )


def constrain(tree, mesh: Mesh):
    """Pins a tree inside jit to its rules: the carry of gradient accumulation would else be whole
    everywhere."""
    return jax.lax.with_sharding_constraint(tree, shardings(tree, mesh))
