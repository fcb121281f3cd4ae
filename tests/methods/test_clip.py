"""CLIP as a method: config, loss, devices, the clamp of its scale, tables, features, alarms.

A micro run learns and resumes exactly.
"""

import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from ml_collections import ConfigDict

from tests.e2e import runner
from webssl_jax import config as configs
from webssl_jax import methods, params
from webssl_jax.config import ConfigError
from webssl_jax.methods.base import Variables
from webssl_jax.model import Model
from webssl_jax.models.features import Want
from webssl_jax.optim.optimizer import Optimizer
from webssl_jax.sharding import mesh as meshes
from webssl_jax.sharding import rules
from webssl_jax.telemetry.alarms import PATIENCE, AlarmMonitor

END = 63  # the largest id of this vocabulary


def config(**method):
    method = {
        "name": "clip",
        "text": {"vocabulary": 64, "context": 8},
        "view": {"image_size": 32},
    } | method
    return ConfigDict({"model": {"size": "micro"}, "method": method})


def fresh(clip):
    return jax.jit(lambda key: clip.init(key, clip.batch_spec(4)))(jax.random.key(0))


@pytest.fixture(scope="module")
def clip():
    return methods.create(config())


@pytest.fixture(scope="module")
def variables(clip):
    return fresh(clip)


def batch(n=16, seed=0, empty=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, END, (n, 8)).astype(np.int32)
    tokens[:, 5:] = 0
    tokens[np.arange(n), rng.integers(3, 6, n)] = END
    tokens[:empty, 1] = END
    return {"image": rng.integers(0, 256, (n, 32, 32, 3), np.uint8), "tokens": tokens}


def run(clip, mesh=None):
    def loss(tree, data, rng):
        out = clip.loss(tree, {}, {}, data, rng, {})
        return out.loss, out

    def step(*inputs):
        if mesh is None:
            return jax.value_and_grad(loss, has_aux=True)(*inputs)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return jax.value_and_grad(loss, has_aux=True)(*inputs)

    return step


def test_config_reaches_both_towers():
    made = methods.create(
        ConfigDict(
            {
                "model": {"size": "300m", "depth": 3, "dtype": "float32", "heads": None},
                "method": {"name": "clip", "text": {"depth": 5}, "view": {"image_size": 196}},
            }
        )
    )
    assert (made.encoder.width, made.encoder.depth, made.encoder.heads) == (1024, 3, 16)
    assert (made.encoder.image_size, made.encoder.pre_norm) == (196, True)
    assert (made.text.width, made.text.depth, made.text.embedding) == (1280, 5, 1280)
    assert (made.text.dtype, made.text.remat) == ("float32", "full")  # as the image tower's
    assert made.start == (1 / 0.07, None)
    assert methods.create(config(contrast="sigmoid")).start == (10.0, -10.0)
    assert made.couples_batch and hash(made) == hash(made)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model.size": "8b"}, "no CLIP size '8b'"),
        ({"method.contrast": "hinge"}, "contrast = 'hinge' is not one of softmax, sigmoid"),
        ({"method.bias": -1.0}, "softmax has none"),
        ({"method.scale": 200.0}, "must satisfy 1 <= scale <= scale_max"),
        ({"method.block": -1}, "block = -1 must be zero or positive"),
        ({"method.text": {"heads": 7}}, "a text tower: width = 32 does not divide"),
        ({"method.text": {"layers": 7}}, "a text tower has no field 'layers'"),
        ({"method.view": {"image_size": 32, "scale_min": 0.0}}, "method.view: scale_min = 0.0"),
        ({"method.view": {"image_size": 36}}, "image_size = 36 is not a multiple of"),
        ({"method.view": {"uncaptioned": "skip"}}, "uncaptioned = 'skip' is not one of empty"),
        ({"method.mean": (0.5, 0.5)}, "mean = (0.5, 0.5) must be three numbers"),
        ({"method.loss": "softmax"}, "method has no field 'loss'"),
    ],
)
def test_a_wrong_config_is_refused_in_one_line(change, says):
    wrong = config()
    for path, value in change.items():
        folder, name = path.split(".")
        wrong[folder] = wrong[folder].to_dict() | {name: value}
    with pytest.raises(ConfigError) as error:
        methods.create(wrong)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_batch_of_one_has_nothing_to_contrast():
    with pytest.raises(ConfigError, match="global_batch = 1: .* 2 is the least"):
        methods.create(configs.load("clip:size=tiny", ["global_batch=1"]))
    methods.create(configs.load("clip:size=tiny", ["global_batch=2"]))


def test_ids_that_the_tokenizer_does_not_have_are_refused_before_anything_is_read():
    clip = methods.create(config())
    assert clip.text.vocabulary == END + 1
    with pytest.raises(ConfigError, match="vocabulary = 64: the tokenizer has 49408 ids"):
        clip.train_view()


def test_a_network_that_knows_nothing_stands_at_one_in_the_picture_of_the_loss():
    """Sigmoid at the start's scale and bias with all cosines 0: recipes.md section 4.4."""
    for contrast, batch, expected in (("softmax", 64, 4.159), ("sigmoid", 32_768, 11.488)):
        vitals = methods.create(config(contrast=contrast)).vitals(batch)
        assert vitals.signs[0].most == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("contrast", ["softmax", "sigmoid"])
def test_the_loss_is_the_plain_formula_of_both_towers_embeddings(contrast):
    clip = methods.create(config(contrast=contrast))
    variables, data = fresh(clip), batch(64, empty=16)
    _, out = jax.jit(run(clip))(variables.params, data, jax.random.key(1))[0]
    towers = Model.of(clip, variables).text
    images, texts = map(
        np.asarray, (towers.embed_images(data["image"]), towers.embed(data["tokens"]))
    )
    np.testing.assert_allclose(np.linalg.norm(images, axis=1), 1, rtol=1e-6)
    cosines, same = images @ texts.T, np.eye(64, dtype=bool)
    scale, bias = clip.start
    logits = scale * cosines + (bias or 0)
    if clip.contrast == "softmax":
        sums = [np.log(np.exp(logits).sum(axis=axis)) for axis in (0, 1)]
        wanted = (np.mean(sums, axis=0) - np.diagonal(logits)).mean()
    else:
        wanted = np.log1p(np.exp(np.where(same, -logits, logits))).sum() / 64
    assert out.loss == pytest.approx(wanted, rel=1e-5)
    assert sum(out.terms.values()) == out.loss
    logged = {f"train/{name}" for name in out.terms | out.report}
    assert {sign.metric for sign in clip.vitals(64).signs} <= logged
    assert out.report["empty_texts"] == 0.25
    assert out.report["logit_scale"] == pytest.approx(scale)
    assert out.report["pair_cosine"] == pytest.approx(cosines[same].mean(), abs=1e-5)
    assert out.report["other_cosine"] == pytest.approx(cosines[~same].mean(), abs=1e-5)
    assert ("logit_bias" in out.report) == (clip.contrast == "sigmoid")


def test_eight_devices_with_sharded_parameters_compute_what_one_does(clip, variables):
    data, key = batch(16), jax.random.key(0)
    (one, _), gradient = jax.jit(run(clip))(variables.params, data, key)
    mesh = jax.make_mesh((2, 4, 1), meshes.AXES, axis_types=(AxisType.Auto,) * 3)
    placed = jax.device_put(variables.params, rules.shardings(variables.params, mesh))
    spread = jax.device_put(data, meshes.batch_sharding(mesh))
    (many, _), gradient8 = jax.jit(run(clip, mesh))(placed, spread, key)
    np.testing.assert_allclose(many, one, rtol=1e-5)
    for (path, b), a in zip(params.flatten(gradient).items(), jax.tree.leaves(gradient8)):
        tolerance = 2e-5 * max(float(jnp.abs(b).max()), 0.01)  # of the largest of an array
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance, err_msg=path)


def test_both_towers_learn_to_tell_pairs_apart(clip, variables):
    """By heart: 16 pairs, 60 steps. A run's first steps only make the batch's mean fit."""
    optimizer, data = optax.adam(2e-3), batch(16)

    @jax.jit
    def step(tree, state):
        (_, out), grads = run(clip)(tree, data, jax.random.key(0))
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(tree, updates), state, out.report

    tree, state = variables.params, optimizer.init(variables.params)
    for _ in range(60):
        tree, state, report = step(tree, state)
    assert report["image_accuracy"] == report["text_accuracy"] == 1
    assert report["pair_margin"] > 0.2


def test_every_step_ends_with_the_scale_within_its_bounds(clip, variables):
    optim = dict(b1=0.9, b2=0.98, eps=1e-6, clip="none", clip_norm=1.0, moment_dtype="float32")
    optimizer = Optimizer.from_config(
        ConfigDict(optim | {"frozen": (), "lr_multipliers": ()}), clip.tables()
    )
    scales = {"logit_scale": variables.params["logit_scale"]}
    values = {"learning_rate": 3.0, "weight_decay": 0.2}
    for gradient, end in ((-1.0, math.log(100)), (1.0, 0.0)):
        state, grads = optimizer.init(scales), {"logit_scale": jnp.float32(gradient)}
        moved, _ = optimizer.update(grads, state, scales, values)
        assert moved["logit_scale"] == pytest.approx(end)


def test_decay_spares_what_open_clip_spares(clip, variables):
    decay = params.flatten(params.match(clip.tables().decay, variables.params, 1.0))
    spared = {path for path, factor in decay.items() if factor == 0.0}
    # one-dimensional in one block of one tower, the CLS token in theirs too
    flat = params.flatten(variables.params)
    thin = {path for path, x in flat.items() if x.ndim - ("/blocks/" in path) < 2}
    assert spared == thin | {"encoder/cls_token"}
    assert {"encoder/pos_embed", "text/token_embed", "projection/kernel"} <= set(decay) - spared
    assert not params.unmatched_rows(clip.tables().bounds, variables.params)


def test_features_are_those_of_the_image_tower_and_need_nothing_else(clip, variables):
    encoder_only = Variables({"encoder": variables.params["encoder"]}, {}, {})
    images = np.random.default_rng(0).integers(0, 256, (2, 40, 48, 3), np.uint8)
    out = Model.of(clip, encoder_only).features(images, Want(blocks=(0, -1)))
    assert out.cls.shape == (2, 32) and out.patches.shape == (2, 5, 6, 32)
    np.testing.assert_array_equal(out.blocks[-1][0], out.cls)


def test_flops_of_b32_are_known():
    made = methods.create(ConfigDict({"model": {"size": "b32"}, "method": {"name": "clip"}}))
    # by hand: 50 patches and tokens x 12 blocks x 12 D^2 weights, two operations each; the rest is
    # attention and the ends
    by_weights = 2 * 12 * 12 * (50 * 768**2 + 77 * 512**2)
    assert made.train_flops() / 3 == pytest.approx(by_weights, rel=0.06)
    assert made.train_flops() / 3 > by_weights


def rows(**figures):
    healthy = {
        "contrast": 2.0,
        "pair_margin": 0.3,
        "image_accuracy": 0.4,
        "text_accuracy": 0.4,
        "logit_scale": 30.0,
        "empty_texts": 0.0,
    }
    figures = {f"train/{name}": value for name, value in (healthy | figures).items()}
    return [{"step": 100 + step, **figures} for step in range(PATIENCE)]


@pytest.mark.parametrize("contrast", ["softmax", "sigmoid"])
@pytest.mark.parametrize(
    ("figures", "name"),
    [
        ({}, None),
        ({"pair_margin": 0.001, "image_accuracy": 1 / 256}, "captions do not fit their images"),
        ({"image_accuracy": 1.0, "text_accuracy": 1.0}, "the batch is too easy"),
        ({"logit_scale": 100.0}, "the logit scale is at its limit"),
        ({"empty_texts": 0.5}, "many texts are empty"),
    ],
)
def test_alarms_tell_one_sickness_from_another(contrast, figures, name):
    clip = methods.create(config(contrast=contrast))
    alarms = AlarmMonitor(clip.vitals(256), warmup_steps=10)
    alarms.update_all(rows(**figures))
    assert [episode.alarm.name for episode in alarms.active] == ([name] if name else [])


RUN = {
    "method.view.image_size": 32,
    "model.size": "micro",
    "model.image_size": 32,
    "method.text.depth": 1,
    "method.text.context": 16,
    "global_batch": 32,
    "total_steps": 12,
    "optim.warmup_steps": 2,
    "optim.lr": 3e-3,
    "sharding.max_unsharded_fraction": 0.2,
    "log.every_steps": 1,
    "log.trackers": "none",
    "pictures.kinds": "none",
    "checkpoint.every_steps": 6,
    "data.threads": 2,
}


def train(workdir, spec):
    command = ["-m", "webssl_jax.train", "--config", f"configs/clip.py:{spec}"]
    command += ["--workdir", workdir, *(f"--config.{k}={v}" for k, v in RUN.items())]
    done = runner.python(*command, timeout=600)
    assert done.code == 0, done.output


def test_a_run_learns_and_one_that_stopped_goes_on_with_the_same_losses(tmp_path):
    train(tmp_path / "run", "size=tiny,loss=sigmoid")
    whole = runner.losses(tmp_path / "run")
    assert list(whole) == list(range(1, 13))
    assert np.mean([whole[step] for step in (10, 11, 12)]) < 0.9 * whole[1]
    figures = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert figures["train/empty_texts"] < 0.1 and "train/image_accuracy" in figures

    shutil.rmtree(tmp_path / "run" / "checkpoints" / "12")
    train(tmp_path / "run", "size=tiny,loss=sigmoid")
    assert runner.losses(tmp_path / "run") == whole
