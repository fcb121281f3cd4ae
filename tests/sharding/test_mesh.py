from unittest.mock import Mock

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from ml_collections import ConfigDict

from webssl_jax.config import ConfigError
from webssl_jax.sharding import mesh as meshes


def sharding(replica=1, fsdp=-1, tensor=1):
    return ConfigDict({"replica": replica, "fsdp": fsdp, "tensor": tensor})


# A snake through two 2 x 2 hosts, as a torus gives it, and one that leaps.
ORDERS = [(0, 1, 4, 5, 7, 6, 3, 2), (5, 0, 6, 3, 1, 7, 2, 4)]


def permuted(order, replica, fsdp, tensor):
    devices = np.array(jax.devices())[list(order)]
    return meshes.create(sharding(replica, fsdp, tensor), list(devices))


def test_minus_one_takes_the_devices_that_are_left():
    assert meshes.mesh_shape(sharding(2, -1, 2), 8) == (2, 2, 2)
    assert meshes.mesh_shape(sharding(-1, 4, 1), 8) == (2, 4, 1)


@pytest.mark.parametrize("sizes", [(3, -1, 1), (2, 2, 1), (16, 1, 1)])
def test_sizes_that_do_not_make_the_devices_are_refused(sizes):
    with pytest.raises(ConfigError, match="devices"):
        meshes.mesh_shape(sharding(*sizes), 8)


def test_a_batch_that_does_not_divide_is_refused():
    mesh = meshes.create(sharding(2, 4, 1))
    meshes.check_batch(ConfigDict({"global_batch": 32, "accumulation_steps": 4}), mesh)
    with pytest.raises(ConfigError, match="12 images, which do not divide over 8 .* 16 or 32"):
        meshes.check_batch(ConfigDict({"global_batch": 24, "accumulation_steps": 2}), mesh)


def test_a_tpu_mesh_may_split_the_dimensions_of_the_torus(monkeypatch):
    class Chip:
        platform = "tpu"

        def __init__(self, slice_index):
            self.slice_index = slice_index

    seen = []

    def create(shape, *rest, **options):
        seen.append((shape, options))
        return np.array(jax.devices()).reshape(2, 2, 2)

    monkeypatch.setattr(meshes.mesh_utils, "create_device_mesh", create)
    monkeypatch.setattr(meshes.mesh_utils, "create_hybrid_device_mesh", create)
    meshes.create(sharding(2, 2, 2), [Chip(0)] * 8)
    meshes.create(sharding(2, 2, 2), [Chip(0)] * 4 + [Chip(1)] * 4)
    split = {"allow_split_physical_axes": True}
    assert seen == [((2, 2, 2), split), ((1, 2, 2), split)]


@pytest.mark.parametrize("order", [range(8), *ORDERS])
@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2), (1, 1, 8)])
def test_a_global_array_has_the_rows_in_order_however_the_devices_lie(order, sizes):
    mesh = permuted(order, *sizes)
    batch = {"image": np.random.default_rng(0).random((16, 3, 2)), "label": np.arange(16)}
    np.testing.assert_array_equal(meshes.local_rows(mesh, 16), np.arange(16))
    arrays = meshes.to_global(batch, mesh)
    for name, value in batch.items():
        assert arrays[name].sharding == meshes.batch_sharding(mesh)
        np.testing.assert_array_equal(arrays[name], value.astype(arrays[name].dtype))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 4, 1), (1, 4, 2)])
def test_two_processes_own_all_rows_and_find_every_shard_in_their_own(order, sizes):
    """Devices 0-3 belong to one pretended process, 4-7 to another."""
    mesh = permuted(order, *sizes)
    batch = np.arange(100, 116)
    indices = meshes.batch_sharding(mesh).devices_indices_map(batch.shape)
    owned = []
    for process in (0, 1):
        mine = {d: i for d, i in indices.items() if d.id // 4 == process}
        rows = meshes.rows_of(mine.values(), len(batch))
        assert np.array_equal(rows, np.unique(np.concatenate([np.r_[i[0]] for i in mine.values()])))
        for index in mine.values():
            shard = meshes.take_shard(batch[rows], rows, index)
            np.testing.assert_array_equal(shard, batch[index])
        owned.append(rows)
    np.testing.assert_array_equal(np.unique(np.concatenate(owned)), np.arange(16))
    if sizes == (1, 8, 1):
        assert np.any(np.diff(owned[0]) > 1)  # not one block: the case that used to be refused


def test_a_batch_with_rows_to_spare_is_refused():
    with pytest.raises(ValueError, match="image: 12 rows, but this process fills 8 shards"):
        meshes.to_global({"image": np.zeros(12)}, meshes.create(sharding()))


def test_the_mesh_of_one_device_holds_the_whole_batch():
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), meshes.AXES)
    np.testing.assert_array_equal(meshes.local_rows(mesh, 6), np.arange(6))
    np.testing.assert_array_equal(meshes.to_global({"x": np.arange(6)}, mesh)["x"], np.arange(6))


def test_what_a_process_holds_only_a_part_of_is_gathered_and_nothing_else(monkeypatch):
    gathered = []

    def gather(array, tiled):
        gathered.append(array)
        return np.arange(3) if tiled else None

    monkeypatch.setattr(meshes.multihost_utils, "process_allgather", gather)
    part = Mock(spec=jax.Array, is_fully_addressable=False, is_fully_replicated=False)
    copy = Mock(spec=jax.Array, is_fully_addressable=False, is_fully_replicated=True)
    copy.addressable_data = lambda index: jax.numpy.arange(3)
    for array in (part, copy, jax.numpy.arange(3), np.arange(3)):
        found = meshes.whole(array)
        assert isinstance(found, np.ndarray)
        np.testing.assert_array_equal(found, np.arange(3))
    assert gathered == [part]
