"""Classifiers on frozen features from shards to figures: k-NN and logistic regression of a model,
beside trivial features."""

import functools
import math
import re

import numpy as np
import pytest
from PIL import Image

from tests.evaluators.small_models import (
    BATCH,
    coloured,
    items_of,
    labelled_shard,
    shard,
    small_mae,
)
from webssl_jax.config import UserError
from webssl_jax.data import records
from webssl_jax.data.views import Preprocess
from webssl_jax.evaluators.datasets import Greyscale
from webssl_jax.evaluators.features import Cache
from webssl_jax.evaluators.outcome import Outcome
from webssl_jax.evaluators.probes import knn, splits, trivial
from webssl_jax.evaluators.probes.knn import KNN
from webssl_jax.evaluators.probes.labelled import LabelledOptions, LabelledPair
from webssl_jax.evaluators.probes.logistic import LogisticRegression

TRIVIAL = ("majority class", "raw pixels", "colour histogram")
_SIDE = 8


@pytest.fixture(autouse=True, scope="module")
def small_thumbnails():
    """Of 8 x 8 pixels, because decompositions of 768 x 768 numbers take their time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trivial, "raw_pixels", functools.partial(trivial.raw_pixels, size=_SIDE))
        patch.setattr(splits, "THUMBNAIL", _SIDE)
        yield


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """{"train": 90 labelled images of three classes, "test": 61}."""
    folder = tmp_path_factory.mktemp("shards")
    return {
        "train": labelled_shard(folder, "train", 90),
        "test": labelled_shard(folder, "test", 61, seed=1),
    }


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return Cache(tmp_path_factory.mktemp("cache"), BATCH, 2)


@pytest.fixture(scope="module")
def outcomes(shards, cache, small_thumbnails):
    """Of both kinds."""
    options = LogisticRegression.Options(**shards, last_blocks=2)
    probe = LogisticRegression(options).run(small_mae(), cache)
    return {"knn": KNN(KNN.Options(**shards)).run(small_mae(), cache), "probe": probe}


def seen(view, n, seed):
    """The images of ``labelled_shard`` through ``view``."""
    return np.stack([view(Image.fromarray(image)) for image in coloured(n, seed)[0]])


def test_the_metrics_are_numbers_under_their_documented_names(outcomes):
    found = outcomes["knn"].named("knn") | outcomes["probe"].named("probe")
    assert {
        "eval/knn/top1",
        "eval/knn/top1_se",
        "eval/knn/cls_top1_k20",
        "eval/knn/cls_whitened_top1_k20",
        "eval/knn/patches_top1_k10",
        "eval/probe/top1",
        "eval/probe/top1_se",
        "eval/probe/cls_x2_and_patches_top1",
        "eval/probe/patches_top1",
    } <= set(found)
    assert all(type(value) is float and math.isfinite(value) for value in found.values())
    assert all(re.fullmatch(r"[\w./-]+", name) for name in found)  # as TensorBoard wants them
    assert found["eval/probe/top1"] > 0.5  # the dominant colour survives random weights
    for one in outcomes.values():
        assert one.headline == ("top1",) and one.chance == {"top1": 1 / 3}
        assert one.items["top1"].shape == (61,)


def test_the_features_are_the_model_s_and_the_figures_those_of_its_classifier(
    outcomes, shards, cache
):
    """Both kinds again, from features that this test makes itself."""
    model, sets = small_mae(), []
    for n, seed in ((90, 0), (61, 1)):
        images, labels = coloured(n, seed)
        sets.append((model(images), np.unique(labels, return_inverse=True)[1]))
    pair = LabelledPair(LabelledOptions(**shards))
    stores = [cache.pooled(model, data, knn._WANT) for data in pair.datasets]
    problem = pair.problem(*stores, model.preprocess, cache)
    for labels, (_, wanted) in zip((problem.train_labels, problem.test_labels), sets):
        np.testing.assert_array_equal(labels, wanted)
    features = [{"cls": x.cls, "patches": x.patches.mean(axis=(1, 2))} for x, _ in sets]
    found = knn.evaluate(problem, *features)
    assert found.chosen == outcomes["knn"].chosen
    assert found.metrics == pytest.approx(outcomes["knn"].metrics)


def test_trivial_features_go_through_the_same_classifier(outcomes, shards, cache):
    counts = {name: coloured(90)[1].count(name) for name in set(coloured(90)[1])}
    common = max(counts, key=counts.get)
    truth = np.array(coloured(61, 1)[1])
    for one in outcomes.values():
        assert tuple(one.baselines) == TRIVIAL
        assert one.baselines["majority class"].metrics["top1"] == (truth == common).mean()
        assert one.baselines["majority class"].chosen == {"top1": f"always {common!r}"}
        assert {base.data for base in one.baselines.values()} == {one.data}  # paired with it
    view = small_mae().preprocess
    pixels = [{"raw pixels": trivial.raw_pixels(seen(view, *a))} for a in ((90, 0), (61, 1))]
    pair = LabelledPair(LabelledOptions(**shards))
    stores = [cache.pooled(small_mae(), data, knn._WANT) for data in pair.datasets]
    problem = pair.problem(*stores, view, cache)
    found, stored = knn.evaluate(problem, *pixels), outcomes["knn"].baselines["raw pixels"]
    assert found.metrics == stored.metrics and found.chosen == stored.chosen
    np.testing.assert_array_equal(found.items["top1"], stored.items["top1"])
    assert outcomes["probe"].baselines["raw pixels"].chosen["top1"].startswith("raw pixels, pen")


def test_figures_of_trivial_features_are_kept_and_those_of_other_images_are_not_believed(
    shards, cache, outcomes, tmp_path
):
    made = []

    def evaluate(problem, train, test):
        made.append(problem.data)
        return Outcome(("top1",), {"top1": 0.5}, {"top1": np.ones(3, np.float32)}, problem.data)

    def trivial_of(resize=36, rules="some", mean=(0.5,) * 3, **patterns):
        pair = LabelledPair(LabelledOptions(**shards | patterns))
        stores = [cache.pooled(small_mae(), data, knn._WANT) for data in pair.datasets]
        problem = pair.problem(*stores, Preprocess(32, resize, mean), cache)
        return pair.trivial_outcomes(problem, cache, rules, evaluate)

    for mean in (0.5, 0.4):  # which pixels know nothing of
        assert tuple(trivial_of(mean=(mean,) * 3)) == TRIVIAL
    assert len(made) == 2  # raw pixels and colours, once
    trivial_of(test=labelled_shard(tmp_path, "other", 61, seed=2))
    trivial_of(resize=32)
    trivial_of(rules="others")
    assert len(made) == 8


def test_labels_are_needed_and_are_refused_in_one_line_where_no_figure_can_come(tmp_path, cache):
    images, labels = coloured(24)
    whole = shard(tmp_path, "whole", items_of(images, labels))
    bare = shard(tmp_path, "bare", items_of(images))
    single = shard(tmp_path, "single", items_of(images, ["ant"] * 24))
    other = shard(tmp_path, "other", items_of(images, ["dog"] * 24))
    for train, test, says in (
        (whole, bare, "no labelled image"),
        (bare, whole, "no labelled image"),
        (single, whole, "at least 2 classes; all in 24 records .* are 'ant'"),
        (whole, other, "label 'dog' is none of the 3 known classes .ant, bee, cat, ..."),
    ):
        with pytest.raises(UserError, match=says) as caught:
            KNN(KNN.Options(train, test)).run(small_mae(), cache)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="nowhere"):
        KNN(KNN.Options(str(tmp_path / "nowhere-*.arrayrecord"), whole))


def test_unlabelled_images_among_labelled_ones_have_no_say(tmp_path, cache, shards, outcomes):
    images, labels = coloured(90)
    more = coloured(10, seed=9)[0]
    mixed = items_of(list(images) + list(more), labels + [None] * 10)
    train = shard(tmp_path, "mixed", mixed[:40] + mixed[90:] + mixed[40:90])
    pair = LabelledPair(LabelledOptions(train, shards["test"]))
    stores = [cache.pooled(small_mae(), data, knn._WANT) for data in pair.datasets]
    problem = pair.problem(*stores, small_mae().preprocess, cache)
    found = knn.evaluate(problem, *({x: s.array(x) for x in ("cls", "patches")} for s in stores))
    assert found.metrics == pytest.approx(outcomes["knn"].metrics)
    np.testing.assert_array_equal(found.items["top1"], outcomes["knn"].items["top1"])


def test_grey_rows_are_judged_by_greyscale_copies_and_by_nothing_else(shards, cache):
    """Of trivial features too; what cannot be decoded is left for the reader to count."""
    grey, plain = (
        LabelledPair(LabelledOptions(**shards, greyscale=wanted)) for wanted in (True, False)
    )
    view = small_mae().preprocess
    for data, colour, (n, seed) in zip(grey.datasets, plain.datasets, ((90, 0), (61, 1))):
        assert data.identity != colour.identity
        found = grey.thumbnails(data, view, cache)
        weights = np.array([0.299, 0.587, 0.114])  # ITU-R 601
        copies = np.rint(coloured(n, seed)[0] @ weights)[..., None].repeat(3, axis=3)
        copies = [view(Image.fromarray(x.astype(np.uint8))) for x in copies]
        gaps = found.array("raw pixels")[:] - trivial.raw_pixels(np.stack(copies))
        assert np.abs(gaps).max() < 2 / 127.5  # rounded once more
        assert found.labels == cache.pooled(small_mae(), colour, knn._WANT).labels
    broken = records.encode(records.Record(b"no image", (), "key", 1, 1, "test", "ant"))
    assert Greyscale([broken, b"no record"])[0] == broken
    assert Greyscale([broken, b"no record"])[1] == b"no record"


@pytest.mark.parametrize(
    "given, says",
    [
        ({"train": ""}, "train = '': give labelled shards"),
        ({"test": ""}, "test = '': give labelled shards"),
        ({"max_images": -1}, "max_images = -1 must be zero"),
        ({"last_blocks": 0}, "last_blocks = 0 must be at least 1"),
    ],
)
def test_options_that_cannot_be_are_refused(given, says):
    with pytest.raises(ValueError, match=says):
        LogisticRegression.Options(**{"train": "a", "test": "b", **given})


def test_the_probe_is_offered_the_last_blocks_of_a_network_of_any_depth():
    want = lambda depth, last: LogisticRegression.want(  # noqa: E731
        LogisticRegression.Options("a", "b", last_blocks=last), small_mae(depth=depth).networks
    )
    assert want(3, 2).blocks == (1, 2) and want(3, 1).blocks == (2,)
    assert want(3, 4).blocks == (0, 1, 2) and want(3, 4).patches == "mean"
