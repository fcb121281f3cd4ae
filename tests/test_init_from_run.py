"""``init_from`` with a run of another resolution."""

import json
import pathlib

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from webssl_jax import checkpoints, methods, runs, train_state
from webssl_jax import config as configs
from webssl_jax import params as paths
from webssl_jax.config import UserError
from webssl_jax.models.position import INTERPOLATIONS
from webssl_jax.optim.optimizer import Optimizer
from webssl_jax.sharding import mesh as meshes
from webssl_jax.weights import patches

SPEC = str(pathlib.Path(__file__).parent.parent / "configs" / "web_dino.py:size=tiny")
SMALL = ("model.size=micro", "global_batch=16", "method.dino_head.prototypes=64")
POSITIONS, KERNEL = "encoder/pos_embed", "encoder/patch_embed/kernel"


def make(side, *overrides):
    config = configs.load(SPEC, [*SMALL, f"method.view.global_size={side}", *overrides])
    method = methods.create(config)
    optimizer = Optimizer.from_config(config.optim, method.tables())
    mesh = meshes.create(ConfigDict({"replica": 1, "fsdp": 4, "tensor": 1}), jax.devices()[:4])
    return config, method, (method, optimizer, 0, config.global_batch, mesh)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(workdir, weights) of a run at 48 pixels, whose positions are no longer those of its start
    and differ between student and teacher."""
    workdir = tmp_path_factory.mktemp("run")
    config, _, arguments = make(48)
    (workdir / "config.json").write_text(json.dumps(configs.resolved(config)))
    state = train_state.create(*arguments)
    state = state._replace(teacher=jax.tree.map(lambda x: 2 * x, state.teacher))
    checkpointer = checkpoints.Checkpointer(workdir)
    checkpointer.save(state)
    checkpointer.close()
    return str(workdir), {"params": state.params, "teacher": state.teacher}


def weights(workdir, side, *overrides):
    _, method, arguments = make(side, *overrides)
    template = train_state.abstract(*arguments)
    wanted = {"params": template.params, "teacher": template.teacher}
    return runs.weights_of_run(workdir, wanted, method.encoder), wanted


@pytest.mark.parametrize("side", [48, 80])
def test_positions_of_a_run_are_resized_and_all_else_is_as_it_was(run, side):
    workdir, before = run
    got, wanted = weights(workdir, side)
    for name in ("params", "teacher"):
        ours, theirs = paths.flatten(got[name]), paths.flatten(before[name])
        for path, leaf in paths.flatten(wanted[name]).items():
            assert ours[path].shape == leaf.shape and ours[path].sharding == leaf.sharding
            if path != POSITIONS or side == 48:
                np.testing.assert_array_equal(ours[path], theirs[path], err_msg=path)
        table = np.asarray(theirs[POSITIONS])
        np.testing.assert_array_equal(ours[POSITIONS][:, 0], table[:, 0])  # of CLS
        grid = (side // 8,) * 2
        resized = INTERPOLATIONS["offset"].resize(table[0, 1:], (6, 6), grid)
        np.testing.assert_allclose(ours[POSITIONS][0, 1:], resized, atol=1e-6)


def test_patches_of_a_run_are_resampled_to_another_size(run):
    """As FlexiViT does. The images have the same number of patches."""
    workdir, before = run
    got, _ = weights(workdir, 96, "model.patch_size=16", "method.view.local_size=32")
    for name in ("params", "teacher"):
        ours, theirs = (paths.flatten(tree[name]) for tree in (got, before))
        resampled = patches.resample(np.asarray(theirs[KERNEL]), 16)
        assert ours[KERNEL].shape == (16, 16, 3, theirs[KERNEL].shape[-1])
        np.testing.assert_allclose(ours[KERNEL], resampled, atol=1e-5)
        np.testing.assert_array_equal(ours[POSITIONS], theirs[POSITIONS])


def test_a_run_of_another_network_is_refused_in_one_line(run):
    with pytest.raises(UserError, match="does not fit|has shape") as caught:
        weights(run[0], 80, "model.depth=3")
    assert "\n" not in str(caught.value)


def test_the_evaluated_encoder_of_a_run_is_one_of_several_weights(run):
    """The teacher's, beside a language model say."""
    workdir, before = run
    opened = runs.open_encoder(workdir)
    ours, theirs = paths.flatten(opened.params), paths.flatten(before["teacher"])
    assert opened.networks.encoder == make(48)[1].encoder and set(opened.params) == {"encoder"}
    for path, leaf in ours.items():
        np.testing.assert_array_equal(leaf, theirs[path])
    assert runs.open_encoder(str(pathlib.Path(workdir).parent)) is None
