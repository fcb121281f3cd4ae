"""Whitening: unit covariance on the images it was fitted on, the same map for the others, and what
it is for."""

import numpy as np
import pytest

from webssl_jax.evaluators import features
from webssl_jax.evaluators.knn import knn


def skewed(n, d, seed=0):
    """Correlated columns of very different size around a large mean."""
    rng = np.random.default_rng(seed)
    scales = np.geomspace(1, 0.3, d)
    mix = np.linalg.qr(rng.normal(size=(d, d)))[0]
    return ((rng.normal(size=(n, d)) * scales) @ mix + 5).astype(np.float32)


def test_whitened_training_features_are_uncorrelated_and_of_equal_size(monkeypatch):
    monkeypatch.setattr(features, "SHRINKAGE", 0.0)
    x, _ = features.whiten(skewed(500, 12), skewed(3, 12, seed=1))
    np.testing.assert_allclose(x.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(x.T @ x / len(x), np.eye(12), atol=1e-4)


@pytest.mark.parametrize("n", [500, 6])
def test_queries_go_through_the_map_of_the_training_images(n):
    x = skewed(n, 12)
    train, queries = features.whiten(x, x[::-1].copy())
    np.testing.assert_allclose(queries, train[::-1], rtol=1e-5, atol=1e-5)
    assert train.shape == (n, min(n - (n == 6), 12))  # six centred rows span five directions


def test_equal_images_are_whitened_to_nothing():
    for n in (3, 20):
        train, queries = features.whiten(np.ones((n, 8), np.float32), np.ones((2, 8), np.float32))
        assert not train.any() and not queries.any()


def test_knn_sees_a_small_direction_once_it_is_whitened():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 600)
    x = rng.normal(size=(600, 8)).astype(np.float32) * 5  # says nothing
    x[:, 0] = (2 * labels - 1) + 0.3 * rng.normal(size=600)  # says all
    score = knn({"cls": x[:400]}, labels[:400], {"cls": x[400:]}, labels[400:], 2)
    assert score.chosen.startswith("cls_whitened")
    assert score.by_variant["cls/top1@20"] < 0.7 < 0.9 < score.top1
