"""Which axis of which parameter lies on which mesh axis: one ordered table for parameters, teacher
and optimiser.

A rule is (regex over the path, partition spec); the first match wins. Paths of optimiser moments
and teachers end in the parameter's own path, so one table serves all. Matrices are cut on their
input axis by ``fsdp`` and on their output axis by ``tensor`` where the layer opens (q, k, v, fc1),
the other way round where it closes (out, fc2), so a tensor-parallel block needs one reduction.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from webssl_jax import params as paths
from webssl_jax.config import UserError

# Only the names and sizes of the axes count here, so a mesh without devices does as well.
AnyMesh = Mesh | AbstractMesh

# The leading None of block rules is the axis of stacked layers.
RULES = (
    (r"blocks/attn/(q|k|v)/kernel$", (None, "fsdp", "tensor")),
    (r"blocks/attn/out/kernel$", (None, "tensor", "fsdp")),
    (r"blocks/mlp/(fc1|w1|w2)/kernel$", (None, "fsdp", "tensor")),
    (r"blocks/mlp/(fc2|w3)/kernel$", (None, "tensor", "fsdp")),
    (r"blocks/.*/(bias|scale|gamma)$", (None, "fsdp")),
    (r"patch_embed/kernel$", (None, None, None, "fsdp")),
    (r"(embed|pred|projection|lm_head)/kernel$", ("fsdp", "tensor")),
    (r"(_head|connector|projector|predictor)/fc\d/kernel$", ("fsdp", "tensor")),
    (r"token_embed$", ("tensor", "fsdp")),
    (r"last_layer/(g|v|kernel)$", (None, "fsdp")),  # prototypes are many, channels few
    (r"(cls_token|mask_token|pos_embed|register_tokens|probe)$", (None, None, "fsdp")),
    (r"pool/(attn/(q|k|v)|mlp/fc1)/kernel$", ("fsdp", "tensor")),
    (r"pool/(attn/out|mlp/fc2)/kernel$", ("tensor", "fsdp")),
    (r"/(bias|scale)$", ("fsdp",)),
)


def spec(path: str, shape: tuple[int, ...], mesh: AnyMesh) -> PartitionSpec:
    """The partition of one leaf. An axis that does not divide by its mesh axis stays whole, and a
    mesh axis of size 1 cuts nothing, so it is not named."""
    return _spec(path, shape, mesh.shape)


def _spec(path: str, shape: tuple[int, ...], sizes: Mapping[str, int]) -> PartitionSpec:
    axes = paths.lookup(RULES, path, ())
    if len(axes) != len(shape):
        return PartitionSpec()
    return PartitionSpec(
        *(
            axis if axis and sizes[axis] > 1 and size % sizes[axis] == 0 else None
            for axis, size in zip(axes, shape, strict=True)
        )
    )


def shardings(tree: paths.Tree, mesh: AnyMesh) -> paths.Tree:
    """A tree of ``NamedSharding`` for any tree of arrays or shapes: the whole train state goes
    through here."""
    return paths.map_with_path(lambda path, x: NamedSharding(mesh, spec(path, x.shape, mesh)), tree)


def sharded_fraction(tree: paths.Tree, mesh: AnyMesh) -> tuple[float, list[tuple[str, int]]]:
    """Share of the bytes that is cut by all of ``fsdp`` x ``tensor``, and the leaves that are cut
    less or not at all, as (path, bytes), the one that wastes most memory first."""
    leaves = _leaves(tree, mesh.shape)
    full = mesh.shape["fsdp"] * mesh.shape["tensor"]
    rest = sorted((leaf for leaf in leaves if leaf.ways < full), key=lambda leaf: -leaf.held)
    total = sum(leaf.size for leaf in leaves)
    return 1 - sum(leaf.size for leaf in rest) / max(total, 1), [(x.path, x.size) for x in rest]


def check(tree: paths.Tree, mesh: AnyMesh, max_unsharded_fraction: float) -> None:
    """Fails when a device would hold far more parameters than its even share.

    The even share is the tree's bytes / (``fsdp`` x ``tensor``); a device may hold
    ``max_unsharded_fraction`` of the tree's bytes more than that.

    Raises:
      UserError: naming the parameters that cost most, and the largest ``fsdp`` that would pass.
    """
    sizes = mesh.shape
    full = sizes["fsdp"] * sizes["tensor"]
    if full == 1:
        return  # plain data parallel keeps a copy everywhere, on purpose
    if _excess(tree, sizes) <= max_unsharded_fraction:
        return
    leaves = _leaves(tree, sizes)
    held, total = sum(leaf.held for leaf in leaves), sum(leaf.size for leaf in leaves)
    worst = ", ".join(
        f"{leaf.path} {leaf.shape} into {leaf.ways}"
        for leaf in sorted(
            (leaf for leaf in leaves if leaf.ways < full), key=lambda leaf: -leaf.held
        )[:3]
    )
    advice = "choose sizes that divide"
    for fsdp in range(sizes["fsdp"] - 1, 1, -1):
        if sizes["fsdp"] % fsdp == 0:
            if _excess(tree, {**sizes, "fsdp": fsdp}) <= max_unsharded_fraction:
                replica = sizes["replica"] * sizes["fsdp"] // fsdp
                advice = (
                    f"use --config.sharding.fsdp={fsdp} --config.sharding.replica={replica}, "
                    "the largest fsdp that fits"
                )
                break
    raise UserError(
        f"each device would hold {held / 2**20:,.1f} MiB of parameters instead of "
        f"{total / full / 2**20:,.1f}, because {_written(sizes)} cuts {worst}; {advice} "
        "(or raise config.sharding.max_unsharded_fraction)"
    )


class _Leaf(NamedTuple):
    """size: bytes of the whole. ways: in how many pieces. held: bytes that one device holds."""

    path: str
    shape: tuple[int, ...]
    size: int
    ways: int

    @property
    def held(self) -> float:
        return self.size / self.ways


def _leaves(tree: paths.Tree, sizes: Mapping[str, int]) -> list[_Leaf]:
    out = []
    for path, leaf in paths.flatten(tree).items():
        shape = tuple(leaf.shape)
        axes = [axis for axis in _spec(path, shape, sizes) if axis]
        ways = math.prod(sizes[axis] for axis in axes)
        out.append(_Leaf(path, shape, math.prod(shape) * leaf.dtype.itemsize, ways))
    return out


def _excess(tree: paths.Tree, sizes: Mapping[str, int]) -> float:
    """What a device holds beyond its even share, in parts of the whole tree."""
    leaves = _leaves(tree, sizes)
    total = sum(leaf.size for leaf in leaves)
    held = sum(leaf.held for leaf in leaves)
    return held / max(total, 1) - 1 / (sizes["fsdp"] * sizes["tensor"])


def _written(sizes: Mapping[str, int]) -> str:
    return " x ".join(f"{axis} {sizes[axis]}" for axis in ("fsdp", "tensor") if sizes[axis] > 1)


def constrain(tree: paths.Tree, mesh: Mesh) -> paths.Tree:
    """Pins a tree inside jit to its rules: the carry of gradient accumulation would else be whole
    everywhere."""
    return jax.lax.with_sharding_constraint(tree, shardings(tree, mesh))
