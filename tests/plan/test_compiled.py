"""A compiled step goes through a file and is refused wherever it is another one's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tests.e2e import runner
from webssl_jax import config as configs
from webssl_jax import methods, train_state
from webssl_jax.config import UserError
from webssl_jax.optim.optimizer import Optimizer
from webssl_jax.plan import compiled
from webssl_jax.sharding import mesh as meshes
from webssl_jax.train_step import lower_train_step


@pytest.fixture
def mesh():
    return Mesh(np.asarray(jax.devices()[:4]), ("x",))


def lower(mesh, factor=2.0):
    cut = NamedSharding(mesh, PartitionSpec("x"))
    x = jax.ShapeDtypeStruct((8,), jnp.float32, sharding=cut)
    return jax.jit(lambda tree: {"y": factor * tree["x"].cumsum()}).lower({"x": x})


def test_what_was_saved_computes_the_same_when_loaded(mesh, tmp_path):
    lowered = lower(mesh)
    compiled.save(tmp_path / "step", lowered, lowered.compile(), mesh)
    step = compiled.load(tmp_path / "step", lower(mesh), mesh)
    x = jax.device_put(jnp.arange(8.0), NamedSharding(mesh, PartitionSpec("x")))
    assert step({"x": x})["y"].tolist() == (2 * np.arange(8).cumsum()).tolist()


def test_another_program_other_devices_and_damage_are_refused_by_name(mesh, tmp_path):
    path, lowered = tmp_path / "step", lower(mesh)
    compiled.save(path, lowered, lowered.compile(), mesh)
    with pytest.raises(UserError, match="the program differs: it has .* plan --save"):
        compiled.load(path, lower(mesh, 3.0), mesh)
    half = Mesh(np.asarray(jax.devices()[:2]), ("x",))
    with pytest.raises(UserError, match="devices differs: it has 4 x cpu, this run 2 x cpu"):
        compiled.load(path, lower(half), half)
    content = path.read_bytes()
    for part in (content[:-1], content[: len(content) // 2]):
        path.write_bytes(part)
        with pytest.raises(UserError, match="is cut off or damaged"):
            compiled.load(path, lowered, mesh)
    path.write_bytes(content[:60])
    with pytest.raises(UserError, match="is cut off or damaged"):
        compiled.load(path, lowered, mesh)
    path.write_bytes(b"something else")
    with pytest.raises(UserError, match="was not written by plan --save"):
        compiled.load(path, lowered, mesh)
    with pytest.raises(UserError, match="cannot be read"):
        compiled.load(tmp_path / "nothing", lowered, mesh)
    with pytest.raises(UserError, match="cannot be written"):
        compiled.save(tmp_path / "no" / "folder", lowered, lowered.compile(), mesh)


def test_a_training_takes_its_step_from_a_file_with_the_same_losses(tmp_path, unbroken):
    settings = [f"{key}={value}" for key, value in runner.MICRO.items()]
    config = configs.load(runner.SPEC, settings)
    method = methods.create(config)
    mesh = meshes.create(config.sharding, jax.devices()[:1])
    optimizer = Optimizer.from_config(config.optim, method.tables())
    state = train_state.abstract(method, optimizer, config.seed, config.global_batch, mesh)
    lowered = lower_train_step(config, method, optimizer, state, mesh)
    compiled.save(tmp_path / "step", lowered, lowered.compile(), mesh)

    flags = ["--compiled", str(tmp_path / "step")]
    result = runner.train(tmp_path / "run", flags=flags)
    assert result.code == 0, result.output
    ours = runner.losses(tmp_path / "run")
    assert sorted(ours) == sorted(unbroken)
    assert list(ours.values()) == pytest.approx(list(unbroken.values()), rel=2e-6)
    result = runner.train(tmp_path / "other", {"optim.lr": 0.5}, flags=flags)
    assert result.code == 2 and "error: --compiled" in result.output
    assert "the program differs" in result.output
