"""LiT: a text tower on a frozen encoder, out of a run or a folder of weights."""

import dataclasses

import numpy as np
import pytest

from tests.evaluators.small_models import mesh_of, save_run
from tests.weights import samples
from webssl_jax import config as configs
from webssl_jax import methods, runs, train_state
from webssl_jax import params as paths
from webssl_jax.checkpoints.saver import Saver
from webssl_jax.errors import UserError
from webssl_jax.optim.guard import Guard
from webssl_jax.optim.optimizer import Optimizer
from webssl_jax.sharding import mesh as meshes
from webssl_jax.train_step import jit_train_step, make_train_step, run_schedules, verdict
from webssl_jax.weights import load
from webssl_jax.weights.init_from import from_weights
from webssl_jax.weights.networks import Networks, template_of

SMALL = (
    "global_batch=8",
    "total_images=800",
    "optim.warmup_images=80",
    "method.text.context=8",
    "method.text.depth=1",
)


def begin(encoder, workdir, *overrides):
    """(state before the first step, step) of a run on that encoder."""
    config = configs.load(f"lit:encoder={encoder},text=micro", [*SMALL, *overrides])
    method = methods.create(config)
    optimizer = Optimizer.from_config(config.optim, method.tables())
    mesh = mesh_of(1)
    template = train_state.abstract(method, optimizer, 0, 8, mesh)
    workdir.mkdir()
    with Saver(config, workdir, template) as saver:
        state = saver.restore(method, optimizer, mesh)

    def step(state):
        schedules = run_schedules(config, method)
        made = make_train_step(method, optimizer, Guard(), schedules, mesh)
        full = jit_train_step(made, template, mesh, donate=False)
        rng, side = np.random.default_rng(0), method.view.image_size
        batch = {"image": rng.integers(0, 256, (8, side, side, 3)).astype(np.uint8)}
        batch["tokens"] = rng.integers(1, 90, (8, 8)).astype(np.int32)
        batch["tokens"][:, -1] = method.text.vocabulary - 1
        return full(state, meshes.to_global(batch, mesh), verdict(0, mesh))[:2]

    return state, step


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(workdir, the teacher's encoder) of a run of Web-DINO."""
    workdir = tmp_path_factory.mktemp("dino") / "run"
    _, state = save_run(workdir, [3])
    return workdir, state.teacher["encoder"]


def test_the_frozen_encoder_is_what_another_run_evaluates_to_the_bit_after_a_step(run, tmp_path):
    first, step = begin(run[0], tmp_path / "lit")
    state, metrics = step(first._replace(step=first.step + 5))  # whose rate is not 0
    after, before = paths.flatten(state.params), paths.flatten(first.params)
    given = {f"encoder/{p}": x for p, x in paths.flatten(run[1]).items() if p != "mask_token"}
    assert {p for p in after if p.startswith("encoder/")} == given.keys()
    for path in after:
        if path in given:
            np.testing.assert_array_equal(after[path], given[path], err_msg=path)
        else:
            assert (np.asarray(after[path]) != np.asarray(before[path])).any(), path
    assert not [p for p in paths.flatten(state.opt_state) if "encoder/" in p]  # no moments
    assert metrics["optim/grad_norm_text"] > 0 == metrics["optim/grad_norm_encoder"]


def test_a_config_takes_encoder_size_and_colours_from_weights(tmp_path):
    networks = samples.make_dino(layer_scale=0.1)
    folder = samples.write("hf-dinov2", tmp_path, networks, samples.make_params(networks))
    config = configs.load(f"lit:encoder={folder},text=tiny", [])
    method = methods.create(config)
    assert config.init_from == str(folder)
    wanted = load.open_(folder).networks.encoder
    assert method.encoder == dataclasses.replace(wanted, mask_token=False)
    assert (method.preprocess.size, method.mean) == (32, networks.preprocess.mean)
    assert method.text.width == 128  # of tiny


def test_another_encoder_than_the_runs_is_refused_in_one_line(run):
    config = configs.load(f"lit:encoder={run[0]},text=micro", [*SMALL, "model.heads=1"])
    method = methods.create(config)
    trees = {"params": template_of(Networks.of(method))}
    with pytest.raises(UserError, match="holds another encoder: heads") as caught:
        from_weights(config.init_from, method, trees, runs.open_encoder)
    assert "\n" not in str(caught.value)
