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


def labelled(row, kind, records):
    """The overrides that add a row of evaluations."""
    keys = {"kind": kind, "train": records / "train-*.arrayrecord"}
    keys["test"] = records / "test-*.arrayrecord"
    return {f"evals.{row}.{key}": value for key, value in keys.items()}


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
        **labelled("knn", "knn", tmp_path / "records"),
        **labelled("probe", "logistic", tmp_path / "records"),
        "eval_batch": 32,
        "log.trackers": "tensorboard",
    }
    result = runner.train(tmp_path / "run", shards)
    assert result.code == 0, result.output
    rows = [json.loads(line) for line in open(tmp_path / "run" / "metrics.jsonl")]
    assert [row["step"] for row in rows if "eval/probe/top1" in row] == [0, 12]

    table = python("-m", "webssl_jax.evaluate", "--model", tmp_path / "run")
    for row in (
        "majority class",
        "raw pixels",
        "colour histogram",
        "run, step 0 (untrained)",
        "run, step 12 ",
    ):
        assert row in table
    earlier = python("-m", "webssl_jax.evaluate", "--model", tmp_path / "run", "--step", 9)
    assert "run, step 9 " in earlier

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
    foreign = tmp_path / "mae.pth"
    python(
        *("tools/export.py", "--workdir", tmp_path / "run"),
        *("--format", "mae-pth", "--output", foreign),
    )
    # our run and two foreign kinds of weights in one table, paired image by image
    table = python(
        *("-m", "webssl_jax.evaluate", "--output", tmp_path / "evaluations"),
        *("--model", tmp_path / "run", "--model", tmp_path / "export", "--model", foreign),
    )
    for row in ("run, step 12 ", "\nexport ", "\nmae.pth "):
        assert row in table
    assert "knn top1: mae.pth not clearly different from export: +0.000 ± 0.000" in table
    assert (tmp_path / "evaluations" / "mae.pth" / "eval" / "probe" / "00000000.json").exists()

    card = (tmp_path / "export" / "README.md").read_text()
    assert f"{rows[-1]['eval/probe/top1']:.3f}" in card
