"""From rows to outcomes on disk: what is done again and what is not, a new kind of evaluation in
one file and one row, and what is said of rows that cannot be."""

import dataclasses
import pathlib
import sys

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from tests.evaluators import toy
from tests.evaluators.small_models import (
    BATCH,
    broken,
    changed,
    labelled_shard,
    small_clip,
    small_mae,
)
from webssl_jax.config import ConfigError, TransientError, UserError
from webssl_jax.data.views import Preprocess
from webssl_jax.evaluators import features, outcome, suite, tables
from webssl_jax.evaluators.suite import Suite
from webssl_jax.model import Model
from webssl_jax.sharding import distributed


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """24 images of three classes, each with its own caption."""
    return labelled_shard(tmp_path_factory.mktemp("shards"), "own", 24)


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """The toy evaluation, in a module that nothing here knows; one entry for each of its runs."""
    source = pathlib.Path(toy.__file__).read_text()
    (tmp_path / "my_module.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    yield lambda: sys.modules["my_module"].Toy.ran
    sys.modules.pop("my_module", None)


def toy_row(shards, **more):
    return {"grey": {"kind": "my_module:Toy", "test": shards, **more}}


def made(rows, folder, **more):
    return Suite(rows, folder / ".cache", BATCH, 2, **more)


def test_an_evaluation_is_added_by_one_file_and_one_row(shards, runs, tmp_path):
    model = small_mae()
    found = made(toy_row(shards, scale=2.0), tmp_path).run(model, tmp_path / "eval", 7)
    (one,) = found.values()
    assert one.items["length"].shape == (24,)
    assert suite.metrics(found) == {
        "eval/grey/length": one.metrics["length"],
        "eval/grey/length_se": one.metrics["length_se"],
    }
    kept = outcome.read_rows(tmp_path / "eval")["grey"]
    np.testing.assert_array_equal(kept.items["length"], one.items["length"])
    assert (tmp_path / "eval/grey/00000007.lengths.png").exists()
    assert "toy: the length of CLS." in tables.report({"a": found, "b": found})
    assert list((tmp_path / ".cache").iterdir()) == []  # what no one needs any more


def test_processes_compare_rows_and_the_records_that_they_evaluate_before_they_begin(
    shards, runs, tmp_path, monkeypatch
):
    def compare(settings):
        assert runs() == []
        raise UserError(f"compared: {settings}")

    monkeypatch.setattr(distributed, "check_same", compare)
    rows = made(toy_row(shards), tmp_path)
    says = "compared: {'the row grey': '{.*own-.*}', 'what the evaluation grey finds': '[^']+'}"
    with pytest.raises(UserError, match=says):
        rows.run(small_mae(), tmp_path / "eval", 7)


def test_what_was_done_is_not_done_again(shards, runs, tmp_path):
    rows = toy_row(shards, blocks=(0, 2))
    first = made(rows, tmp_path).run(small_mae(), tmp_path / "eval", 7)
    listed = toy_row(shards, blocks=[0, 2], every_steps=5)  # as a run's JSON has them
    again = made(listed, tmp_path).run(small_mae(), tmp_path / "eval", 7)
    assert len(runs()) == 1
    assert again["grey"].metrics == first["grey"].metrics
    made(rows, tmp_path).run(small_mae(1), tmp_path / "eval", 7)  # the same on one device
    assert len(runs()) == 1
    made(rows, tmp_path).run(small_mae(), tmp_path / "eval", 8)
    made(rows, tmp_path).run(small_mae(), tmp_path / "elsewhere", 7)
    assert len(runs()) == 3


@pytest.mark.parametrize("what", ["weights", "options", "data", "preprocessing", "rules"])
def test_other_weights_options_data_views_and_rules_make_it_anew(
    shards, runs, tmp_path, what, monkeypatch, caplog
):
    """And it is said that the figures of before are replaced."""
    model, rows = small_mae(), toy_row(shards)
    before = made(rows, tmp_path).run(model, tmp_path / "eval", 7)
    if what == "weights":
        model = changed(model, "encoder/cls_token")
    elif what == "options":
        rows = toy_row(shards, scale=2.0)
    elif what == "data":
        rows = toy_row(labelled_shard(tmp_path, "own", 24, seed=5))
    elif what == "rules":
        monkeypatch.setattr(sys.modules["my_module"], "PROTOCOL", 2)
    else:
        networks = dataclasses.replace(model.networks, preprocess=Preprocess(32, 40))
        model = Model(networks, model.params)
    assert not caplog.messages
    after = made(rows, tmp_path).run(model, tmp_path / "eval", 7)
    assert len(runs()) == 2
    (warned,) = caplog.messages
    assert "grey/00000007.json is of other" in warned
    if what != "rules":
        assert after["grey"].metrics != before["grey"].metrics
    kept = outcome.read_rows(tmp_path / "eval")["grey"]
    assert kept.metrics == after["grey"].metrics


def test_what_was_interrupted_goes_on_from_the_features_that_are_there(
    shards, runs, tmp_path, monkeypatch
):
    calls, plain = [], Model.features
    monkeypatch.setattr(Model, "features", lambda self, *a: calls.append(1) or plain(self, *a))
    rows = toy_row(shards) | {"later": toy_row(shards)["grey"] | {"blocks": (1,)}}
    killed = made(rows, tmp_path)

    def kill(*_):
        raise KeyboardInterrupt

    killed._made["later"].run = kill
    with pytest.raises(KeyboardInterrupt):
        killed.run(small_mae(), tmp_path / "eval", 7)
    assert len(calls) == 3  # 24 images in batches of 8, for both rows together
    assert list(outcome.read_rows(tmp_path / "eval")) == ["grey"]
    found = made(rows, tmp_path).run(small_mae(), tmp_path / "eval", 7)
    assert list(found) == ["grey", "later"] and len(calls) == 3
    assert len(runs()) == 2


def test_a_row_is_due_at_the_ends_and_by_its_cadence(shards, runs, tmp_path):
    rows = toy_row(shards, every_steps=5) | {"rare": toy_row(shards)["grey"]}
    suite_ = made(rows, tmp_path)
    assert suite_.due(0) == suite_.due(7, last=True) == ["grey", "rare"]
    assert suite_.due(10) == ["grey"] and suite_.due(7) == []
    assert suite_.run(small_mae(), tmp_path / "eval", 7, suite_.due(7)) == {}
    assert list(suite_.run(small_mae(), tmp_path / "eval", 5, ["grey"])) == ["grey"]
    assert made({}, tmp_path).run(small_mae(), tmp_path / "eval") == {}


def test_words_alone_need_no_training_images_and_both_kinds_stand_in_one_table(shards, tmp_path):
    rows = {
        "words": {"kind": "zero_shot", "test": shards, "templates": "short"},
        "pairs": {"kind": "retrieval", "pairs": shards, "max_images": 10},
    }
    found = made(ConfigDict(rows), tmp_path).run(small_clip(), tmp_path / "eval", 7)
    figures = suite.metrics(found)
    wanted = [f"pairs/{way}_r{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)]
    wanted += ["words/top1", "words/top5"]
    assert set(figures) == {f"eval/{name}{end}" for name in wanted for end in ("", "_se")}
    assert figures["eval/pairs/text_to_image_r10"] == 1  # there are ten
    assert figures["eval/words/top5"] == 1  # there are three
    text = " ".join(tables.report({"it": found}).split())
    for words in ("of 3 classes", "10 images", "7 templates", "chance"):
        assert words in text
    assert "pairs image to text r10 1.000" in tables.line(found)


def test_networks_without_what_a_row_needs_are_refused_by_the_row_s_name(runs):
    texts, clip = {"kind": "retrieval", "pairs": "x"}, small_clip().networks
    foreign = dataclasses.replace(clip, text=dataclasses.replace(clip.text, vocabulary=64))
    for networks in (small_mae().networks, foreign):
        says = r"config.evals.words: MAE has no text tower .*; leave this row \(retrieval\) out"
        with pytest.raises(ConfigError, match=says):
            suite.check_needs({"words": texts}, networks, "MAE")
    suite.check_needs({"words": texts}, clip, "CLIP")
    for networks in (clip, small_mae().networks):
        suite.check_needs(toy_row("x"), networks, "it")
    heads = dataclasses.replace(clip, encoder=None, text=None)
    with pytest.raises(ConfigError, match="config.evals.grey: it has no image encoder"):
        suite.check_needs(toy_row("x"), heads, "it")


@pytest.mark.parametrize(
    "row, says",
    [
        ({}, r"config.evals.a: has no kind; known: alignment, attentive, depth, "),
        ({"kind": "kn"}, r"config.evals.a.kind = 'kn': did you mean 'knn'\? .*; or module:class"),
        ({"kind": "nowhere:Toy"}, "config.evals.a.kind = 'nowhere:Toy': cannot be imported"),
        ({"kind": "json:Toy"}, "config.evals.a.kind = 'json:Toy': cannot be imported .*Toy"),
        (
            {"kind": "knn", "tain": "x"},
            r"config.evals.a.tain: a row of kind 'knn' has no such key; did you mean 'train'",
        ),
        ({"kind": "knn", "train": 3}, "config.evals.a: options: train = 3 must be a word"),
        ({"kind": "knn", "train": "x"}, "config.evals.a: options: test = '': give labelled shards"),
        ({"kind": "knn", "train": "x", "test": "y", "max_images": -1}, "max_images = -1 must be"),
        ({"kind": "retrieval"}, "pairs = '': give captioned shards"),
        ({"kind": "linear", "train": "x", "test": "y", "rates": "all"}, "rates = 'all' is not one"),
        ({"kind": "linear", "train": "x", "test": "y", "held_out": 0.0}, "held_out = 0.0 must be"),
        ({"kind": "attentive", "train": "x", "test": "y", "c": "z"}, "{corruption}-{level}"),
        ({"kind": "mae_linear", "train": "x", "test": "y", "epochs": 0}, "epochs = 0 must be"),
        ({"kind": "knn", "train": "x", "test": "y", "shots": (0,)}, "tries and shots must be"),
        (
            {"kind": "logistic", "train": "x", "test": "y", "protocol": "a"},
            "not one of own, dinov2",
        ),
        ({"kind": "retrieval", "pairs": "x", "max_images": -1}, "max_images = -1 must be zero"),
        ({"kind": "zero_shot"}, "test = '': give labelled shards"),
        ({"kind": "zero_shot", "test": "x", "templates": ""}, "templates = '': give a file, or"),
        (
            {"kind": "knn", "train": "x", "test": "y", "every_steps": -1},
            "config.evals.a.every_steps = -1: must be zero or positive",
        ),
        ({"kind": "my_module:Toy", "test": "x", "scale": 0.0}, "scale = 0.0 must be positive"),
        ({"kind": "my_module:Toy", "test": "x", "scal": 1.0}, "did you mean 'scale'"),
    ],
)
def test_a_row_that_cannot_be_is_one_line_before_anything_is_opened(runs, row, says):
    with pytest.raises(ConfigError, match=says) as caught:
        suite.check({"a": row})
    assert "\n" not in str(caught.value)


def test_a_row_s_name_must_go_into_a_path_and_a_key():
    row = {"kind": "knn", "train": "x", "test": "y"}
    with pytest.raises(ConfigError, match="config.evals.a/b: a row's name must be letters"):
        suite.check({"a/b": row})


def test_rows_are_completed_with_the_defaults_of_their_kind():
    rows = {"a": {"kind": "logistic", "train": "x", "test": "y"}}
    assert suite.complete(rows)["a"] == {
        "kind": "logistic",
        "every_steps": 0,
        "train": "x",
        "test": "y",
        "max_images": 0,
        "last_blocks": 4,
        "greyscale": False,
        "protocol": "own",
    }


def test_files_and_shards_that_are_not_there_are_one_line_before_a_model_is_needed(tmp_path):
    for row, says in (
        ({"kind": "zero_shot", "test": "/nowhere/*.arrayrecord"}, "/nowhere"),
        ({"kind": "zero_shot", "test": "x", "templates": "imagnet"}, "did you mean 'imagenet'"),
        ({"kind": "zero_shot", "test": "x", "class_names": "/nowhere"}, "no class names can be"),
        ({"kind": "retrieval", "pairs": "/nowhere/*.arrayrecord"}, "/nowhere"),
        ({"kind": "knn", "train": "/nowhere/*.arrayrecord", "test": "x"}, "/nowhere"),
    ):
        with pytest.raises(UserError, match=says) as caught:
            made({"a": row}, tmp_path)
        assert "\n" not in str(caught.value)


def test_a_network_that_diverged_is_one_line_and_leaves_no_outcome(shards, runs, tmp_path):
    with pytest.raises(UserError, match="NaN or infinity in the features .cls. of .*own-00000"):
        made(toy_row(shards), tmp_path).run(broken(small_mae()), tmp_path / "eval", 3)
    assert outcome.read_rows(tmp_path / "eval") == {}


@pytest.mark.parametrize(
    "error, kind, says",
    [
        (UserError("no use"), suite.RefusedRows, "no use"),
        (TransientError("not now"), suite.RowsForNow, "not now"),
        (ZeroDivisionError("a bug"), suite.FailedRows, "ZeroDivisionError: a bug"),
    ],
)
def test_a_row_that_fails_is_named_and_costs_no_other_row(
    shards, runs, tmp_path, error, kind, says
):
    model = small_mae()
    rows = {name: toy_row(shards)["grey"] for name in ("first", "second", "third")}
    failing = made(rows, tmp_path)

    def fail(model, cache):
        raise error

    works, failing._made["second"].run = failing._made["second"].run, fail
    with pytest.raises(kind, match=f"^second: {says}$") as caught:
        failing.run(model, tmp_path / "eval", 3)
    assert type(caught.value) is kind and list(caught.value.found) == ["first", "third"]
    table = tables.report({"m": caught.value.found}, {"m": {"second": says}})
    assert f"FAILED: m, second: {says}" in table
    failing._made["second"].run = works  # the others are not done again
    assert set(failing.run(model, tmp_path / "eval", 3)) == set(rows) and len(runs()) == 3


def test_features_that_cannot_be_had_fail_the_rows_that_want_them_alone(
    shards, runs, tmp_path, monkeypatch
):
    rows = {name: toy_row(shards)["grey"] for name in ("first", "second")}
    other = labelled_shard(tmp_path, "other", 8)
    rows["third"] = {"kind": "my_module:Toy", "test": other}
    failing, pooled = made(rows, tmp_path), features.Cache.pooled

    def fail(cache, model, dataset, want):
        if dataset.identity == failing._made["first"].datasets[0].identity:
            raise UserError("damaged")
        return pooled(cache, model, dataset, want)

    monkeypatch.setattr(features.Cache, "pooled", fail)
    with pytest.raises(UserError, match="^first: damaged; second: damaged$") as caught:
        failing.run(small_mae(), tmp_path / "eval", 3)
    assert list(caught.value.found) == ["third"]


def test_a_damaged_outcome_is_one_line(shards, runs, tmp_path):
    path = outcome.step_path(tmp_path / "eval" / "grey", 3)
    path.parent.mkdir(parents=True)
    path.write_text("{")
    with pytest.raises(UserError, match="00000003.json: cannot be read .*; remove it"):
        made(toy_row(shards), tmp_path).run(small_mae(), tmp_path / "eval", 3)


def test_a_folder_that_cannot_be_written_is_one_line(shards, runs, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/grey/00000003.json: cannot be read .Not"):
        made(toy_row(shards), tmp_path).run(small_mae(), tmp_path / "file", 3)
    (tmp_path / "eval/grey/00000003.npz").mkdir(parents=True)
    with pytest.raises(UserError, match="eval/grey/00000003.json: cannot be written .Is a dir"):
        made(toy_row(shards), tmp_path).run(small_mae(), tmp_path / "eval", 3)


def test_what_the_first_process_cannot_write_ends_the_others(shards, runs, tmp_path, monkeypatch):
    """As seen by the second of two processes, after all features are there."""
    suite_ = made(toy_row(shards), tmp_path)
    one = suite_.run(small_mae(), tmp_path / "before", 3)["grey"]
    suite_._made["grey"].run = lambda model, cache: one
    suite_._done = lambda path, known: None
    monkeypatch.setattr(suite_, "_extract", lambda model, names: {})
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(distributed, "check_same", lambda settings: None)
    monkeypatch.setattr(distributed, "gather", lambda flag: np.array([True, flag]))
    with pytest.raises(UserError, match="process 0 stopped"):
        suite_.run(small_mae(), tmp_path / "eval", 3)
    assert not (tmp_path / "eval").exists()
