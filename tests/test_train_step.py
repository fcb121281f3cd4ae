import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from webssl_jax import config as configs
from webssl_jax import methods, train_state
from webssl_jax.optim import schedules
from webssl_jax.optim.optimizer import Optimizer
from webssl_jax.sharding import mesh as meshes
from webssl_jax.train_step import jit_train_step, make_train_step

BATCH, SIDE = 16, 32
MICRO = [
    "model.size=micro",
    "method.view.image_size=32",
    "method.decoder.width=32",
    "method.decoder.heads=2",
]
VALUES = {"learning_rate": schedules.constant(1e-3), "weight_decay": schedules.constant(0.05)}


def load():
    return configs.load("configs/web_mae.py:size=tiny", MICRO)


def make(shape=(1, 1, 1), accumulation=1, method=None, **optim):
    config = load()
    config.optim.update(optim)
    method = method or methods.create(config)
    sizes = dict(zip(meshes.AXES, shape))
    mesh = meshes.create(ConfigDict(sizes), jax.devices()[: int(np.prod(shape))])
    optimizer = Optimizer.from_config(config.optim, method.tables())
    template = train_state.abstract(method, optimizer, 0, BATCH, mesh)
    state = train_state.create(method, optimizer, 0, BATCH, mesh)
    step = jit_train_step(
        make_train_step(method, optimizer, VALUES, mesh, accumulation), template, mesh
    )
    return state, step, mesh


def images(k):
    return {
        "image": np.random.default_rng(k).integers(0, 256, (BATCH, SIDE, SIDE, 3)).astype(np.uint8)
    }


def losses(*args, steps=3, **kwargs):
    state, step, mesh = make(*args, **kwargs)
    out = []
    for k in range(steps):
        state, metrics = step(state, meshes.to_global(images(k), mesh))
        out.append(float(metrics["train/loss"]))
    return np.array(out), state


@pytest.fixture(scope="module")
def alone():
    return losses()


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 2)])
def test_losses_and_parameters_are_the_same_on_every_mesh(alone, shape):
    """float32; only the order of sums differs. Measured below 3e-7 relative in the losses of three
    steps."""
    ours, state = losses(shape)
    np.testing.assert_allclose(ours, alone[0], rtol=2e-6)
    # Adam divides by a gradient's own size, so a rounding difference in a tiny gradient can move a
    # weight by up to a learning rate; the bulk must agree far better.
    gaps = np.concatenate(
        [
            np.abs(np.asarray(a) - np.asarray(b)).ravel()
            for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(alone[1].params))
        ]
    )
    assert gaps.max() < 3e-3 and np.quantile(gaps, 0.999) < 2e-6


@pytest.mark.parametrize("shape, accumulation", [((1, 1, 1), 4), ((2, 2, 2), 2)])
def test_accumulation_gives_the_loss_of_the_whole_batch(alone, shape, accumulation):
    np.testing.assert_allclose(losses(shape, accumulation)[0], alone[0], rtol=2e-6)


def test_the_state_is_created_with_the_same_values_on_every_mesh():
    one, eight = make()[0], make((2, 2, 2))[0]
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(eight)):
        assert np.array_equal(a, b)


def test_the_step_is_a_pure_function_of_state_and_batch():
    first, second = losses()[0], losses()[0]
    assert np.array_equal(first, second)
    state, step, mesh = make()
    state, metrics = step(state, meshes.to_global(images(0), mesh))
    state, metrics = step(state, meshes.to_global(images(0), mesh))
    assert float(metrics["train/loss"]) != first[0]  # another step, other masks


class _Poisoned:
    """A method whose loss is not finite for a batch that starts with a black pixel."""

    def __init__(self, method):
        self._method = method

    def __getattr__(self, name):
        return getattr(self._method, name)

    def loss(self, params, teacher, aux, batch, rng, values):
        out = self._method.loss(params, teacher, aux, batch, rng, values)
        poison = jnp.where(jnp.all(batch["image"] == 0), jnp.nan, 0.0)
        return out._replace(loss=out.loss + poison * jnp.sum(params["encoder"]["norm"]["scale"]))


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted():
    config = load()
    state, step, mesh = make(method=_Poisoned(methods.create(config)))
    state, _ = step(state, meshes.to_global(images(0), mesh))
    before = jax.tree.map(np.asarray, state)
    state, metrics = step(
        state, meshes.to_global({"image": np.zeros((BATCH, SIDE, SIDE, 3), np.uint8)}, mesh)
    )
    assert np.isnan(metrics["train/loss"]) and float(metrics["train/skipped_steps"]) == 1
    for name in ("params", "opt_state"):
        for a, b in zip(
            jax.tree.leaves(getattr(before, name)), jax.tree.leaves(getattr(state, name))
        ):
            assert np.array_equal(a, b)
    assert int(state.step) == 2 and int(state.skipped) == 1
    state, metrics = step(state, meshes.to_global(images(1), mesh))
    assert np.isfinite(metrics["train/loss"]) and float(metrics["optim/update_norm"]) > 0


class _WithTeacher(_Poisoned):
    """MAE with an EMA copy, to see that the loop calls the hook with the new parameters."""

    def init(self, rng, spec):
        variables = self._method.init(rng, spec)
        return variables._replace(teacher=variables.params)

    def update_teacher(self, teacher, params, values):
        return jax.tree.map(lambda t, p: 0.5 * t + 0.5 * p, teacher, params)


def test_the_teacher_follows_the_updated_parameters():
    config = load()
    state, step, mesh = make((1, 2, 1), method=_WithTeacher(methods.create(config)))
    before = jax.tree.map(np.asarray, state.params)
    state, _ = step(state, meshes.to_global(images(0), mesh))
    for old, new, teacher in zip(*map(jax.tree.leaves, (before, state.params, state.teacher))):
        np.testing.assert_allclose(teacher, 0.5 * old + 0.5 * np.asarray(new), atol=1e-7)
    kernel = state.teacher["encoder"]["blocks"]["attn"]["q"]["kernel"]
    assert "fsdp" in kernel.sharding.spec  # the teacher is cut like the parameters


def test_metrics_have_their_final_names():
    state, step, mesh = make()
    _, metrics = step(state, meshes.to_global(images(0), mesh))
    assert {
        "train/loss",
        "train/reconstruction",
        "optim/grad_norm",
        "optim/grad_norm_encoder",
        "optim/learning_rate",
        "optim/weight_decay",
        "optim/param_norm",
        "optim/update_norm",
        "train/skipped_steps",
    } <= set(metrics)
    assert float(metrics["train/reconstruction"]) == float(metrics["train/loss"])
