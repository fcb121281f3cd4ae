import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from webssl_jax import config as configs
from webssl_jax import methods, params
from webssl_jax.config import UserError
from webssl_jax.optim.optimizer import Optimizer
from webssl_jax.sharding import mesh as meshes
from webssl_jax.sharding import rules
from webssl_jax.train_state import abstract

MESH = ConfigDict({"replica": 2, "fsdp": 2, "tensor": 2})


def mae_state(mesh, size="300m"):
    config = configs.load(f"configs/web_mae.py:size={size}")
    method = methods.create(config)
    return abstract(method, Optimizer.from_config(config.optim, method.tables()), 0, 8, mesh)


def test_parameters_and_both_moments_are_cut_alike():
    state = mae_state(meshes.create(MESH))
    flat = params.flatten(state)
    specs = {
        path: leaf.sharding.spec for path, leaf in flat.items() if path.endswith("attn/q/kernel")
    }
    encoder = [path for path in specs if "encoder" in path]
    assert len(encoder) == 3  # parameter, first and second moment
    assert all(specs[path] == P(None, "fsdp", "tensor") for path in encoder)


def test_nearly_all_of_a_paper_size_is_sharded():
    mesh = meshes.create(MESH)
    state = mae_state(mesh)
    fraction, whole = rules.sharded_fraction(state.params, mesh)
    assert fraction > 0.99
    rules.check(state.params, mesh, 0.02)


def pod(replica, fsdp, tensor=1):
    """A mesh of a size that no test machine has."""
    return AbstractMesh(
        (replica, fsdp, tensor), meshes.AXES, axis_types=(AxisType.Auto,) * len(meshes.AXES)
    )


def device_bytes(tree):
    """What one device holds, by the shardings of the state itself."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in params.flatten(tree).values()
    )


def test_a_parameter_without_a_rule_is_refused_as_whole():
    mesh = meshes.create(MESH)
    odd = {"other": {"kernel": jax.ShapeDtypeStruct((64, 64), jnp.float32)}}
    with pytest.raises(UserError, match=r"fsdp 2 x tensor 2 cuts other/kernel \(64, 64\) into 1;"):
        rules.check(odd, mesh, 0.02)
    assert rules.sharded_fraction(odd, mesh) == (0.0, [("other/kernel", 64 * 64 * 4)])


@pytest.mark.parametrize("size, replica, fsdp", [("2b", 1, 256), ("2b", 2, 256)])
def test_a_width_that_fsdp_does_not_divide_is_refused_with_one_that_does(size, replica, fsdp):
    """2b is 2688 = 21 x 128 wide: over 256 devices each would hold nearly everything."""
    mesh = pod(replica, fsdp)
    state = mae_state(mesh, size)
    held, total = device_bytes(state.params), params.num_bytes(state.params)
    assert held > 0.9 * total
    fraction, whole = rules.sharded_fraction(state.params, mesh)
    assert fraction < 0.1 and whole[0][1] > 2**30
    with pytest.raises(UserError) as error:
        rules.check(state.params, mesh, 0.02)
    line = str(error.value)
    assert f"hold {held / 2**20:,.1f} MiB of parameters instead of {total / 2**28:,.1f}" in line
    assert "encoder/blocks/mlp/fc1/kernel" in line and "\n" not in line
    assert f"--config.sharding.fsdp=128 --config.sharding.replica={2 * replica}" in line
    advised = pod(2 * replica, 128)
    rules.check(state.params, advised, 0.02)
    assert device_bytes(mae_state(advised, size).params) < total / 128 + 0.02 * total


@pytest.mark.parametrize(
    "size, fsdp, tensor", [("1b", 256, 1), ("2b", 128, 2), ("3b", 256, 1), ("5b", 256, 1)]
)
def test_a_size_that_divides_passes_on_a_pod_and_lies_in_even_shares(size, fsdp, tensor):
    mesh = pod(1, fsdp, tensor)
    state = mae_state(mesh, size)
    rules.check(state.params, mesh, 0.02)
    held, total = device_bytes(state.params), params.num_bytes(state.params)
    assert held < total / (fsdp * tensor) + 0.02 * total


@pytest.mark.parametrize("spec", ["dinov3:size=7b", "mocov3:size=b16", "ijepa:size=b16"])
def test_recipes_of_other_methods_start_on_a_slice(spec):
    """Heads and projectors are cut too."""
    method = methods.create(configs.load(spec))
    spec = method.batch_spec(1)
    tree = jax.eval_shape(lambda: method.init(jax.random.key(0), spec)).params
    rules.check(tree, pod(8, 16), 0.02)


def test_a_kernel_cut_by_one_of_two_axes_counts_by_what_it_costs():
    """(2, 7, 8): fsdp falls away, tensor halves it; a quarter would be even, so 25% too much."""
    mesh = meshes.create(MESH)
    half = {"blocks": {"attn": {"q": {"kernel": jax.ShapeDtypeStruct((2, 7, 8), jnp.float32)}}}}
    rules.check(half, mesh, 0.26)
    with pytest.raises(UserError, match="into 2; choose sizes that divide"):
        rules.check(half, mesh, 0.24)


def test_plain_data_parallel_may_keep_everything_whole():
    rules.check({"other": {"kernel": jax.ShapeDtypeStruct((64, 64), jnp.float32)}}, pod(8, 1), 0.0)


def test_a_mesh_axis_of_one_is_never_named():
    path = "encoder/blocks/attn/q/kernel"
    assert rules.spec(path, (2, 8, 8), pod(1, 4)) == P(None, "fsdp", None)
    assert rules.spec(path, (2, 7, 8), pod(1, 4)) == P(None, None, None)
    assert rules.spec(path, (2, 7, 8), pod(8, 1)) == P(None, None, None)


def test_an_axis_that_does_not_divide_stays_whole():
    mesh = meshes.create(MESH)
    assert rules.spec("encoder/blocks/attn/q/kernel", (2, 7, 8), mesh) == P(None, None, "tensor")
