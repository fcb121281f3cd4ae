"""Reading a state once and sending it to the other replicas, instead of reading it by each.

The axis ``replica`` holds whole copies of the state, one or more a slice. When all of them restore
a checkpoint, the storage is read that many times. Instead the machines of one replica read, and a
sum over ``replica``, to which all others bring zeros, gives it to everybody. It is a sum of
bits, so that not even the sign of a zero changes.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def number(abstract: Any) -> int:
    """How many replicas the mesh has that ``abstract`` (ShapeDtypeStructs with shardings of one
    mesh) is laid on."""
    return _mesh(abstract).shape.get("replica", 1)


def one_of(abstract: Any, index: int) -> Any | None:
    """``abstract``, laid on one replica alone; None where there is only one, or where a leaf is cut
    over ``replica``."""
    leaves = jax.tree.leaves(abstract)
    if number(abstract) == 1:
        return None
    if any("replica" in jax.tree.leaves(tuple(leaf.sharding.spec)) for leaf in leaves):
        return None
    mesh = _mesh(abstract)
    devices = np.take(mesh.devices, [index], axis=mesh.axis_names.index("replica"))
    mesh = Mesh(devices, mesh.axis_names, axis_types=mesh.axis_types)
    return jax.tree.map(lambda x: x.update(sharding=NamedSharding(mesh, x.sharding.spec)), abstract)


def processes(abstract: Any) -> set[int]:
    """Those that hold a part of ``abstract``."""
    return {device.process_index for device in _mesh(abstract).devices.flat}


def spread(one: Any | None, abstract: Any) -> Any:
    """Arrays laid out as ``abstract`` says, out of those of :func:`one_of` the replicas (None on
    processes that hold no part of it). A collective, one array after the other."""
    wanted, structure = jax.tree.flatten(abstract)
    arrays = [None] * len(wanted) if one is None else jax.tree.leaves(one)
    return structure.unflatten(map(_spread_one, arrays, wanted))


def _spread_one(array: jax.Array | None, wanted: jax.ShapeDtypeStruct) -> jax.Array:
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
def _sum_of_bits(sharding: NamedSharding):
    def add(parts: jax.Array) -> jax.Array:
        if parts.dtype == jnp.bool_:
            return jnp.any(parts, axis=0)
        word = _WORDS[parts.dtype.itemsize]
        bits = jax.lax.bitcast_convert_type(parts, word)
        return jax.lax.bitcast_convert_type(jnp.sum(bits, axis=0, dtype=word), parts.dtype)

    return jax.jit(add, out_shardings=sharding)


def _mesh(abstract: Any) -> Mesh:
    return jax.tree.leaves(abstract)[0].sharding.mesh
