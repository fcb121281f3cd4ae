"""The device mesh: ``replica`` (across slices: plain data parallel), ``fsdp`` (data parallel with
sharded state) and ``tensor`` (each matrix product split over devices)."""

from __future__ import annotations

import jax
import numpy as np
from jax.experimental import mesh_utils
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
    return tuple(sizes.values())


def create(sharding: ConfigDict, devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices with Auto axis types: the compiler places collectives, rules place
    the state."""
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
        grid = mesh_utils.create_hybrid_device_mesh(within, (num_slices, 1, 1), devices)
    elif devices[0].platform == "tpu":
        grid = mesh_utils.create_device_mesh(shape, devices)
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
    ways = int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))
    micro = config.global_batch // config.accumulation_steps
    if micro % ways:
        raise ConfigError(
            f"config.global_batch = {config.global_batch} in {config.accumulation_steps} "
            f"accumulation step(s) gives {micro} images, which do not divide over {ways} batch "
            "shards"
        )


def local_rows(mesh: Mesh, global_batch: int) -> tuple[int, int]:
    """The rows [lo, hi) of every global batch that this process must load.

    Several processes get the same rows when ``tensor`` spans hosts.

    Raises:
      ConfigError: when this process's devices hold rows that are not one aligned block.
    """
    sharding = batch_sharding(mesh)
    slices = sharding.addressable_devices_indices_map((global_batch,)).values()
    rows = {(s[0].start or 0, s[0].stop if s[0].stop is not None else global_batch) for s in slices}
    lo, hi = min(r[0] for r in rows), max(r[1] for r in rows)
    if sum(b - a for a, b in rows) != hi - lo or lo % (hi - lo) or global_batch % (hi - lo):
        raise ConfigError(
            f"config.sharding: this process's devices hold the batch rows {sorted(rows)}, not one "
            "aligned block; order the mesh axes so that a host's devices are neighbours"
        )
    return lo, hi


def to_global(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Assembles each process's rows (:func:`local_rows`) into global arrays."""
    sharding = batch_sharding(mesh)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}
