"""What an evaluation costs on a slice that is not here: real compilations, of a micro encoder."""

import json
import math

import pytest
from ml_collections import ConfigDict

from webssl_jax import config as configs
from webssl_jax import methods, model
from webssl_jax import params as paths
from webssl_jax.models.features import Want
from webssl_jax.plan import command, evaluation
from webssl_jax.plan.evaluation import Size
from webssl_jax.sharding import mesh as meshes
from webssl_jax.sharding import slices
from webssl_jax.weights.networks import Networks, template_of

SPEC = "configs/web_dino.py:size=tiny"
MICRO = ["model.size=micro", "model.depth=1"]
ARGV = ["--config", SPEC, *(f"--config.{x}" for x in MICRO), "--slice", "v5e-4", "--json"]
ARGV += ["--evals", "configs/evals/corpus.py", "--eval", "knn"]
DATA = {"train": "corpus:train", "test": "corpus:test"}


def run(capsys, *argv):
    code = command.main([*ARGV, *argv])
    return code, json.loads(capsys.readouterr().out)


def networks(*overrides):
    return Networks.of(methods.create(configs.load(SPEC, [*MICRO, *overrides])))


@pytest.fixture(scope="module")
def on_four():
    devices = slices.find("v5e-4").devices(1)
    return meshes.create(ConfigDict({"replica": 1, "fsdp": -1, "tensor": 1}), devices)


def test_the_figures_of_a_row_follow_from_those_of_its_programs(capsys):
    """A head on 16 images an update, eight a call of the network."""
    keys = ["--evals.lin.kind=linear", "--evals.lin.batch=16", "--evals.lin.iterations=9"]
    keys += [f"--evals.lin.{name}={value}" for name, value in DATA.items()]
    sizes = ["--images", "1001", "--test-images", "50", "--classes", "7", "--batch", "8"]
    code, r = run(capsys, *keys, *sizes, "--eval", "lin")
    assert code == 0 and r["fits"] is True
    assert (r["chips"], r["images"], r["test_images"], r["classes"]) == (4, 1001, 50, 7)
    assert r["parameters"] == paths.count(template_of(networks())["encoder"])
    train, update, test, judging = r["programs"]
    # 100 held-out images choose, so they are looked at besides the 50
    calls = [one["calls"] for one in r["programs"]]
    assert calls == [18, 9, math.ceil(150 / 8), math.ceil(150 / 8)]
    assert [one["images"] for one in r["programs"]] == [8, 0, 8, 0]
    assert train["shape"] == test["shape"] == [48, 48]
    assert train["model_flops"] == 8 * evaluation.forward_flops(networks(), (48, 48))
    seconds = sum(one["seconds"] for one in r["programs"])
    assert r["hours"] == pytest.approx(seconds / 3600) and seconds > 0
    assert r["images_per_s"] == pytest.approx(8 * (18 + 19) / seconds)
    one_call = train["seconds"] / 18
    expected = train["model_flops"] / one_call / (4 * 197e12)
    assert train["mfu_with_exposed_ici"] == pytest.approx(expected)
    # two copies of 16 rates x 4 kinds of features (D or 2 D wide), their biases and momenta are
    # below 64 KiB each, so whole on every device, and lie there while images are looked at
    width = networks().encoder.width
    numbers = 2 * 2 * 16 * (width + 2 * width + 1 + 1) * 7  # one block: cls, cls+patches
    assert train["beside_gib"] * 2**30 == pytest.approx(4 * numbers + 4, abs=1)
    assert max(one["peak_hbm_gib"] for one in r["programs"]) == r["peak_hbm_gib"]
    assert 0 < r["peak_hbm_gib"] < r["hbm_gib"] == 15.75
    text = evaluation.table(r)
    for word in ("yes, 0.00 of 15.75 GiB", "18 calls of 8 images of 48 x 48", "left out"):
        assert word in text


def test_forward_flops_of_b_32_are_known():
    """By hand: 50 tokens x 12 blocks x 12 D^2 weights, two operations each; the rest is attention
    and the patches."""
    method = methods.create(configs.load("configs/clip.py:size=b32"))
    flops, by_weights = (
        evaluation.forward_flops(Networks.of(method), (224, 224)),
        2 * 12 * 12 * 50 * 768**2,
    )
    assert by_weights < flops == pytest.approx(by_weights, rel=0.05)


def test_what_does_not_fit_is_said_with_the_compilers_own_figures(capsys):
    code, r = run(capsys, "--batch", str(2**23))
    assert code == command.EXIT_DOES_NOT_FIT and r["fits"] is False
    assert r["peak_hbm_gib"] > r["hbm_gib"] == 15.75
    assert r["hours"] is r["images_per_s"] is None and "15.75G" in r["programs"][0]["error"]
    text = evaluation.table(r)
    assert f"NO: needs {r['peak_hbm_gib']:.2f} of 15.75 GiB a device" in text
    assert "hours" not in text


def test_the_row_says_which_features(on_four):
    tiny = evaluation.abstract_model(Networks.of(methods.create(configs.load(SPEC))), on_four)
    rows = {"probe": {"kind": "logistic", **DATA, "last_blocks": 2}, "knn": {"kind": "knn", **DATA}}
    assert tiny.encoder.depth == 6
    wanted = {name: evaluation.programs_of(rows, name, tiny, Size(1000, 0, 10, 8)) for name in rows}
    of = {name: [one.function for one in made] for name, made in wanted.items()}
    assert of["knn"] == [model.feature_program(on_four, Want(patches="mean"))]
    assert of["probe"] == [model.feature_program(on_four, Want(patches="mean", blocks=(4, 5)))]


def test_calls_of_the_network_are_counted_as_the_protocols_say(on_four):
    small = evaluation.abstract_model(networks(), on_four)

    def seen(**row):
        rows = {"a": {**DATA, **row}}
        made = evaluation.programs_of(rows, "a", small, Size(1000, 100, 10, 8))
        return {one.name: (one.calls, one.images, one.shape) for one in made if one.images}

    assert seen(kind="linear", batch=16, augment=False, iterations=9) == {
        "training images": (125, 8, (48, 48)),  # once, whatever the updates
        "test images": (13, 8, (48, 48)),  # of held-out images features are there
    }
    assert seen(kind="attentive", batch=16, augment=False) == {
        "training images": (125, 8, (48, 48)),
        "test images": (13, 8, (48, 48)),
    }
    assert seen(kind="mae_linear", batch=16, epochs=3) == {
        "training images": (3 * 62 * 2, 8, (48, 48)),  # 1000 // 16 updates an epoch
        "test images": (13, 8, (48, 48)),  # one head: nothing is chosen
    }
    assert seen(kind="segmentation", batch=4, size=30, steps=9) == {
        "training images": (9, 4, (30, 30)),
        "test views": (50, 4, (30, 30)),  # 30 x 40: two windows, 20 apart
    }
    # 60 x 80, 79 x 105, 103 x 137, 136 x 181, 180 x 240, windows 30 apart, each also flipped
    assert seen(kind="segmentation", batch=4, size=60, steps=9, multiscale=True) == {
        "training images": (9, 4, (60, 60)),
        "test views": (2 * 100 * (2 + 6 + 12 + 24 + 35) // 4, 4, (60, 60)),
    }
    assert seen(kind="depth", batch=4, size=(48, 64), steps=101) == {
        "training images": (101, 4, (42, 54)),
        "test views": (50, 4, (48, 64)),
    }
    assert seen(kind="knn_segmentation", batch=4, size=47, memory=100) == {
        "training images": (250, 4, (48, 48)),
        "test images": (25, 4, (48, 48)),
    }


def test_a_row_that_cannot_be_planned_is_one_line(on_four):
    def plan(rows, name):
        model = evaluation.abstract_model(networks(), on_four)
        return evaluation.programs_of(rows, name, model, evaluation.IMAGENET)

    rows = {"captions": {"kind": "retrieval", "pairs": "corpus:test"}}
    with pytest.raises(configs.UserError, match="--eval captions: a row of this kind asks for no"):
        plan(rows, "captions")
    with pytest.raises(configs.UserError, match="--eval caption: no such row; .*'captions'"):
        plan(rows, "caption")
    with pytest.raises(configs.UserError, match="--eval knn: no such row; the config has no rows"):
        plan({}, "knn")
    for kind in ("segmentation", "depth", "linear"):
        with pytest.raises(configs.UserError, match="batch = 6: does not divide over 4 devices"):
            plan({"a": {"kind": kind, **DATA, "batch": 6}}, "a")


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--batch", "10"], "--batch 10: does not divide over 4 devices"),
        (["--batch", "0"], "--batch 0: does not divide over 4 devices"),
        (["--images", "0"], "--images 0: must be at least 1"),
        (["--test-images", "-1"], "--test-images -1: must be at least 0"),
        (["--slices", "0"], "--slices 0: must be at least 1"),
        (["--search"], "--search: goes with the train step, not with --eval"),
        (["--save", "step"], "--save: goes with the train step, not with --eval"),
        (["--option", "a=1"], "--option: goes with the train step, not with --eval"),
        (["--eval", ""], "--evals configs/evals/corpus.py: say which of its rows: --eval ROW"),
        (
            ["--eval", "", "--evals", "", "--evals.a.k=1"],
            "--evals.a.k=1: say which of its rows: --eval ROW",
        ),
    ],
    ids=str,
)
def test_bad_input_is_one_line_before_anything_compiles(flags, says):
    with pytest.raises(configs.UserError) as caught:
        command.main([*ARGV, *flags])
    assert str(caught.value) == says
