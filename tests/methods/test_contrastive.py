"""The losses of image-text pairs against vectors of open_clip's own code (golden/, float32) and the
plain formulas, on meshes, and their memory."""

import functools
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from webssl_jax.methods.clip.contrastive import sigmoid_contrast, softmax_contrast
from webssl_jax.sharding import mesh as meshes

HERE = pathlib.Path(__file__).parent / "golden"
GOLDEN = np.load(HERE / "d_clip_losses.npz")
SCALARS = json.loads((HERE / "d_clip_losses.json").read_text())["scalars"]
MESHES = (((1, 8, 1), 0), ((1, 8, 1), 3), ((2, 4, 1), 3), ((1, 4, 2), 0))  # and rows at a time


def close(ours, theirs, tolerance=2e-5):
    """Relative to the largest value. Logits near 100 are exact to 8e-6, and so are their exps."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * np.abs(theirs).max())


def normalise(x):
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def pairs(count=24, width=16, seed=0):
    """(B, E) images and texts, normalised, each pair somewhat alike."""
    rng = np.random.default_rng(seed)
    images = rng.normal(size=(count, width))
    texts = images + rng.normal(size=(count, width))
    return normalise(jnp.float32(images)), normalise(jnp.float32(texts))


def plain_softmax(images, texts, scale, bias):
    logits = scale * images @ texts.T
    rows, columns = (jax.nn.log_softmax(logits, axis) for axis in (1, 0))
    return -(jnp.trace(rows) + jnp.trace(columns)) / (2 * len(logits))


def plain_sigmoid(images, texts, scale, bias):
    logits = scale * images @ texts.T + bias
    return -jax.nn.log_sigmoid((2 * jnp.eye(len(logits)) - 1) * logits).sum() / len(logits)


def ours_softmax(images, texts, scale, bias, block=0):
    return softmax_contrast(images, texts, scale, block=block).loss


def ours_sigmoid(images, texts, scale, bias, block=0):
    return sigmoid_contrast(images, texts, scale, bias, block=block).loss


LOSSES = {
    "softmax": (ours_softmax, plain_softmax, (100.0, 0.0)),
    "sigmoid": (ours_sigmoid, plain_sigmoid, (10.0, -10.0)),
}


def with_gradients(loss, **options):
    """Loss and gradients of images, texts, scale and bias."""
    grad = jax.value_and_grad(lambda *inputs: loss(*inputs, **options), argnums=(0, 1, 2, 3))
    return jax.jit(grad)


@pytest.mark.parametrize("case", SCALARS)
def test_loss_and_gradients_equal_the_original(case):
    kind, count, *_ = case.split("_")
    theirs = SCALARS[case]
    loss = ours_softmax if kind == "clip" else ours_sigmoid
    inputs = (GOLDEN[f"clip_{count}/image"], GOLDEN[f"clip_{count}/text"])
    scalars = (jnp.float32(theirs["logit_scale"]), jnp.float32(theirs.get("logit_bias", 0.0)))
    value, (image, text, scale, bias) = with_gradients(loss, block=3)(
        *map(jnp.asarray, inputs), *scalars
    )
    exact = {"rtol": 2e-6, "atol": 1e-6}
    np.testing.assert_allclose(value, theirs["loss"], **exact)
    np.testing.assert_allclose(scale, theirs["grad_scale"], **exact)
    np.testing.assert_allclose(bias, theirs.get("grad_bias", 0.0), **exact)
    close(image, GOLDEN[f"{case}/grad_image"])
    close(text, GOLDEN[f"{case}/grad_text"])


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("block", (1, 5, 100))
def test_any_block_is_the_plain_formula(name, block):
    ours, plain, scalars = LOSSES[name]
    inputs = (*pairs(), *map(jnp.float32, scalars))
    made, wanted = with_gradients(ours, block=block)(*inputs), with_gradients(plain)(*inputs)
    jax.tree.map(close, made, wanted)


def on_mesh(shape, function, images, texts, *scalars):
    """As in a train step: rows on the devices of a mesh that is in force."""
    mesh = jax.make_mesh(shape, meshes.AXES, axis_types=(AxisType.Auto,) * 3)
    rows, whole = meshes.batch_sharding(mesh), meshes.replicated(mesh)

    def step(*inputs):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*inputs)

    shardings = (rows, rows) + (whole,) * len(scalars)
    return jax.jit(step, in_shardings=shardings)(images, texts, *scalars)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("shape, block", MESHES)
def test_any_mesh_gives_the_loss_and_gradients_of_one_device(name, block, shape):
    ours, _, scalars = LOSSES[name]
    inputs = (*pairs(48), *map(jnp.float32, scalars))
    wanted = with_gradients(ours)(*inputs)
    made = on_mesh(shape, with_gradients(ours, block=block), *inputs)
    jax.tree.map(close, made, wanted)


@pytest.mark.parametrize("contrast", (softmax_contrast, sigmoid_contrast))
@pytest.mark.parametrize("shape", ((1, 1, 1), (2, 4, 1)))
def test_accuracies_count_pairs_that_beat_every_other(contrast, shape):
    images, texts = pairs(48, width=4)
    similar = np.asarray(images @ texts.T)
    own = np.diagonal(similar)
    rivals = np.where(np.eye(48, dtype=bool), -np.inf, similar)
    scalars = [jnp.float32(10.0)] * (1 if contrast is softmax_contrast else 2)
    made = on_mesh(shape, functools.partial(contrast, block=2), images, texts, *scalars)
    assert 0.1 < made.image_accuracy < 0.9
    assert made.image_accuracy == pytest.approx((own > rivals.max(axis=1)).mean())
    assert made.text_accuracy == pytest.approx((own > rivals.max(axis=0)).mean())
    alike = jax.jit(contrast)(jnp.ones((6, 1)), jnp.ones((6, 1)), *scalars)
    assert (alike.image_accuracy, alike.text_accuracy) == (0, 0)


def test_bfloat16_features_are_compared_in_bfloat16_and_summed_in_float32():
    images, texts = (x.astype(jnp.bfloat16) for x in pairs(256, width=64))
    inputs = (images, texts, jnp.float32(10.0), jnp.float32(0.0))
    rounded = tuple(jnp.float32(x) for x in inputs)
    value, grads = with_gradients(ours_softmax, block=16)(*inputs)
    wanted, plain = with_gradients(plain_softmax)(*rounded)
    close(value, wanted)
    assert grads[1].dtype == jnp.bfloat16
    close(jnp.float32(grads[1]), plain[1], 2**-7)


def test_a_network_that_knows_nothing_starts_at_ln_batch():
    images, _ = pairs(32)
    same = jnp.broadcast_to(images[:1], images.shape)
    for texts in (images, same):
        made = jax.jit(softmax_contrast)(texts, same, jnp.float32(14.3)).loss
        assert made >= math.log(32) * (1 - 1e-6)
    assert float(made) == pytest.approx(math.log(32), rel=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_blocks_need_a_fraction_of_the_plain_formulas_memory(name):
    """Compiled and not run: 8,192 pairs, whose logits are 256 MiB."""
    ours, plain, _ = LOSSES[name]
    features = jax.ShapeDtypeStruct((8192, 64), jnp.float32)
    scalar = jax.ShapeDtypeStruct((), jnp.float32)

    def mebibytes(loss, **options):
        step = with_gradients(loss, **options).lower(features, features, scalar, scalar)
        memory = step.compile().memory_analysis()
        return memory.temp_size_in_bytes / 2**20

    whole, blocks = mebibytes(plain), mebibytes(ours, block=256)
    print(name, whole, blocks)
    assert whole > 256
    assert blocks < whole / 8
