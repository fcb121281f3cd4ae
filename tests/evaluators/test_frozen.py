"""Features to figures to report: padding, baselines, storage, statistics and words."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from webssl_jax.config import UserError
from webssl_jax.evaluators import (
    Dataset,
    FrozenFeatureEvaluation,
    Measurement,
    create,
    report_table,
)
from webssl_jax.evaluators import baselines as trivial
from webssl_jax.evaluators.base import Score, paired_difference, standard_error
from webssl_jax.evaluators.features import extract
from webssl_jax.methods.base import Features

CLASSES = ("ant", "bee", "cat")


def coloured(n, seed):
    """Images whose class is their dominant channel, but for some noise."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, n).astype(np.int32)
    images = rng.integers(0, 130, (n, 16, 16, 3))
    images[np.arange(n), :, :, labels] += rng.integers(0, 60, (n, 1, 1))
    return Dataset(images.astype(np.uint8), labels, CLASSES)


def make_features(calls=None, gain=1.0):
    @jax.jit
    def forward(images):
        x = images.astype(jnp.float32) / 255
        patches = x.reshape(len(x), 2, 8, 2, 8, 3).mean(axis=(2, 4))  # (B, 2, 2, 3)
        return patches.mean(axis=(1, 2)) * gain, patches * gain

    def features(images, layers=()):
        if calls is not None:
            calls.append(images.shape)
        cls, patches = forward(images)
        return Features(
            cls, patches, np.zeros((len(images), 0, 3)), {i: (cls * i, patches * i) for i in layers}
        )

    return features


@pytest.fixture(scope="module")
def evaluation():
    return FrozenFeatureEvaluation(coloured(180, 0), coloured(90, 1), batch=64, layers=(1, 2))


@pytest.fixture(scope="module")
def measured(evaluation):
    return evaluation.measure(make_features(), 300)


def test_every_batch_has_the_same_shape_and_padding_is_cut_off():
    data, calls = coloured(70, 0), []
    out = extract(make_features(calls), data.images, 32, (3,))
    assert set(calls) == {(32, 16, 16, 3)} and len(calls) == 3
    means = data.images.astype(np.float32).mean(axis=(1, 2)) / 255
    assert {name: x.shape for name, x in out.items()} == dict.fromkeys(
        ("cls", "patches", "cls@3", "patches@3"), (70, 3)
    )
    assert all(x.dtype == np.float32 for x in out.values())
    np.testing.assert_allclose(out["patches"], means, atol=1e-5)
    np.testing.assert_allclose(out["cls@3"], means * 3, atol=1e-5)


def test_blocks_that_the_feature_function_withholds_are_named():
    with pytest.raises(ValueError, match=r"not \[5\]"):
        extract(
            lambda images, layers: make_features()(images, (1,)), coloured(4, 0).images, 4, (1, 5)
        )


def test_trivial_features_describe_pixels_and_colours():
    images = np.zeros((2, 20, 24, 3), np.uint8)
    images[1] = (255, 0, 0)
    out = trivial.trivial_features(images)
    assert out["raw pixels"].shape == (2, 768) and out["colour histogram"].shape == (2, 216)
    assert out["raw pixels"][0].max() == -1 and out["raw pixels"][1, 0] == 1
    assert (
        out["colour histogram"][0].argmax() == 0 and out["colour histogram"][1].argmax() == 5 * 36
    )
    np.testing.assert_allclose((out["colour histogram"] ** 2).sum(axis=1), 1, rtol=1e-6)


def test_the_metrics_are_numbers_under_their_documented_names(evaluation, measured):
    metrics = measured.metrics()
    assert {
        "eval/knn/top1",
        "eval/knn/top1_se",
        "eval/linear/top1",
        "eval/linear/top1_se",
        "eval/knn/cls/top1_k20",
        "eval/knn/patches/top1_k10",
        "eval/linear/cls_x2_and_patches",
    } <= set(metrics)
    assert all(type(value) is float and math.isfinite(value) for value in metrics.values())
    assert dict(evaluation.run(make_features(), 300)) == metrics
    assert metrics["eval/linear/top1"] > 0.6


def test_baselines_go_through_the_same_evaluation_and_survive_storage(evaluation):
    rows = evaluation.baselines()
    assert list(rows) == ["majority class", "raw pixels", "colour histogram"]
    counts = np.bincount(evaluation.train.labels)
    assert rows["majority class"].knn.top1 == (evaluation.test.labels == counts.argmax()).mean()
    stored = json.loads(json.dumps({name: row.to_json() for name, row in rows.items()}))
    again = FrozenFeatureEvaluation(evaluation.train, evaluation.test)
    loaded = again.baselines(stored)
    assert {n: r.metrics() for n, r in loaded.items()} == {n: r.metrics() for n, r in rows.items()}
    np.testing.assert_array_equal(
        loaded["raw pixels"].linear.correct, rows["raw pixels"].linear.correct
    )


def test_stored_baselines_of_other_images_are_not_believed(evaluation):
    stored = {name: row.to_json() for name, row in evaluation.baselines().items()}
    other = FrozenFeatureEvaluation(coloured(60, 5), coloured(30, 6))
    assert len(other.baselines(stored)["raw pixels"].linear.correct) == 30


def test_standard_errors_follow_their_formulas():
    assert standard_error(0.3, 700) == pytest.approx(math.sqrt(0.3 * 0.7 / 700))
    rng = np.random.default_rng(0)
    a, b = rng.random(500) < 0.6, rng.random(500) < 0.5
    difference = paired_difference(a, b)
    per_item = a.astype(float) - b
    assert difference.value == pytest.approx(per_item.mean())
    assert difference.se == pytest.approx(per_item.std() / math.sqrt(500))
    assert paired_difference(a, a) == (0.0, 0.0) and not paired_difference(a, a).clear


def test_pairing_is_sharper_than_independence_and_refuses_other_items():
    hard = np.random.default_rng(0).random(400)
    a, b = hard < 0.5, hard < 0.46
    assert (
        paired_difference(a, b).se
        < math.hypot(standard_error(a.mean(), 400), standard_error(b.mean(), 400)) / 2
    )
    with pytest.raises(ValueError, match="not the same test items"):
        paired_difference(a, b[:-1])


def hits(right, n=400):
    return Score(np.arange(n) < right, "cls", {})


def row(right, step=None, data="d"):
    return Measurement(step, data, 1000, 3, hits(right), hits(right))


def test_the_report_says_what_beats_what():
    text = report_table(
        row(240, 817),
        {"majority class": row(130), "raw pixels": row(180), "colour histogram": row(238)},
        row(300, 0),
    )
    lines = text.splitlines()
    assert lines[0].split() == ["features", "k-NN", "top-1", "linear", "top-1"]
    assert "step 817 (this model)  0.600 ± 0.024  0.600 ± 0.024" in lines
    flat = " ".join(text.split())
    assert "Linear: clearly above raw pixels: +0.150 ± 0.018" in flat
    assert "Linear: not clearly different from colour histogram: +0.005 ± 0.004" in flat
    assert "k-NN: clearly below step 0 (untrained): -0.150 ± 0.018" in flat
    assert "400 test images" in flat and "paired image by image" in flat
    assert max(map(len, lines)) <= 100


def test_measurements_of_other_images_are_compared_without_pairing():
    table = report_table(row(240, 5), {"raw pixels": row(180)}, row(236, 0, data="other"))
    text = " ".join(table.split())
    assert "nothing is paired" in text
    assert f"+0.010 ± {math.hypot(standard_error(0.6, 400), standard_error(0.59, 400)):.3f}" in text


def test_images_without_labels_and_unknown_evaluators_are_refused_in_one_line():
    data = coloured(10, 0)
    empty = Dataset(data.images[:0], data.labels[:0], CLASSES)
    with pytest.raises(UserError, match="the test split has none"):
        FrozenFeatureEvaluation(data, empty)
    with pytest.raises(UserError, match="did you mean 'frozen'"):
        create("frosen", {}, data, data)
    with pytest.raises(UserError, match="at least two classes"):
        FrozenFeatureEvaluation(data._replace(labels=data.labels * 0), data)
