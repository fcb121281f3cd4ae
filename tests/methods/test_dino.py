"""The method DINO: what it hands to the optimiser, its schedules, and a loss that no device
changes."""

import dataclasses
import io
import json
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from tests.data.image_shards import encode_image, smooth_image
from webssl_jax import config as configs
from webssl_jax import methods, train_state
from webssl_jax import params as paths
from webssl_jax.config import ConfigError
from webssl_jax.data.multicrop import MultiCropView
from webssl_jax.methods.base import Variables
from webssl_jax.methods.dino.method import DINO, View
from webssl_jax.model import Model
from webssl_jax.models import sizes
from webssl_jax.models.blocks import stochastic_depth
from webssl_jax.models.features import Want, compute_features
from webssl_jax.models.heads import HeadConfig
from webssl_jax.models.vit import ViT
from webssl_jax.optim.guard import Guard
from webssl_jax.optim.optimizer import Optimizer
from webssl_jax.sharding import mesh as meshes
from webssl_jax.train_step import jit_train_step, make_train_step, verdict

ROOT = pathlib.Path(__file__).parent.parent.parent
GROUPS = json.loads((pathlib.Path(__file__).parent / "golden" / "g_param_groups.json").read_text())
SCHEDULES = np.load(ROOT / "tests" / "optim" / "golden" / "g_schedules.npz")
BATCH = 16
MICRO = DINO(
    encoder=sizes.web_dino("micro", layer_scale=0.1, drop_path=0.4),
    dino_head=HeadConfig(prototypes=64, bottleneck=16, hidden=32),
    ibot_head=HeadConfig(prototypes=48, bottleneck=16, hidden=32),
    group_images=4,
    view=View(global_size=32, local_size=16, local_count=3),
)
VALUES = {
    "learning_rate": 1e-3,
    "weight_decay": 0.04,
    "momentum": 0.9,
    "teacher_temperature": 0.05,
    "last_layer_rate": 1.0,
}


def crops(seed, method=MICRO, batch=BATCH):
    """Noise; what a device would have to do to it is nothing."""
    rng = np.random.default_rng(seed)
    return {
        name: rng.integers(0, 256 if spec.dtype == np.uint8 else 1, spec.shape).astype(spec.dtype)
        for name, spec in method.batch_spec(batch).items()
    }


@pytest.fixture(scope="module")
def variables():
    return jax.jit(lambda: MICRO.init(jax.random.key(0), MICRO.batch_spec(BATCH)))()


# The loss.


def run(shape, method=MICRO, steps=2):
    """(losses and gradient norms of a few steps, final state) on a mesh of that shape."""
    optim = configs.load("configs/web_dino.py:size=tiny").optim
    optimizer = Optimizer.from_config(optim, method.tables())
    mesh = meshes.create(
        ConfigDict(dict(zip(meshes.AXES, shape))), jax.devices()[: math.prod(shape)]
    )
    template = train_state.abstract(method, optimizer, 0, BATCH, mesh)
    state = train_state.create(method, optimizer, 0, BATCH, mesh)
    schedules = {name: lambda step, value=value: value for name, value in VALUES.items()}
    step = make_train_step(method, optimizer, Guard(), schedules, mesh)
    step = jit_train_step(step, template, mesh)
    rows = []
    for k in range(steps):
        state, metrics, _ = step(state, meshes.to_global(crops(k), mesh), verdict(0, mesh))
        rows.append([float(metrics[name]) for name in ("train/loss", "optim/grad_norm")])
    return np.array(rows), state


@pytest.fixture(scope="module")
def alone():
    return run((1, 1, 1))


@pytest.mark.parametrize(
    "shape, chunk",
    [
        pytest.param((2, 2, 2), 0, marks=pytest.mark.slow),
        ((1, 8, 1), 16),
        pytest.param((8, 1, 1), 0, marks=pytest.mark.slow),
        pytest.param((1, 8, 1), 0, marks=pytest.mark.slow),
    ],
)
def test_losses_and_gradients_do_not_depend_on_the_devices(alone, shape, chunk):
    """With masks, stochastic depth and KoLeo drawn and paired in groups of four images, on devices
    of two, and prototypes all at once or in chunks. float32; only the order of sums differs."""
    ours, state = run(shape, dataclasses.replace(MICRO, stream_prototypes=chunk))
    np.testing.assert_allclose(ours, alone[0], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(state.teacher), jax.tree.leaves(alone[1].teacher)):
        # Adam can turn a rounding difference into a step of up to a learning rate; of each step a
        # tenth reaches the teacher.
        np.testing.assert_allclose(a, b, atol=4e-4)


@pytest.fixture(scope="module")
def fresh():
    """(a method that distorts on the device, a new network, its loss of a batch). In a bottleneck
    of 256 channels, as the paper's, random directions are nearly orthogonal."""
    method = dataclasses.replace(
        MICRO,
        dino_head=HeadConfig(64, 256, 32),
        ibot_head=HeadConfig(48, 256, 32),
        view=dataclasses.replace(MICRO.view, distort_on="device"),
    )
    variables = method.init(jax.random.key(0), {})
    loss = jax.jit(method.loss)
    return method, variables, lambda batch: loss(*variables, batch, jax.random.key(1), VALUES)


def test_the_loss_is_the_same_wherever_crops_are_distorted(fresh):
    method, _, loss = fresh
    image = smooth_image(np.random.default_rng(0), 80, 60)
    views = [dataclasses.replace(method.train_view(), distort_on=x) for x in ("device", "host")]
    device, host = (
        [view(encode_image(image, "PNG"), np.random.default_rng(i)) for i in range(BATCH)]
        for view in views
    )
    device, host = ({name: np.stack([x[name] for x in y]) for name in y[0]} for y in (device, host))
    spec = method.batch_spec(BATCH)
    undone = {name: np.zeros(x.shape, x.dtype) for name, x in spec.items() if name not in host}
    assert device.keys() == spec.keys() == undone.keys() | host.keys() and len(undone) == 2
    found, wanted, plain = (loss(x).loss for x in (device, host | undone, device | undone))
    # Measured: not a digit differs, and without the distortions it is another loss.
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    assert abs(plain - wanted) > 1e-3


def test_a_fresh_network_knows_nothing(fresh):
    """DINO's loss is about ln K, iBOT's half of it, for only half of the crops have masks."""
    method, variables, loss = fresh
    out = loss(crops(0, method))
    dino = float(out.terms["dino_local"] + out.terms["dino_global"])
    assert dino == pytest.approx(math.log(64), rel=0.1)
    assert float(out.terms["ibot"]) == pytest.approx(math.log(48) / 2, rel=0.1)
    assert float(out.loss) == pytest.approx(sum(map(float, out.terms.values())), rel=1e-6)
    # 4 of 8 crops, 0.3 of each on average
    assert 0.08 < float(out.report["masked_share"]) < 0.2
    assert 0 < float(out.report["teacher_entropy"]) <= math.log(64)
    assert -1e-4 < float(out.report["teacher_student_kl"]) < 5
    assert 1 <= float(out.report["prototypes_used"]) <= 2 * BATCH

    # Without local crops the pair of global ones is the whole DINO loss.
    few = dataclasses.replace(method, view=View(global_size=32, local_size=16, local_count=0))
    assert list(few.batch_spec(2)) == ["global_crops"]
    out = jax.jit(few.loss)(*variables, crops(0, few), jax.random.key(1), VALUES)
    assert float(out.terms["dino_global"]) == pytest.approx(math.log(64), rel=0.1)
    assert float(out.terms["dino_local"]) == 0
    assert few.train_flops() < method.train_flops()
    assert "train/dino_local" not in {sign.metric for sign in few.vitals(16).signs}


def test_softmax_centering_uses_the_centre_of_the_steps_before(variables):
    method = dataclasses.replace(MICRO, centering="softmax")
    aux = {"dino_centre": jnp.zeros(64), "ibot_centre": jnp.zeros(48)}
    loss = jax.jit(method.loss)
    arguments = (crops(0), jax.random.key(1), VALUES)
    first = loss(variables.params, variables.teacher, aux, *arguments)
    again = loss(variables.params, variables.teacher, first.aux, *arguments)
    assert float(first.loss) != float(again.loss)
    for name in aux:
        # the same teacher and batch: 0.1 m, then 0.19 m
        np.testing.assert_allclose(again.aux[name], 1.9 * first.aux[name], rtol=1e-4, atol=1e-8)
    assert float(again.report["dino_centre_norm"]) > 0


def test_the_teacher_follows_the_student_and_gives_the_features(variables):
    params = jax.tree.map(lambda x: x + 1.0, variables.params)
    teacher = MICRO.update_teacher(variables.teacher, params, {"momentum": 0.75})
    for old, new in zip(jax.tree.leaves(variables.teacher), jax.tree.leaves(teacher)):
        np.testing.assert_allclose(new, old + 0.25, atol=1e-6)
    images = crops(0)["global_crops"][:2, 0]
    seen = Model.of(MICRO, Variables(params, variables.teacher, {})).features(images)
    normal = (images / 255 - np.float32(MICRO.mean)) / np.float32(MICRO.std)
    direct = compute_features(MICRO.encoder, variables.teacher["encoder"], normal, Want())
    np.testing.assert_allclose(seen.cls, direct.cls, atol=1e-5)


def test_a_batch_that_does_not_divide_into_groups_is_refused(variables):
    with pytest.raises(ValueError, match="6 images do not divide into groups of 4"):
        MICRO.loss(*variables, crops(0, batch=6), jax.random.key(0), VALUES)


# Two sizes of crops through one trunk.


def test_crops_that_share_the_trunk_do_not_see_each_other(variables):
    vit, tree = ViT(MICRO.encoder), {"params": variables.params["encoder"]}
    rng = np.random.default_rng(0)
    large, small = (rng.standard_normal((n, s, s, 3), np.float32) for n, s in ((4, 32), (6, 16)))
    mask = rng.random((4, 16)) < 0.5
    together = jax.jit(lambda: vit.apply(tree, (large, small), mask=(mask, None)))()
    apart = jax.jit(lambda: (vit.apply(tree, large, mask=mask), vit.apply(tree, small)))()
    for a, b in zip(together, apart):
        np.testing.assert_allclose(a.cls, b.cls, atol=2e-5)
        np.testing.assert_allclose(a.patches, b.patches, atol=2e-5)


def test_each_size_of_crop_draws_its_own_subset_of_every_group():
    sets = (jnp.zeros((8, 2, 3)), jnp.zeros((24, 1, 3)))
    seen = []

    def branch(x):
        seen.append([tokens.shape for tokens in x])
        return jax.tree.map(lambda tokens: tokens + 1.0, x)

    large, small = stochastic_depth(sets, branch, 0.4, jax.random.key(0), 4)
    assert seen == [[(4, 2, 3), (14, 1, 3)]]  # of 4 two, of 12 seven
    assert (large[:, 0, 0] > 0).reshape(2, 4).sum(axis=1).tolist() == [2, 2]
    assert (small[:, 0, 0] > 0).reshape(2, 12).sum(axis=1).tolist() == [7, 7]
    assert float(large.max()) == 2.0 and float(small.max()) == pytest.approx(12 / 7)


# Tables and schedules.


def ours(name):
    """Our path for the original's parameter name, which may be split or stacked here."""
    if name.startswith("blocks."):
        # blocks.3.norm1.weight, or in chunks blocks.1.3.norm1.weight
        block, rest = re.fullmatch(r"blocks\.(?:\d+\.)?(\d+)\.(.*)", name).groups()
        kind = {"weight": "kernel", "bias": "bias", "gamma": "gamma"}[rest.rpartition(".")[2]]
        module = rest.rpartition(".")[0]
        module = {
            "attn.qkv": "attn/q",
            "attn.proj": "attn/out",
            "mlp.w12": "mlp/w1",
            "mlp.w3": "mlp/w3",
            "mlp.fc1": "mlp/fc1",
            "mlp.fc2": "mlp/fc2",
            "ls1": "layer_scale1",
            "ls2": "layer_scale2",
        }.get(module, module)
        kind = "scale" if module.startswith("norm") and kind == "kernel" else kind
        return f"encoder/blocks/{module}/{kind}", int(block)
    fixed = {
        "patch_embed.proj.weight": "encoder/patch_embed/kernel",
        "patch_embed.proj.bias": "encoder/patch_embed/bias",
        "norm.weight": "encoder/norm/scale",
        "norm.bias": "encoder/norm/bias",
        "mlp.0.weight": "dino_head/fc1/kernel",
        "mlp.2.bias": "dino_head/fc2/bias",
        "mlp.4.weight": "dino_head/fc3/kernel",
        "mlp.0.bias": "dino_head/fc1/bias",
        "mlp.2.weight": "dino_head/fc2/kernel",
        "mlp.4.bias": "dino_head/fc3/bias",
        "last_layer.weight_g": "dino_head/last_layer/g",
        "last_layer.weight_v": "ibot_head/last_layer/v",
    }
    return fixed.get(name, f"encoder/{name}"), None


@pytest.mark.parametrize("group", GROUPS["groups"])
def test_rates_and_decays_are_those_of_the_original_s_parameter_groups(group):
    decay, patch_embed = (float(part.lstrip("decayp_")) for part in group.split("/")[1].split("_"))
    method = dataclasses.replace(
        MICRO,
        encoder=dataclasses.replace(MICRO.encoder, depth=4, num_registers=4),
        layer_decay=decay,
        patch_embed_rate=patch_embed,
    )
    tables = method.tables()
    known = paths.flatten(jax.eval_shape(lambda: method.init(jax.random.key(0), {}).params))
    for row in GROUPS["groups"][group]["params"]:
        path, block = ours(row["name"])
        assert path in known or "/fc" in path and "mlp" in path, path
        assert paths.lookup(tables.decay, path, 1.0) == row["wd_multiplier"], path
        rate = paths.lookup(tables.learning_rate, path, 1.0)
        assert (rate == "last_layer_rate") == row["is_last_layer"]
        rate = rate[block] if isinstance(rate, tuple) else 1.0 if isinstance(rate, str) else rate
        assert rate == pytest.approx(row["lr_multiplier"], rel=1e-12), path


def test_the_schedules_are_the_original_s():
    method = dataclasses.replace(
        MICRO,
        momentum=0.992,
        teacher_temperature_warmup_images=30 * 64,
        freeze_last_layer_images=20 * 64,
    )
    made = method.schedules(total_steps=100, global_batch=64)
    steps = np.arange(105)
    for name, theirs in (("momentum", "momentum"), ("teacher_temperature", "teacher_temp")):
        golden = SCHEDULES[theirs]
        values = jax.vmap(made[name])(steps[: len(golden)])
        np.testing.assert_allclose(values, golden, atol=1e-6 * golden.max())
    assert jax.vmap(made["last_layer_rate"])(steps).tolist() == [0.0] * 20 + [1.0] * 85


# Views.

NO_COLOURS = {"jitter": 0.0, "grayscale": 0.0, "solarize": (0.0, 0.0, 0.0)}
COLOUR = (200, 60, 30)


def test_the_default_views_are_those_of_the_original():
    sides = {"global_size": 32, "local_size": 16, "local_count": 3}
    assert MICRO.train_view() == MultiCropView(**sides)


def test_crops_that_are_no_squares_are_made_and_can_be_trained_on():
    wide = dataclasses.replace(
        MICRO,
        encoder=dataclasses.replace(MICRO.encoder, image_size=(16, 64)),
        view=View(global_size=(16, 64), local_size=(8, 24), local_count=3),
    )
    assert wide.view.global_size == (16, 64) and wide._grid == (2, 8)
    stream = io.BytesIO()
    Image.new("RGB", (90, 40), COLOUR).save(stream, "PNG")
    made = wide.train_view()(stream.getvalue(), np.random.default_rng(0))
    batch = wide.batch_spec(8)
    assert {name: x.shape for name, x in made.items()} == {
        "global_crops": (2, 16, 64, 3),
        "local_crops": (3, 8, 24, 3),
    }
    assert all(batch[name].shape[1:] == x.shape for name, x in made.items())
    key = jax.random.key(0)
    variables = jax.eval_shape(lambda key: wide.init(key, batch), key)

    def loss(params, teacher):
        return wide.loss(params, teacher, {}, crops(0, wide, 8), key, VALUES).loss

    grads = jax.eval_shape(jax.grad(loss), variables.params, variables.teacher)
    assert paths.count(grads) == paths.count(variables.params)


@pytest.mark.parametrize(
    "distortion, touched",
    [
        ({}, False),
        ({"jitter": 1.0}, True),
        ({"grayscale": 1.0}, True),
        ({"solarize": (1.0, 1.0, 1.0)}, True),
    ],
    ids=lambda value: ",".join(value) or "none" if isinstance(value, dict) else "",
)
def test_each_distortion_of_colours_can_be_turned_off_alone(distortion, touched):
    fields = NO_COLOURS | distortion
    method = dataclasses.replace(MICRO, view=dataclasses.replace(MICRO.view, **fields))
    file = io.BytesIO()
    Image.new("RGB", (50, 40), COLOUR).save(file, "PNG")
    for crops in method.train_view()(file.getvalue(), np.random.default_rng(0)).values():
        same = (crops == np.uint8(COLOUR)).all(axis=(1, 2, 3))
        assert (same == (not touched)).all()


# Config.


@pytest.mark.parametrize("size", ["300m", "7b"])
def test_a_paper_config_has_the_original_s_parameters(size):
    method = methods.create(configs.load(f"configs/web_dino.py:size={size}"))
    shapes = jax.eval_shape(
        lambda: method.init(jax.random.key(0), method.batch_spec(12))
    )  # nothing is allocated
    count = paths.count(shapes.params["encoder"])
    assert count == {"300m": 303_655_168, "7b": 6_450_170_880}[size]
    assert paths.count(shapes.teacher) == paths.count(shapes.params) and shapes.aux == {}
    # tpu.md, section 4: 1.3e17 for 3072 images, without stochastic depth
    whole = dataclasses.replace(method, encoder=dataclasses.replace(method.encoder, drop_path=0.0))
    if size == "7b":
        assert whole.train_flops() * 3072 == pytest.approx(1.300e17, rel=0.01)
    assert method.train_flops() < whole.train_flops()


@pytest.mark.parametrize(
    "override, message",
    [
        ("global_batch=40", "global_batch = 40 does not divide into groups"),
        ("model.drop_path_group=4", "model.drop_path_group is method.group_images here"),
        ("model.pooling=map", "pooling = 'map': the heads need 'cls'"),
        ("method.centering=none", "centering = 'none' is not one of sinkhorn, softmax"),
        ("method.view.local_size=20", "an image of 20x20 pixels"),
        ("method.group_images=1", "KoLeo needs at least 2"),
        ("method.view.flip=1.5", "method.view: flip = 1.5 must be a probability"),
        ("method.view.jitter=-0.1", "method.view: jitter = -0.1 must be a probability"),
        ("method.view.grayscale=2.0", "method.view: grayscale = 2.0 must be a probability"),
        ("method.view.blur=(0,0,2)", r"blur = \(0, 0, 2\) must be 3 probabilities"),
        ("method.view.solarize=(0.5,0.5)", r"solarize = \(0.5, 0.5\) must be 3 probabilities"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(override, message):
    with pytest.raises(ConfigError, match=message) as caught:
        methods.create(configs.load("configs/web_dino.py:size=tiny", [override]))
    assert "\n" not in str(caught.value)


def test_a_config_that_has_been_json_gives_the_same_method():
    config = configs.load("configs/web_dino.py:size=tiny")
    again = ConfigDict(json.loads(json.dumps(config.to_dict())))
    assert methods.create(config) == methods.create(again)


def test_the_picture_shows_two_masks_an_image(variables):
    images = crops(0)["global_crops"][:4, 0]
    sheet = MICRO.pictures(variables, {"image": images}, jax.random.key(0))["masks"]
    assert sheet.dtype == np.uint8 and sheet.ndim == 3
