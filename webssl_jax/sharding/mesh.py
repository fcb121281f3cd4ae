"""The device mesh: ``replica`` (across slices: plain data parallel), ``fsdp`` (data parallel with
sharded state) and ``tensor`` (each matrix product split over devices)."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from webssl_jax.config import ConfigError

AXES = ("replica", "fsdp", "tensor")
BATCH_AXES = ("replica", "fsdp")


def mesh_shape(sharding: ConfigDict, num_devices: int) -> tuple[int, int, int]:
    """Sizes of :data:`AXES`; a single -1 takes what is left.

    Raises:
      ConfigError: when the sizes do not multiply to the number of devices.
    """
    sizes = {axis: int(sharding[axis]) for axis in AXES}
    fixed = int(np.prod([s for s in sizes.values() if s != -1]))
    for axis, size in sizes.items():
        if size == -1:
            if num_devices % fixed:
                raise ConfigError(
                    f"config.sharding.{axis} = -1: {num_devices} devices do not divide by the "
                    f"{fixed} of the other axes"
                )
            sizes[axis] = num_devices // fixed
    if np.prod(list(sizes.values())) != num_devices:
        written = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
        raise ConfigError(
            f"config.sharding: {written} is not the {num_devices} devices of this run; "
            "set one axis to -1"
        )
    return sizes["replica"], sizes["fsdp"], sizes["tensor"]


def create(sharding: ConfigDict, devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices with Auto axis types: the compiler places collectives, rules place
    the state.

    On TPUs the mesh follows the torus, so neighbours in it are neighbours in the machine, and a
    host's devices may hold any rows of a batch: see :func:`local_rows`. An axis may take part of a
    dimension of the torus, else most sizes of ``tensor`` and ``replica`` would be impossible.

    Raises:
      ConfigError: when the sizes do not fit the devices or the slices.
    """
    devices = devices if devices is not None else jax.devices()
    shape = mesh_shape(sharding, len(devices))
    num_slices = len({getattr(device, "slice_index", 0) for device in devices})
    if num_slices > 1:
        if shape[0] % num_slices:
            raise ConfigError(
                f"config.sharding.replica = {shape[0]}: must be a multiple of the {num_slices} "
                "slices"
            )
        within = (shape[0] // num_slices, *shape[1:])
        grid = mesh_utils.create_hybrid_device_mesh(
            within, (num_slices, 1, 1), devices, allow_split_physical_axes=True
        )
    elif devices[0].platform == "tpu":
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        grid = np.asarray(devices).reshape(shape)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Images are split over ``replica`` and ``fsdp`` on their leading axis."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def check_batch(config: ConfigDict, mesh: Mesh) -> None:
    """Refuses a batch that does not divide over the mesh, before anything compiles.

    Raises:
      ConfigError: naming the sizes.
    """
    check_batch_over(config, batch_shards(mesh))


def check_batch_over(config: ConfigDict, ways: int) -> None:
    """:func:`check_batch` for a mesh of so many batch shards.

    Raises:
      ConfigError: naming the sizes, and the nearest batches that fit.
    """
    micro = config.global_batch // config.accumulation_steps
    if micro % ways:
        least = ways * config.accumulation_steps
        below = config.global_batch // least * least
        fit = f"{below or ''}{' or ' if below else ''}{below + least}"
        raise ConfigError(
            f"config.global_batch = {config.global_batch} in {config.accumulation_steps} "
            f"accumulation step(s) gives {micro} images, which do not divide over {ways} batch "
            f"shards; the nearest that fits: {fit}"
        )


def local_rows(mesh: Mesh, global_batch: int) -> np.ndarray:
    """The rows of every global batch that this process must load: sorted, each once.

    They need not be neighbours, for a mesh follows the torus and not the hosts. Several processes
    get the same rows when ``tensor`` spans hosts.
    """
    sharding = batch_sharding(mesh)
    indices = sharding.devices_indices_map((global_batch,))
    return rows_of([indices[device] for device in sharding.addressable_devices], global_batch)


def rows_of(indices: Iterable[tuple[slice, ...]], global_batch: int) -> np.ndarray:
    """The rows that several devices hold together, from the index of each device's shard."""
    return np.unique(np.concatenate([np.arange(global_batch)[index[0]] for index in indices]))


def take_shard(local: np.ndarray, rows: np.ndarray, index: tuple[slice, ...]) -> np.ndarray:
    """One device's shard: the rows ``index[0]`` of the global batch, out of ``local``, which holds
    the global rows ``rows``."""
    first = np.searchsorted(rows, index[0].start or 0)
    last = len(rows) if index[0].stop is None else np.searchsorted(rows, index[0].stop)
    return local[first:last]


def to_global(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Assembles each process's rows (:func:`local_rows`) into global arrays.

    Row ``r`` of the result is global row ``r``, in whatever order the mesh has its devices.
    """
    sharding = batch_sharding(mesh)
    shards = batch_shards(mesh)
    own = len(local_rows(mesh, shards))  # of a batch with one row a shard
    out: dict[str, jax.Array] = {}
    for name, local in batch.items():
        if len(local) % own:
            raise ValueError(f"{name}: {len(local)} rows, but this process fills {own} shards")
        global_batch = len(local) // own * shards
        rows = local_rows(mesh, global_batch)
        out[name] = jax.make_array_from_callback(
            (global_batch, *local.shape[1:]), sharding, functools.partial(take_shard, local, rows)
        )
    return out


def from_whole(rows: np.ndarray, mesh: Mesh) -> jax.Array:
    """A global array of ``rows``, cut as a batch is; every process has them all."""
    return jax.make_array_from_callback(rows.shape, batch_sharding(mesh), lambda index: rows[index])


def local_part(array: jax.Array) -> np.ndarray:
    """The rows of a batch that this process's devices hold, in the order of :func:`local_rows`."""
    shards = {shard.index[0].start or 0: shard for shard in array.addressable_shards}
    return np.concatenate([np.asarray(shards[start].data) for start in sorted(shards)])


def whole(array: jax.Array | np.ndarray) -> np.ndarray:
    """All of an array on every process. A collective where it lies on several of them."""
    if not isinstance(array, jax.Array) or array.is_fully_addressable:
        return np.asarray(array)
    if array.is_fully_replicated:
        return np.asarray(array.addressable_data(0))
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def batch_shards(mesh: Mesh) -> int:
    """Over how many shards a batch is cut."""
    return int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))
