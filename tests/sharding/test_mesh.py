import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from webssl_jax.config import ConfigError
from webssl_jax.sharding import mesh as meshes


def sharding(replica=1, fsdp=-1, tensor=1):
    return ConfigDict({"replica": replica, "fsdp": fsdp, "tensor": tensor})


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
    with pytest.raises(ConfigError, match="12 images, which do not divide over 8"):
        meshes.check_batch(ConfigDict({"global_batch": 24, "accumulation_steps": 2}), mesh)


def test_a_global_array_has_the_rows_in_order():
    mesh = meshes.create(sharding(2, 2, 2))
    rows = np.arange(16)
    assert meshes.local_rows(mesh, 16) == (0, 16)
    assert np.array_equal(meshes.to_global({"x": rows}, mesh)["x"], rows)
    assert len(jax.devices()) == 8
