"""The road in small: folders of images, records, training, evaluation, export, transformers."""

import json

import numpy as np
from PIL import Image

from tests.e2e import runner

CLASSES = {"stripes": (1, 0), "bars": (0, 1), "waves": (1, 1)}


def make_images(root, per_class=40):
    """Real files of three textures that differ in direction, not in colour."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:48, 0:48] / 48
    for name, (dy, dx) in CLASSES.items():
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            wave = np.sin(2 * np.pi * (rng.uniform(2, 4) * (dy * y + dx * x) + rng.uniform()))
            pixels = (
                127 + 90 * wave[..., None] * rng.uniform(0.3, 1, 3) + rng.normal(0, 8, (48, 48, 3))
            )
            Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(root / name / f"{i}.png")


def python(*arguments):
    done = runner.python(*arguments)
    assert done.code == 0, done.output
    return done.output


def test_images_become_a_trained_evaluated_and_exported_network(tmp_path):
    make_images(tmp_path / "images")
    output = python(
        "tools/make_records.py",
        "folder",
        "--input",
        tmp_path / "images",
        "--output",
        tmp_path / "records",
        "--label-from",
        "folder",
        "--test-fraction",
        0.25,
        "--workers",
        2,
    )
    assert (tmp_path / "records" / "train.summary.json").exists(), output

    shards = {
        "data.train": tmp_path / "records" / "train-*.arrayrecord",
        "eval.train": tmp_path / "records" / "train-*.arrayrecord",
        "eval.test": tmp_path / "records" / "test-*.arrayrecord",
        "eval.batch": 32,
        "log.tensorboard": True,
    }
    result = runner.train(tmp_path / "run", shards)
    assert result.code == 0, result.output
    rows = [json.loads(line) for line in open(tmp_path / "run" / "metrics.jsonl")]
    assert [row["step"] for row in rows if "eval/linear/top1" in row] == [0, 12]

    table = python("-m", "webssl_jax.evaluate", "--workdir", tmp_path / "run")
    for row in (
        "majority class",
        "raw pixels",
        "colour histogram",
        "step 0 (untrained)",
        "step 12 (this",
    ):
        assert row in table
    earlier = python("-m", "webssl_jax.evaluate", "--workdir", tmp_path / "run", "--step", 9)
    assert "step 9 (this model)" in earlier

    output = python(
        "tools/export.py",
        "--workdir",
        tmp_path / "run",
        "--format",
        "hf-vit",
        "--output",
        tmp_path / "export",
        "--verify",
    )
    assert "verified with transformers" in output
    card = (tmp_path / "export" / "README.md").read_text()
    assert f"{rows[-1]['eval/linear/top1']:.3f}" in card
