"""Trivial features: what a picture gives away before anything is learned."""

import numpy as np

from webssl_jax.evaluators.probes import trivial


def test_trivial_features_describe_pixels_and_colours():
    images = np.zeros((2, 20, 24, 3), np.uint8)
    images[1] = (255, 0, 0)
    out = trivial.trivial_features(images)
    assert out["raw pixels"].shape == (2, 768) and out["colour histogram"].shape == (2, 216)
    assert out["raw pixels"][0].max() == -1 and out["raw pixels"][1, 0] == 1
    peaks = out["colour histogram"].argmax(axis=1)
    assert peaks.tolist() == [0, 5 * 36]
    np.testing.assert_allclose((out["colour histogram"] ** 2).sum(axis=1), 1, rtol=1e-6)
