import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from webssl_jax import config as configs
from webssl_jax import methods, train_state
from webssl_jax.optim import schedules
from webssl_jax.optim.guard import CAUSES, Guard
from webssl_jax.optim.optimizer import Optimizer
from webssl_jax.sharding import mesh as meshes
from webssl_jax.train_step import jit_train_step, make_train_step, verdict

BATCH, SIDE = 16, 32
MICRO = [
    "model.size=micro",
    "method.view.image_size=32",
    "method.decoder.width=32",
    "method.decoder.heads=2",
]
OFF = Guard()
slow = pytest.mark.slow
VALUES = {"learning_rate": schedules.constant(1e-3), "weight_decay": schedules.constant(0.05)}


def load():
    return configs.load("configs/web_mae.py:size=tiny", MICRO)


def make(shape=(1, 1, 1), accumulation=1, method=None, guard=OFF, with_health=False, **optim):
    config = load()
    config.optim.update(optim)
    method = method or methods.create(config)
    sizes = dict(zip(meshes.AXES, shape))
    mesh = meshes.create(ConfigDict(sizes), jax.devices()[: int(np.prod(shape))])
    optimizer = Optimizer.from_config(config.optim, method.tables())
    template = train_state.abstract(method, optimizer, 0, BATCH, mesh)
    state = train_state.create(method, optimizer, 0, BATCH, mesh)
    full = jit_train_step(
        make_train_step(method, optimizer, guard, VALUES, mesh, accumulation), template, mesh
    )

    def step(state, batch):
        return full(state, batch, verdict(0, mesh))[:2]

    return state, full if with_health else step, mesh


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


@pytest.mark.parametrize(
    "shape", [(2, 2, 2), *(pytest.param(s, marks=slow) for s in ((8, 1, 1), (1, 8, 1), (1, 2, 2)))]
)
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


@pytest.mark.parametrize(
    "shape, accumulation", [pytest.param((1, 1, 1), 4, marks=slow), ((2, 2, 2), 2)]
)
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
        "optim/update_norm_encoder",
        "train/skipped_steps",
    } <= set(metrics)
    assert float(metrics["train/reconstruction"]) == float(metrics["train/loss"])
    for norm in ("optim/grad_norm", "optim/update_norm"):
        parts = [float(metrics[f"{norm}_{module}"]) for module in ("encoder", "decoder")]
        assert np.hypot(*parts) == pytest.approx(float(metrics[norm]), rel=1e-5)


def test_the_call_after_a_refused_step_changes_nothing_and_can_be_made_again():
    """What lets the host save, one call late, exactly what a bad step was computed from."""
    state, step, mesh = make(method=_Poisoned(methods.create(load())), with_health=True)
    bad = meshes.to_global({"image": np.zeros((BATCH, SIDE, SIDE, 3), np.uint8)}, mesh)
    good = meshes.to_global(images(1), mesh)
    state, _, health = step(state, bad, verdict(0, mesh))
    assert CAUSES[int(health.cause)] == "not finite"
    assert np.isnan(health.grad_norms["encoder/norm/scale"])
    refused = jax.tree.map(np.asarray, state)
    state, first, _ = step(state, good, health.cause)
    for before, after in zip(jax.tree.leaves(refused), jax.tree.leaves(state)):
        assert np.array_equal(before, after)
    state, second, health = step(state, good, verdict(0, mesh))
    assert int(health.cause) == 0 and int(state.step) == 2
    assert float(first["train/loss"]) == float(second["train/loss"])
    assert float(second["optim/update_norm"]) > 0


class _Scaled(_Poisoned):
    """A method whose gradient is multiplied by the batch's first pixel value."""

    def loss(self, params, teacher, aux, batch, rng, values):
        out = self._method.loss(params, teacher, aux, batch, rng, values)
        return out._replace(loss=out.loss * batch["image"][0, 0, 0, 0].astype(jnp.float32))


@pytest.mark.parametrize("shape", [pytest.param((1, 1, 1), marks=slow), (2, 2, 2)])
def test_spikes_are_refused_a_few_times_in_a_row_and_then_taken_for_a_new_level(shape):
    """The gradient's factor for each step, and whether that step may change the parameters."""
    factors = [1, 200, 1, 1, 1, 200, 1, 200, 200, 200, 200, 200, 1]
    taken = [1, 1, 1, 1, 1, 0, 1, 0, 0, 1, 1, 1, 1]
    guard = Guard(spike_factor=20.0, window_steps=4, max_skips=2)  # 1, 200, 1, 1: mean is 3.8
    method = _Scaled(methods.create(load()))
    state, step, mesh = make(shape, method=method, guard=guard, with_health=True)
    # how many more steps it takes until the run is sound again
    trouble = [0, 0, 0, 0, 0, 4, 3, 4, 4, 3, 2, 1, 0]
    seen, skipped = [], 0
    for k, factor in enumerate(factors):
        batch = images(0)
        batch["image"][0, 0, 0, 0] = factor
        state, metrics, health = step(state, meshes.to_global(batch, mesh), verdict(0, mesh))
        refused = CAUSES[int(health.cause)] == "spike"
        seen.append(int(not refused))
        skipped += refused
        assert (float(metrics["optim/update_norm"]) == 0) == refused
        assert int(state.skipped) == skipped and int(state.step) == k + 1
        assert int(state.guard["trouble"]) == trouble[k]
    assert seen == taken


def test_a_guard_that_is_off_keeps_its_mean_and_changes_no_digit(alone):
    watched, state = losses(guard=Guard(spike_factor=1e6, window_steps=2))
    assert np.array_equal(watched, alone[0])
    assert int(alone[1].guard["seen"]) == 3 and int(state.guard["seen"]) == 2
    for a, b in zip(jax.tree.leaves(alone[1].params), jax.tree.leaves(state.params)):
        assert np.array_equal(a, b)
