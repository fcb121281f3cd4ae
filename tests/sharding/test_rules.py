import jax
import jax.numpy as jnp
import pytest
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


def mae_state(mesh, *overrides):
    config = configs.load("configs/web_mae.py:size=300m", overrides)
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


def test_a_run_whose_parameters_would_lie_whole_is_refused():
    mesh = meshes.create(MESH)
    odd = {"other": {"kernel": jax.ShapeDtypeStruct((64, 64), jnp.float32)}}
    with pytest.raises(UserError, match=r"100.0% of the parameter bytes .* other/kernel"):
        rules.check(odd, mesh, 0.02)


def test_an_axis_that_does_not_divide_stays_whole():
    mesh = meshes.create(MESH)
    assert rules.spec("encoder/blocks/attn/q/kernel", (2, 7, 8), mesh) == P(None, None, "tensor")
