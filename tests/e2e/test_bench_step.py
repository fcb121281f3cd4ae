"""The benchmark of the train step measures what it says it measures.

The DINO side of torch needs the original's code, which is not here. With a checkout, the tool
itself refuses to compare steps whose loss terms or parameters differ:

    python tools/bench_step.py --dinov2 /tmp/d2 --rounds 1 --steps 1
"""

import importlib.util
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from tests.e2e.runner import ROOT

TOOL = ROOT / "tools" / "bench_step.py"
SMALL = ["model.width=32", "model.depth=2", "model.heads=2", "global_batch=4"]
SMALL_DINO = [
    *SMALL,
    "method.group_images=4",
    "method.view.global_size=56",
    "method.view.local_size=28",
    "method.view.local_count=2",
    "method.dino_head.prototypes=64",
    "method.dino_head.hidden=32",
    "method.dino_head.bottleneck=16",
    "method.ibot_head.prototypes=48",
    "method.ibot_head.hidden=32",
    "method.ibot_head.bottleneck=16",
]
SMALL_MAE = [
    *SMALL,
    "method.view.image_size=32",
    "method.decoder.width=32",
    "method.decoder.depth=1",
    "method.decoder.heads=2",
]
SMALL_CLIP = [
    *SMALL,
    "method.view.image_size=32",
    "method.text.width=32",
    "method.text.depth=1",
    "method.text.heads=2",
]


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_step", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*flags):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    command = [sys.executable, str(TOOL), *flags]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1800)


@pytest.fixture(scope="module")
def handed_over(bench, tmp_path_factory):
    """(our side, what it wrote)."""
    start = tmp_path_factory.mktemp("bench") / "start.npz"
    side = bench.Ours("dino", SMALL_DINO, str(start))
    return side, dict(np.load(start))


def test_our_side_trains(handed_over):
    side, _ = handed_over
    metrics = [side.step() for _ in range(3)]
    assert all(np.isfinite(float(m["train/loss"])) for m in metrics)
    norms = [float(m["optim/update_norm"]) for m in metrics]
    assert norms[0] == 0 < norms[2]  # the first has a rate of 0
    assert set(side.facts["terms"]) == {"dino_local", "dino_global", "koleo", "ibot"}


def test_the_weights_are_handed_over_by_the_original_names(handed_over):
    side, arrays = handed_over
    weights = {key: x for key, x in arrays.items() if key.startswith("weight.")}
    assert sum(x.size for x in weights.values()) == side.facts["parameters"]
    assert weights["weight.backbone.blocks.1.mlp.w12.weight"].shape == (2 * 88, 32)
    assert weights["weight.dino_head.last_layer.weight_v"].shape == (64, 16)


def test_crops_and_masks_are_handed_over_crop_by_crop(handed_over):
    side, arrays = handed_over
    batch = np.random.default_rng(0).integers(0, 256, (4, 2, 56, 56, 3), np.uint8)
    crop = arrays["global_crops"][4 + 1]  # the second crop of the second image
    expected = (batch[1, 1] / 255 - side.method.mean) / side.method.std
    np.testing.assert_allclose(crop, expected.transpose(2, 0, 1), atol=1e-5)
    assert arrays["local_crops"].shape == (8, 3, 28, 28)
    shape = json.loads(str(arrays["shape"]))
    assert 0 < arrays["masks"].sum() <= shape["hidden_rows"] < arrays["masks"].size


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "small", "term"),
    [("mae", SMALL_MAE, "reconstruction"), ("clip", SMALL_CLIP, "contrast")],
)
def test_both_sides_do_the_same_work(method, small, term):
    """The tool ends with an error where loss terms or numbers of parameters differ."""
    overrides = [f"--config.{key}" for key in small]
    done = run("--method", method, "--rounds", "2", "--steps", "1", "--json", *overrides)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    ours, torch = (result["loss_terms"][side][term] for side in ("ours", "torch"))
    assert ours == pytest.approx(torch, rel=1e-4) and ours > 0
    low, median, high = (result["ratio"][key] for key in ("low", "median", "high"))
    assert 0 < low <= median <= high
    assert result["overrides"] == small and result["images"] == 4


@pytest.mark.parametrize("flags", [(), ("--dinov2", "."), ("--dinov2", "nowhere")])
def test_without_the_original_it_says_in_one_line_how_to_get_it(flags):
    done = run(*flags)
    assert done.returncode == 2 and not done.stdout
    (line,) = done.stderr.splitlines()
    assert "git clone https://github.com/facebookresearch/dinov2" in line


def test_sides_that_differ_are_not_compared(bench):
    ours = {"parameters": 10, "terms": {"ibot": 1.0}}
    bench._same_work(ours, {"parameters": 10, "terms": {"ibot": 1.00005}})
    for other in ({"parameters": 11}, {"terms": {"ibot": 1.001}}, {"terms": {"ibot": np.nan}}):
        with pytest.raises(RuntimeError, match="parameters|ibot"):
            bench._same_work(ours, ours | other)
