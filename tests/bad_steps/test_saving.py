"""Which refused steps are saved, and whose word counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from webssl_jax import config as configs
from webssl_jax.bad_steps import saving
from webssl_jax.checkpoints import Checkpointer
from webssl_jax.optim import guard
from webssl_jax.sharding import mesh as meshes
from webssl_jax.train_state import TrainState
from webssl_jax.train_step import Health

CONFIG = configs.load("configs/web_mae.py:size=tiny", ["global_batch=4"])


class Loader:
    def batch_at(self, step):
        rows = np.arange(4)
        return {"pixels": np.zeros((4, 2)), "record": rows, "substituted": rows < 0}


class Source:
    def describe(self, index):
        return f"shelf {index}"

    def __getitem__(self, index):
        return b"broken"


def make(workdir, limit=2):
    mesh = meshes.create(ConfigDict(dict.fromkeys(meshes.AXES, 1)), jax.devices()[:1])
    return saving.BadSteps(workdir, CONFIG, mesh, Source(), Loader(), limit)


def refuse(bad_steps, step, value=0.0):
    """Hands on ``step``, with parameters of ``value``."""
    nan = jnp.float32(np.nan)
    state = TrainState(
        step=jnp.int32(step),
        params={"x": jnp.full(3, value)},
        teacher={},
        opt_state={},
        aux={},
        rng=jnp.zeros(2, jnp.uint32),
        skipped=jnp.int32(0),
        guard=guard.init(),
    )
    bad_steps(step, state, {"train/loss": nan}, Health(jnp.int32(1), {"x": nan}))


def parameters(folder):
    like = jax.ShapeDtypeStruct((3,), jnp.float32, sharding=jnp.zeros(3).sharding)
    checkpointer = Checkpointer(folder, read_only=True)
    return checkpointer.restore_newest({"params": {"x": like}})["params"]["x"].tolist()


def test_a_folder_that_was_left_half_saved_is_saved_anew_with_its_parameters(tmp_path):
    folder = saving.step_folder(tmp_path, 3)
    refuse(make(tmp_path), 3, value=1.0)
    (folder / "report.json").unlink()  # what is written last
    (folder / "batch-00007.npz").touch()
    refuse(make(tmp_path), 3, value=2.0)
    assert parameters(folder) == [2.0] * 3
    assert (folder / "report.json").exists() and not (folder / "batch-00007.npz").exists()
    refuse(make(tmp_path), 3, value=3.0)  # whole: it stays
    assert parameters(folder) == [2.0] * 3


@pytest.mark.parametrize(
    "told, says", [((1, 1), "saved before"), ((0, 2), "save_bad_steps"), ((0, 1), "saved in")]
)
def test_the_first_process_decides_what_is_saved(tmp_path, monkeypatch, caplog, told, says):
    """Here for a process that sees an empty folder."""
    monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", lambda own: np.asarray(told))
    refuse(make(tmp_path), 3)
    assert says in caplog.text
    assert saving.step_folder(tmp_path, 3).exists() == (says == "saved in")
