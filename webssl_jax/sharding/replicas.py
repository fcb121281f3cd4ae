"""Reading and writing a state once, not once for each of its copies.

The axis ``replica`` holds whole copies of the state, one or more a slice. When all of them restore
a checkpoint, the storage is read that many times. Instead the machines of one replica read, and a
sum over ``replica``, to which all others bring zeros, gives it to everybody. It is a sum of bits,
so that not even the sign of a zero changes. What machines write to their own disks is shared out
among the replicas of a slice in the same way, each array to one of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from webssl_jax.params import num_bytes

_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def one_of(abstract: Any, index: int) -> Any | None:
    """``abstract`` (a tree of ShapeDtypeStruct with shardings of one mesh), laid on one replica
    alone; None where there is only one."""
    if _number(abstract) == 1:
        return None
    return jax.tree.map(lambda leaf: _laid_on(leaf, index), abstract)


def shared_out(abstract: Any) -> list[Any]:
    """``abstract`` for each domain of failure (a slice; on CPUs a process): every array laid on one
    of the replicas there, so that all have about the same number of bytes to write. ``abstract``
    itself, once, where there is only one replica."""
    if _number(abstract) == 1:
        return [abstract]
    mesh = _mesh(abstract)
    domains: dict[int, list[int]] = {}
    for index in range(_number(abstract)):
        domains.setdefault(_domain(_devices_of(mesh, index).flat[0]), []).append(index)
    return [_share_out(abstract, replicas) for replicas in domains.values()]


def _share_out(abstract: Any, replicas: list[int]) -> Any:
    leaves, structure = jax.tree.flatten(abstract)
    sizes = [num_bytes(leaf) for leaf in leaves]
    load = dict.fromkeys(replicas, 0)
    laid: list[jax.ShapeDtypeStruct | None] = [None] * len(leaves)
    # the largest first, each to whom has least: loads then differ by one array at most
    for i in sorted(range(len(leaves)), key=lambda i: -sizes[i]):
        replica = min(replicas, key=load.__getitem__)
        load[replica] += sizes[i]
        laid[i] = _laid_on(leaves[i], replica)
    return jax.tree.unflatten(structure, laid)


def processes(abstract: Any) -> set[int]:
    """Those that hold a part of ``abstract``."""
    meshes = {leaf.sharding.mesh for leaf in jax.tree.leaves(abstract)}
    return {device.process_index for mesh in meshes for device in mesh.devices.flat}


def broadcast(parts: Any | None, abstract: Any) -> Any:
    """Arrays laid out as ``abstract``, from arrays each of which a single replica holds. A
    collective, one array after the other.

    Args:
      parts: None for an array of which this process holds no part; None alone if of all.
    """
    if parts is None:
        return jax.tree.map(_broadcast_one, abstract)
    return jax.tree.map(_broadcast_one, abstract, parts)


def _broadcast_one(wanted: jax.ShapeDtypeStruct, array: jax.Array | None = None) -> jax.Array:
    mesh, spec = wanted.sharding.mesh, wanted.sharding.spec
    stacked = NamedSharding(mesh, PartitionSpec("replica", *spec))
    shape = (mesh.shape["replica"], *wanted.shape)
    here = {} if array is None else {s.device: s.data for s in array.addressable_shards}
    pieces = []
    for device in stacked.addressable_devices:
        if device in here:
            pieces.append(here[device][None])
        else:
            zeros = np.zeros(stacked.shard_shape(shape), wanted.dtype)
            pieces.append(jax.device_put(zeros, device))
    parts = jax.make_array_from_single_device_arrays(shape, stacked, pieces)
    return _sum_of_bits(wanted.sharding)(parts)


@functools.cache
def _sum_of_bits(sharding: NamedSharding) -> Callable[[jax.Array], jax.Array]:
    def add(parts: jax.Array) -> jax.Array:
        if parts.dtype == jnp.bool_:
            return jnp.any(parts, axis=0)
        word = _WORDS[parts.dtype.itemsize]
        bits = jax.lax.bitcast_convert_type(parts, word)
        return jax.lax.bitcast_convert_type(jnp.sum(bits, axis=0, dtype=word), parts.dtype)

    return jax.jit(add, out_shardings=sharding)


def _laid_on(leaf: jax.ShapeDtypeStruct, index: int) -> jax.ShapeDtypeStruct:
    mesh = leaf.sharding.mesh
    mesh = Mesh(_devices_of(mesh, index), mesh.axis_names, axis_types=mesh.axis_types)
    return leaf.update(sharding=NamedSharding(mesh, leaf.sharding.spec))


def _domain(device: jax.Device) -> int:
    return device.slice_index if device.platform == "tpu" else device.process_index


def _devices_of(mesh: Mesh, index: int) -> np.ndarray:
    """Those of one replica, with the axes of the mesh."""
    return np.take(mesh.devices, [index], axis=mesh.axis_names.index("replica"))


def _mesh(abstract: Any) -> Mesh:
    return jax.tree.leaves(abstract)[0].sharding.mesh


def _number(abstract: Any) -> int:
    """How many replicas there are; 1 also where an array is cut over them."""
    specs = [tuple(leaf.sharding.spec) for leaf in jax.tree.leaves(abstract)]
    cut = any("replica" in jax.tree.leaves(spec) for spec in specs)
    return 1 if cut else _mesh(abstract).shape.get("replica", 1)
