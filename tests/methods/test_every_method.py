"""What holds for every method. One joins by a row of CASES: a spec of its tiny config, and
overrides that make it tinier."""

import io

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from webssl_jax import config as configs
from webssl_jax import methods, params, train_state
from webssl_jax.data.records import Record
from webssl_jax.data.views import RecordView
from webssl_jax.methods.base import Variables
from webssl_jax.optim.guard import Guard
from webssl_jax.optim.optimizer import Optimizer
from webssl_jax.sharding import mesh as meshes
from webssl_jax.train_step import jit_train_step, make_train_step, run_schedules, verdict

BATCH = 8
NETWORK = ["model.width=32", "model.depth=2", "model.heads=2", "model.patch_size=8"]
CASES = {"supervised": ("supervised:size=tiny", ["method.view.image_size=16", "method.mixup=0.2"])}


def load(name):
    spec, overrides = CASES[name]
    steps = [f"global_batch={BATCH}", "total_steps=4", "optim.warmup_steps=0"]
    return configs.load(spec, [*NETWORK, *steps, *overrides])


def batch_of(method, step):
    rng = np.random.default_rng(step)
    return {
        name: rng.integers(0, 256 if x.dtype == np.uint8 else 2, x.shape).astype(x.dtype)
        for name, x in method.batch_spec(BATCH).items()
    }


def drawn(method, seed=0):
    """Variables, drawn without compiling the initialisers; none is zero or one."""
    rng = np.random.default_rng(seed)

    def draw(path, x):
        values = 0.15 * rng.standard_normal(x.shape, np.float32)
        return values + 1 if path.endswith(("scale", "gamma")) else values

    shapes = jax.eval_shape(lambda: method.init(jax.random.key(0), method.batch_spec(BATCH)))
    return Variables(*(params.map_with_path(draw, tree) for tree in shapes[:2]), {})


def start(config, method, shape):
    """(state, step function of (state, number of the batch)) on a mesh of that shape."""
    mesh = meshes.create(
        ConfigDict(dict(zip(meshes.AXES, shape))), jax.devices()[: int(np.prod(shape))]
    )
    optimizer = Optimizer.from_config(config.optim, method.tables())
    state = train_state.create(method, optimizer, 0, BATCH, mesh)
    template = train_state.abstract(method, optimizer, 0, BATCH, mesh)
    made = make_train_step(method, optimizer, Guard(), run_schedules(config, method), mesh)
    jitted = jit_train_step(made, template, mesh, donate=False)

    def step(state, number):
        batch = meshes.to_global(batch_of(method, number), mesh)
        return jitted(state, batch, verdict(0, mesh))[:2]

    return state, step


@pytest.mark.parametrize("name", CASES)
def test_steps_are_the_same_on_eight_devices_and_after_a_restart(name):
    config = load(name)
    method = methods.create(config)
    state, step = start(config, method, (1, 1, 1))
    first, metrics = step(state, 0)
    second, after = step(first, 1)
    again, _ = step(jax.tree.map(jax.device_put, jax.device_get(first)), 1)
    jax.tree.map(np.testing.assert_array_equal, again, second)

    signs = {sign.metric for sign in method.vitals(BATCH).signs}
    limits = {x.metric for alarm in method.vitals(BATCH).alarms for x in alarm.limits}
    assert signs and limits <= signs <= set(metrics)
    assert all(np.isfinite(value) for value in after.values())
    moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), state.params, second.params)
    assert np.mean(jax.tree.leaves(moved)) > 0.5

    state, step = start(config, method, (2, 2, 2))
    state, spread = step(state, 0)
    _, spread_after = step(state, 1)
    for ours, theirs in ((spread, metrics), (spread_after, after)):
        np.testing.assert_allclose(ours["train/loss"], theirs["train/loss"], rtol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_a_view_gives_what_the_batch_spec_promises_and_flops_are_counted(name):
    method = methods.create(load(name))
    stream = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
    Image.fromarray(pixels).save(stream, "PNG")
    view, data = method.train_view(), stream.getvalue()
    if isinstance(view, RecordView):
        data = Record(data, ("a caption",), "key", 70, 50, "source", "animals")
    made = view(data, np.random.default_rng(0))
    for key, x in method.batch_spec(3).items():
        assert (made[key].shape, made[key].dtype) == (x.shape[1:], x.dtype)
    # at least what three passes of the encoder over half of the patches take
    patches = method.encoder.num_patches // 2
    assert method.train_flops() > 3 * method.encoder.block_flops(patches)
    assert hash(method) == hash(methods.create(load(name)))
