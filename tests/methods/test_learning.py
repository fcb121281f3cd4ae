"""Small networks learn a few images by heart, and along the curves that are committed.

python -m tests.methods.test_learning     writes the curves anew; the commit says why
"""

import json
import pathlib

import numpy as np
import pytest

from tests.methods import small_runs
from webssl_jax.data import records
from webssl_jax.methods.base import Variables
from webssl_jax.model import Model
from webssl_jax.models.features import Want

FILE = pathlib.Path(__file__).parent / "golden" / "reference_curves.json"
SEEDS = (0, 1, 2)
EVERY = 10  # steps, over which a point of a curve is the mean
COUNT = 64
SHORT = ["model.size=micro", "total_steps=300", "optim.lr_scaling=none"]
RECIPES = {
    "mae": (
        "configs/web_mae.py:size=tiny",
        [
            "global_batch=16",
            "method.view.image_size=32",
            "method.view.scale_min=1.0",
            "method.decoder.width=64",
            "method.decoder.depth=1",
            "method.decoder.heads=2",
            "optim.warmup_steps=20",
            "optim.lr=4e-3",
        ],
    ),
    "dino": (
        "configs/web_dino.py:size=tiny",
        [
            "global_batch=32",
            "method.koleo_weight=0.02",
            "method.patch_embed_rate=1.0",
            "method.teacher_temperature=0.02",
            "method.teacher_temperature_start=0.02",
            "method.teacher_temperature_warmup_images=0",
            "method.dino_head.prototypes=256",
            "method.dino_head.bottleneck=32",
            "method.ibot_head.prototypes=256",
            "method.ibot_head.bottleneck=32",
            "method.view.global_size=32",
            "method.view.local_size=16",
            "method.view.local_count=2",
            "method.view.local_scale=(0.1, 0.4)",
            "method.view.jitter=0.0",
            "method.view.grayscale=0.0",
            "method.view.blur=(0.0, 0.3, 0.1)",
            "method.view.solarize=(0.0, 0.0, 0.0)",
            "method.momentum=0.9",  # a slower teacher is what it was at the start, after 300 steps
            "optim.warmup_steps=20",
            "optim.lr=4e-3",
        ],
    ),
    "clip": (
        "configs/clip.py:size=tiny",
        [
            "global_batch=16",
            "method.view.image_size=32",
            "method.view.scale_min=1.0",
            "method.text.width=32",
            "method.text.depth=1",
            "method.text.heads=2",
            "method.text.context=16",
            "optim.warmup_steps=10",
            "optim.lr=3e-3",
        ],
    ),
}


def train(name):
    """{seed: a run}."""
    spec, overrides = RECIPES[name]
    return small_runs.train(spec, SHORT + overrides, small_runs.few_images(COUNT), SEEDS)


def curves(runs):
    """(seeds, points) losses."""
    return np.stack([run.metrics["train/loss"].reshape(-1, EVERY).mean(axis=1)
                     for run in runs.values()])  # fmt: skip


def spread(found):
    """(points,) standard deviation between seeds of the logarithm of the loss, its square averaged
    over seven points: of three seeds at one point it is hardly known."""
    variance = np.pad(np.log(found).var(axis=0, ddof=1), 3, mode="edge")
    return np.sqrt(np.convolve(variance, np.full(7, 1 / 7), "valid"))


def found_own_crop(method, variables):
    """Of the images the share whose second crop is the nearest of all second crops to the first,
    by the cosine of their CLS tokens."""
    view, model = method.train_view(), Model.of(method, Variables(*variables))
    crops = np.stack(
        [
            view(records.decode(data).image, np.random.default_rng((9, i)))["global_crops"]
            for i, data in enumerate(small_runs.few_images(COUNT))
        ]
    )
    cls = [np.asarray(model.features(crops[:, i], Want(patches="none")).cls) for i in (0, 1)]
    one, two = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in cls)
    return ((one @ two.T).argmax(axis=1) == np.arange(COUNT)).mean()


@pytest.fixture(scope="module", params=RECIPES)
def runs(request):
    """(name, {seed: run})."""
    return request.param, train(request.param)


@pytest.mark.slow
def test_a_small_network_learns_64_images_by_heart(runs):
    name, found = runs
    for seed, run in found.items():
        loss = run.metrics["train/loss"]
        if name == "mae":  # guessing the mean of each patch gives 1
            assert loss[-EVERY:].mean() < min(0.6 * loss[0], 0.85), seed
        elif name == "clip":
            assert loss[-EVERY:].mean() < 0.2, seed
        else:
            before, after = (found_own_crop(run.method, x) for x in (run.first, run.last))
            assert after > 5 / COUNT and after > before + 0.1, (seed, before, after)


@pytest.mark.slow
def test_the_mean_loss_of_the_seeds_falls_along_the_committed_curves(runs):
    """Within three standard errors of a difference between means of three seeds: other random
    numbers pass. A change that moves a curve says why in its commit, and writes the file anew."""
    name, found = runs
    committed = np.array(json.loads(FILE.read_text())[name])
    gap = np.log(curves(found)).mean(axis=0) - np.log(committed).mean(axis=0)
    error = spread(committed) * np.sqrt(2 / len(SEEDS))
    assert (np.abs(gap) < 3 * error).all(), np.round(gap / error, 1)


if __name__ == "__main__":
    made = {name: curves(train(name)).round(4).tolist() for name in RECIPES}
    text = ",\n".join(
        f' "{name}": [\n' + ",\n".join(f"  {one}" for one in found) + "\n ]"
        for name, found in made.items()
    )
    FILE.write_text("{\n" + text + "\n}\n")
