"""What extracting features costs on a slice that is not here: real compilations, of a micro
encoder."""

import json
import math

import pytest

from webssl_jax import config as configs
from webssl_jax import methods
from webssl_jax import params as paths
from webssl_jax.models.features import Want
from webssl_jax.plan import command, extraction
from webssl_jax.weights.networks import Networks, template_of

SPEC = "configs/web_dino.py:size=tiny"
MICRO = ["model.size=micro", "model.depth=1"]
ARGV = ["--config", SPEC, *(f"--config.{x}" for x in MICRO), "--slice", "v5e-4", "--json"]
ARGV += ["--evals", "configs/evals/corpus.py", "--eval", "knn"]
DATA = {"train": "corpus:train", "test": "corpus:test"}


def run(capsys, *argv):
    code = command.main([*ARGV, *argv])
    return code, json.loads(capsys.readouterr().out)


def networks():
    return Networks.of(methods.create(configs.load(SPEC, MICRO)))


def test_the_figures_of_an_extraction_follow_from_one_another(capsys):
    code, r = run(capsys, "--images", "1001", "--batch", "8")
    assert code == 0 and r["fits"] is True and r["error"] is None
    assert r["want"] == {"cls": True, "patches": "mean", "blocks": []}
    assert (r["chips"], r["batch"], r["images"], r["pixels"]) == (4, 8, 1001, 48)
    assert r["parameters"] == paths.count(template_of(networks())["encoder"])
    assert r["model_flops"] == 8 * extraction.forward_flops(networks(), 48)
    seconds = 8 / r["images_per_s"]
    assert r["hours"] == pytest.approx(math.ceil(1001 / 8) * seconds / 3600)  # the last filled up
    assert r["mfu_with_exposed_ici"] == pytest.approx(r["model_flops"] / seconds / (4 * 197e12))
    assert 0 < r["peak_hbm_gib"] < r["hbm_gib"] == 15.75
    text = extraction.table(r)
    for word in ("yes, 0.00 of 15.75 GiB", "CLS, patches: mean", "1,001 images", "left out"):
        assert word in text


def test_forward_flops_of_b_32_are_known():
    """By hand: 50 tokens x 12 blocks x 12 D^2 weights, two operations each; the rest is attention
    and the patches."""
    method = methods.create(configs.load("configs/clip.py:size=b32"))
    flops, by_weights = (
        extraction.forward_flops(Networks.of(method), 224),
        2 * 12 * 12 * 50 * 768**2,
    )
    assert by_weights < flops == pytest.approx(by_weights, rel=0.05)


def test_what_does_not_fit_is_said_with_the_compilers_own_figures(capsys):
    code, r = run(capsys, "--batch", str(2**23))
    assert code == command.EXIT_DOES_NOT_FIT and r["fits"] is False
    assert r["peak_hbm_gib"] > r["hbm_gib"] == 15.75
    assert r["hours"] is r["images_per_s"] is None and "15.75G" in r["error"]
    text = extraction.table(r)
    assert f"NO: needs {r['peak_hbm_gib']:.2f} of 15.75 GiB a device" in text
    assert "hours" not in text


def test_the_row_says_which_features():
    rows = {"probe": {"kind": "logistic", **DATA, "last_blocks": 2}, "knn": {"kind": "knn", **DATA}}
    tiny = Networks.of(methods.create(configs.load(SPEC)))
    assert tiny.encoder.depth == 6
    assert extraction.want_of(rows, "knn", tiny) == Want(patches="mean")
    assert extraction.want_of(rows, "probe", tiny) == Want(patches="mean", blocks=(4, 5))


def test_a_row_that_is_not_there_or_has_no_features_is_one_line():
    rows = {"captions": {"kind": "retrieval", "pairs": "corpus:test"}}
    with pytest.raises(configs.UserError, match="--eval captions: a row of this kind asks for no"):
        extraction.want_of(rows, "captions", networks())
    with pytest.raises(configs.UserError, match="--eval caption: no such row; .*'captions'"):
        extraction.want_of(rows, "caption", networks())
    with pytest.raises(configs.UserError, match="--eval knn: no such row; the config has no rows"):
        extraction.want_of({}, "knn", networks())


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--batch", "10"], "--batch 10: does not divide over 4 devices"),
        (["--batch", "0"], "--batch 0: does not divide over 4 devices"),
        (["--images", "0"], "--images 0: must be at least 1"),
        (["--slices", "0"], "--slices 0: must be at least 1"),
        (["--search"], "--search: goes with the train step, not with --eval"),
        (["--save", "step"], "--save: goes with the train step, not with --eval"),
        (["--option", "a=1"], "--option: goes with the train step, not with --eval"),
        (["--eval", ""], "--evals configs/evals/corpus.py: say which of its rows: --eval ROW"),
    ],
    ids=str,
)
def test_bad_input_is_one_line_before_anything_compiles(flags, says):
    with pytest.raises(configs.UserError) as caught:
        command.main([*ARGV, *flags])
    assert str(caught.value) == says
