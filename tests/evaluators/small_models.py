"""Models of few numbers on a mesh of all devices, and shards of images for them to look at."""

import functools
import json
import pathlib

import jax
import numpy as np
from ml_collections import ConfigDict

from tests.data.image_shards import encode_image, write_shard
from tests.weights import samples
from webssl_jax import checkpoints, methods, params, train_state
from webssl_jax import config as configs
from webssl_jax.data import records
from webssl_jax.methods.base import Variables
from webssl_jax.model import Model, Origin
from webssl_jax.optim.optimizer import Optimizer
from webssl_jax.sharding import mesh as meshes
from webssl_jax.sharding import rules

BATCH = 8
DINO = str(pathlib.Path(__file__).parents[2] / "configs" / "web_dino.py:size=tiny")
CLASSES = ("ant", "bee", "cat")


def mesh_of(devices=8):
    """The first ``devices``, as an evaluation lays them: parameters and batches cut over all."""
    shape = ConfigDict({"replica": 1, "fsdp": -1, "tensor": 1})
    return meshes.create(shape, jax.devices()[:devices])


def model_of(method, weights, devices=8, name="small"):
    """``weights``, a tree of numpy arrays, as a model on a mesh."""
    laid = rules.shardings(weights, mesh_of(devices))
    placed = jax.tree.map(jax.device_put, weights, laid)
    return Model.of(method, Variables(placed, {}, {}), Origin(name))


@functools.cache
def small_clip(devices=8, seed=0):
    """Towers with CLIP's tokenizer; images of 16 pixels."""
    words = {"name": "clip", "text": {"depth": 1}, "view": {"image_size": 16}}
    method = methods.create(ConfigDict({"model": {"size": "micro"}, "method": words}))
    return model_of(method, samples.make_params(method, seed), devices)


@functools.cache
def small_mae(devices=8, seed=0, depth=3):
    """Encoder and decoder of images of 32 pixels in patches of 8."""
    method = samples.make_method(depth=depth)
    return model_of(method, samples.make_params(method, seed), devices)


def save_run(workdir, steps):
    """(method, state) of a DINO run that is saved there with those checkpoints, all of the same
    random numbers; the teacher is another network than the student. Nothing is compiled."""
    small = ("model.size=micro", "global_batch=16", "method.view.global_size=32")
    config = configs.load(DINO, [*small, f"checkpoint.keep_last={len(steps)}"])
    workdir.mkdir(parents=True)
    (workdir / "config.json").write_text(json.dumps(configs.resolved(config)))
    method = methods.create(config)
    optimizer = Optimizer.from_config(config.optim, method.tables())
    shapes = train_state.abstract(method, optimizer, 0, config.global_batch, mesh_of(1))
    rng = np.random.default_rng(0)

    def draw(leaf):
        return jax.device_put(np.asarray(rng.normal(0, 0.1, leaf.shape), leaf.dtype), leaf.sharding)

    state = jax.tree.map(draw, shapes)
    saver = checkpoints.Checkpointer(workdir)
    for step in steps:
        saver.save(state._replace(step=jax.numpy.int32(step)))
    saver.close()
    return method, state


def broken(model):
    """The same with nothing but NaN."""
    return Model(model.networks, jax.tree.map(lambda x: x * np.nan, model.params), model.origin)


def changed(model, path, by=1e-3):
    """The same with a little more in the first number of one parameter."""

    def add(name, leaf):
        return leaf.at[(0,) * leaf.ndim].add(by) if name == path else leaf

    return Model(model.networks, params.map_with_path(add, model.params), model.origin)


def coloured(n, seed=0, side=20):
    """(images (n, side, side, 3) uint8, labels): the class is the dominant channel, but for some
    noise."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, n)
    images = rng.integers(0, 130, (n, side, side, 3))
    images[np.arange(n), :, :, labels] += rng.integers(0, 60, (n, 1, 1))
    return images.astype(np.uint8), [CLASSES[label] for label in labels]


def items_of(images, labels=None, captions=None):
    """Encoded records. A caption may be a text or several; None: none. A label may be None."""
    labels = labels or [None] * len(images)
    captions = captions or [()] * len(images)
    return [
        records.encode(
            records.Record(
                image if isinstance(image, bytes) else encode_image(image),
                (texts,) if isinstance(texts, str) else tuple(texts),
                str(i),
                20,
                20,
                "test",
                label,
            )
        )
        for i, (image, label, texts) in enumerate(zip(images, labels, captions, strict=True))
    ]


def shard(folder, name, items):
    """Writes records as one shard; the pattern that names it."""
    write_shard(folder / f"{name}-00000-of-00001.arrayrecord", items)
    return str(folder / f"{name}-*.arrayrecord")


def labelled_shard(folder, name, n, seed=0):
    """The pattern of ``n`` labelled images with a caption each."""
    images, labels = coloured(n, seed)
    captions = [f"the {i}th {label}" for i, label in enumerate(labels)]
    return shard(folder, name, items_of(images, labels, captions))
