"""Whitening: unit covariance on the images it was fitted on, the same map for the others, and what
it is for."""

import numpy as np
import pytest

from tests.evaluators.problems import problem_of
from webssl_jax.evaluators import sharded
from webssl_jax.evaluators.probes import knn


def skewed(n, d, seed=0):
    """Correlated columns of very different size around a large mean."""
    rng = np.random.default_rng(seed)
    scales = np.geomspace(1, 0.3, d)
    mix = np.linalg.qr(rng.normal(size=(d, d)))[0]
    return ((rng.normal(size=(n, d)) * scales) @ mix + 5).astype(np.float32)


def whiten(train, queries):
    """Both through the map of ``train``, which lies over eight devices."""
    n = len(train)
    with sharded.exact():
        bank = sharded.on_rows(train)
        white = sharded.whitening(bank, n)
        asked = sharded.apply_whitening(white, sharded.everywhere(queries))
        return np.asarray(sharded.apply_whitening(white, bank))[:n], np.asarray(asked)


def test_whitened_training_features_are_uncorrelated_and_of_equal_size(monkeypatch):
    monkeypatch.setattr(sharded, "SHRINKAGE", 0.0)
    x, _ = whiten(skewed(500, 12), skewed(3, 12, seed=1))  # 500 rows do not divide over 8 devices
    np.testing.assert_allclose(x.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(x.T @ x / len(x), np.eye(12), atol=1e-4)


def test_small_directions_are_blown_up_no_further_than_the_shrinkage_lets_them():
    x = skewed(500, 12)
    white, _ = whiten(x, x[:1])
    values = np.sort(np.linalg.eigvalsh(np.cov(x.T, bias=True)))
    wanted = values / (values + sharded.SHRINKAGE * values.mean())
    np.testing.assert_allclose(np.sort(white.var(axis=0)), np.sort(wanted), rtol=1e-3)


@pytest.mark.parametrize("n", [500, 6])
def test_queries_go_through_the_map_of_the_training_images(n):
    x = skewed(n, 12)
    train, queries = whiten(x, x[::-1].copy())
    np.testing.assert_allclose(queries, train[::-1], rtol=1e-5, atol=1e-5)
    assert train.shape == (n, min(n, 12))
    # six centred rows span five directions
    assert (np.abs(train).max(axis=0) > 1e-3).sum() == min(n - (n == 6), 12)


def test_equal_images_are_whitened_to_nothing():
    for n in (3, 20):
        train, queries = whiten(np.ones((n, 8), np.float32), np.ones((2, 8), np.float32))
        assert not train.any() and not queries.any()


def test_knn_sees_a_small_direction_once_it_is_whitened():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 600)
    x = rng.normal(size=(600, 8)).astype(np.float32) * 5  # says nothing
    x[:, 0] = (2 * labels - 1) + 0.3 * rng.normal(size=600)  # says all
    problem = problem_of(labels[:400], labels[400:], 2)
    found = knn.evaluate(problem, {"cls": x[:400]}, {"cls": x[400:]})
    assert found.chosen["top1"].startswith("cls_whitened")
    assert found.metrics["cls_top1_k20"] < 0.7 < 0.9 < found.metrics["top1"]
