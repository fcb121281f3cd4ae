"""What holds for every method. One joins by a row of CASES: a spec of its tiny config, and
overrides that make it tinier."""

import functools
import io
import pathlib
import re
import tempfile

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from tests.methods import small_vqa
from webssl_jax import config as configs
from webssl_jax import methods, params, train_state
from webssl_jax.data.records import Record
from webssl_jax.data.views import RecordView
from webssl_jax.language.dialogue import CELL
from webssl_jax.methods.base import Variables, kinds_of
from webssl_jax.optim.guard import Guard
from webssl_jax.optim.optimizer import Optimizer
from webssl_jax.sharding import mesh as meshes
from webssl_jax.sharding import rules
from webssl_jax.train_step import jit_train_step, make_train_step, run_schedules, verdict

BATCH = 8
NETWORK = ["model.width=32", "model.depth=2", "model.heads=2", "model.patch_size=8"]
DINOV3 = ["method.view.global_size=16", "method.view.local_size=8", "method.view.local_count=2"]
DINOV3 += ["method.group_images=4", "method.stream_prototypes=0"]
DINOV3 += [
    f"method.{head}.{field}"
    for head in ("dino_head", "ibot_head")
    for field in ("prototypes=16", "bottleneck=8", "hidden=16")
]
TEACHER = [f"method.teacher.{x}" for x in ("width=16", "depth=1", "heads=2", "patch_size=8")]
CASES = {
    "distill": (
        "distill:size=tiny",
        ["method.view.image_size=16", "method.weights=a-file", "method.teacher_size=32"]
        + [*TEACHER, "method.teacher.image_size=32"],
    ),
    "dinov3": ("dinov3:size=tiny", DINOV3),
    "dinov3_gram": ("dinov3:size=tiny,stage=gram", [*DINOV3, "method.gram.size=32"]),
    "dinov3_high_res": (
        "dinov3:size=tiny,stage=high_res",
        [*DINOV3, "method.gram.size=32", "method.crop_sizes.global_size=(16, 24)"]
        + ["method.crop_sizes.local_size=(8, 16)", "method.crop_sizes.gram_size=(32, 48)"],
    ),
    "ijepa": (
        "ijepa:size=tiny",
        ["method.view.image_size=32", "method.masks.min_keep=0", "method.predictor.depth=1"]
        + ["method.masks.targets=2"],
    ),
    "lejepa": (
        "lejepa:size=tiny",
        ["method.view.global_size=16", "method.view.local_size=8", "method.directions=32"]
        + ["method.projector.hidden=32"],
    ),
    "mocov3": ("mocov3:size=tiny", ["method.view.image_size=16", "method.projector.hidden=32"]),
    "simdino": (
        "simdino:size=tiny",
        ["method.view.global_size=16", "method.view.local_size=8", "method.view.local_count=2"]
        + ["method.group_images=4", "method.rate_groups=2"]
        + ["method.projector.hidden=32", "method.projector.output=16"],
    ),
    "vqa": (small_vqa.SPEC, []),  # see load
    "supervised": ("supervised:size=tiny", ["method.view.image_size=16", "method.mixup=0.2"]),
}


# What has test files of its own, for what is asked of every method besides.
FIRST = {
    "mae": ("web_mae:size=tiny", ["method.view.image_size=32", "method.decoder.depth=1"]),
    "dino": ("web_dino:size=tiny", [x for x in DINOV3 if "stream_prototypes" not in x]),
    "clip": ("clip:size=tiny", ["method.view.image_size=16", "method.text.depth=1"]),
    "siglip": (
        "clip:size=siglip_tiny",
        ["method.view.image_size=16", "method.text.depth=1", "method.text.embedding=32"],
    ),
}

ALL = FIRST | CASES
ONE, TWO, EIGHT = (1, 1, 1), (1, 2, 1), (2, 2, 2)  # meshes
slow = pytest.mark.slow
# Compiling a step is dear: DINO's own tests, and those of the Gram stage, have most of DINOv3's,
# those of SimDINO and LeJEPA their losses, and test_vqa.py has most of VQA's.
DEAR = ("dinov3", "dinov3_gram", "dinov3_high_res", "distill", "simdino", "lejepa", "vqa")
STEPPED = [pytest.param(x, marks=slow) if x in DEAR else x for x in CASES]
# What is drawn by image; the others draw nothing, or have a test like this of their own.
SPREAD = [x if x == "ijepa" else pytest.param(x, marks=slow) for x in CASES]


@functools.cache
def words():
    """The folder of a tokenizer."""
    return small_vqa.tokenizer_folder(pathlib.Path(tempfile.mkdtemp()))


def load(name):
    spec, overrides = ALL[name]
    if name == "vqa":
        overrides = [f"{key}={value}" for key, value in small_vqa.settings(words()).items()]
    steps = [f"global_batch={BATCH}", "total_steps=4", "optim.warmup_steps=0"]
    return configs.load(spec, [*NETWORK, *steps, *overrides])


def test_no_method_is_left_out():
    assert {load(name).method.name for name in ALL} == set(methods.METHODS)


def batch_of(method, step):
    rng = np.random.default_rng(step)
    made = {
        name: rng.integers(0, 256 if x.dtype == np.uint8 else 2, x.shape).astype(x.dtype)
        for name, x in method.batch_spec(BATCH).items()
    }
    if "answer" in made:  # of texts, the first part of which is the image
        made["tokens"][:, : method.connector.cells] = CELL
    return made


def drawn(method, seed=0):
    """Variables, drawn without compiling the initialisers; none is zero or one."""
    rng = np.random.default_rng(seed)

    def draw(path, x):
        values = 0.15 * rng.standard_normal(x.shape, np.float32)
        return (values + 1 if path.endswith(("scale", "gamma")) else values).astype(x.dtype)

    shapes = jax.eval_shape(lambda: method.init(jax.random.key(0), method.batch_spec(BATCH)))
    return Variables(*(params.map_with_path(draw, tree) for tree in shapes))


def mesh_of(shape):
    axes = ConfigDict(dict(zip(meshes.AXES, shape)))
    return meshes.create(axes, jax.devices()[: int(np.prod(shape))])


def start(config, method, shape):
    """(state, step function of (state, number of the batch)) on a mesh of that shape."""
    mesh = mesh_of(shape)
    optimizer = Optimizer.from_config(config.optim, method.tables())
    state = train_state.create(method, optimizer, 0, BATCH, mesh)
    template = train_state.abstract(method, optimizer, 0, BATCH, mesh)
    made = make_train_step(method, optimizer, Guard(), run_schedules(config, method), mesh)
    jitted = jit_train_step(made, template, mesh, donate=False)

    def step(state, number):
        batch = meshes.to_global(batch_of(method, number), mesh)
        return jitted(state, batch, verdict(0, mesh))[:2]

    return state, step


@functools.cache
def two_steps(name, shape):
    """(states before, between and after two steps, their metrics, the step function)."""
    config = load(name)
    state, step = start(config, methods.create(config), shape)
    between, first = step(state, 0)
    after, second = step(between, 1)
    return (state, between, after), (first, second), step


@pytest.mark.parametrize("name", STEPPED)
def test_steps_go_on_after_a_restart_and_have_the_vital_signs(name):
    (before, between, after), (_, metrics), step = two_steps(name, TWO)
    back = jax.tree.map(lambda x: jax.device_put(jax.device_get(x), x.sharding), between)
    again, _ = step(back, 1)
    jax.tree.map(np.testing.assert_array_equal, again, after)
    vitals = methods.create(load(name)).vitals(BATCH)
    signs = {sign.metric for sign in vitals.signs}
    limits = {x.metric for alarm in vitals.alarms for x in alarm.limits}
    assert signs and limits <= signs <= set(metrics)
    assert all(np.isfinite(value) for value in metrics.values())
    moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), before.params, after.params)
    frozen = [pattern for pattern, _ in methods.create(load(name)).tables().frozen]
    learns = [
        value
        for path, value in params.flatten(moved).items()
        if not any(re.search(pattern, path) for pattern in frozen)
    ]
    assert np.mean(learns) > 0.5


@pytest.mark.parametrize("name", ["dinov3_high_res", "simdino"])
def test_losses_that_are_dear_to_compile_report_the_vital_signs(name):
    method = kinds_of(methods.create(load(name)))[-1]
    spec = method.batch_spec(BATCH)
    variables = jax.eval_shape(functools.partial(method.init, jax.random.key(0), spec))
    values = {x: np.float32(0) for x in method.schedules(4, BATCH)}
    out = jax.eval_shape(method.loss, *variables, spec, jax.random.key(0), values)
    found = {f"train/{x}": y for x, y in (out.terms | out.report).items()}
    assert {sign.metric for sign in method.vitals(BATCH).signs} <= set(found)
    assert {x.shape for x in (*found.values(), out.loss)} == {()}


@pytest.mark.parametrize("name", SPREAD)
def test_steps_are_the_same_on_one_device_and_on_two(name):
    for one, two in zip(two_steps(name, ONE)[1], two_steps(name, TWO)[1]):
        np.testing.assert_allclose(one["train/loss"], two["train/loss"], rtol=1e-5)


def gradients(method, shape):
    """(loss, gradients by path) of drawn variables, sharded over a mesh of that shape."""
    mesh = mesh_of(shape)
    variables = drawn(method)
    cut = [rules.shardings(tree, mesh) for tree in variables[:2]]
    given = [jax.device_put(tree, where) for tree, where in zip(variables, cut)]
    batch = batch_of(method, 0) | {"position": np.arange(BATCH, dtype=np.int32)}
    values = {name: np.float32(0.04) for name in method.schedules(4, BATCH)}

    def loss(trained, teacher, batch):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            key = jax.random.key(1)
            return method.loss(trained, teacher, variables.aux, batch, key, values).loss

    step = jax.jit(jax.value_and_grad(loss), out_shardings=(None, cut[0]))
    value, found = step(*given, meshes.to_global(batch, mesh))
    return float(value), params.flatten(jax.device_get(found))


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_gradients_are_the_same_where_all_axes_of_the_mesh_are_used(name):
    """They were wrong there, with the right loss: ``layers.keep_order``. The shortest program for
    it is in tests/models/test_layers.py."""
    method = kinds_of(methods.create(load(name)))[-1]
    (value, found), (cut_value, cut_found) = (gradients(method, x) for x in (ONE, EIGHT))
    np.testing.assert_allclose(cut_value, value, rtol=1e-5)
    largest = max(np.abs(x).max() for x in found.values())
    for path, expected in found.items():  # those of biases of keys are 0 but for rounding
        scale = max(np.abs(expected).max(), 1e-2 * largest)
        np.testing.assert_allclose(
            cut_found[path] / scale, expected / scale, atol=1e-4, err_msg=path
        )


@pytest.mark.parametrize("name", CASES)
def test_a_view_gives_what_the_batch_spec_promises_and_flops_are_counted(name):
    method = methods.create(load(name))
    stream = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
    Image.fromarray(pixels).save(stream, "PNG")
    for kind in kinds_of(method):
        view, data = kind.train_view(), stream.getvalue()
        if isinstance(view, RecordView):
            said = small_vqa.talk()
            data = Record(
                data, ("a caption",), "key", 70, 50, "source", "animals", annotations=said
            )
        made = view(data, np.random.default_rng(0))
        for key, x in kind.batch_spec(3).items():
            assert (made[key].shape, made[key].dtype) == (x.shape[1:], x.dtype)
    # at least what three passes of the encoder over half of the patches take
    patches = method.encoder.num_patches // 2
    assert method.train_flops() > 3 * method.encoder.block_flops(patches)
    assert hash(method) == hash(methods.create(load(name)))
