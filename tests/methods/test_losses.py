"""The reconstruction loss against its formula, written out again in float64 numpy."""

import numpy as np
import pytest

from webssl_jax import colours
from webssl_jax.methods import losses
from webssl_jax.models import pixels


def formula(prediction, patches, mask, normalise):
    total, hidden = 0.0, 0
    for b in range(mask.shape[0]):
        for n in range(mask.shape[1]):
            if mask[b, n]:
                target = patches[b, n].astype(np.float64)
                if normalise:
                    mean = target.sum() / target.size
                    variance = ((target - mean) ** 2).sum() / (target.size - 1)
                    target = (target - mean) / (variance + 1e-6) ** 0.5
                total += ((prediction[b, n] - target) ** 2).sum() / target.size
                hidden += 1
    return total / hidden


@pytest.mark.parametrize("normalise", [True, False])
def test_the_loss_is_the_mean_over_hidden_patches(normalise):
    rng = np.random.default_rng(0)
    prediction, patches = rng.standard_normal((2, 3, 5, 12), np.float32)
    mask = (rng.random((3, 5)) < 0.6).astype(np.float32)
    ours = losses.masked_pixel_loss(prediction, patches, mask, normalise)
    np.testing.assert_allclose(ours, formula(prediction, patches, mask, normalise), rtol=1e-6)


def test_a_constant_patch_gives_a_finite_loss():
    ones = np.ones((1, 2, 12), np.float32)
    assert losses.masked_pixel_loss(0 * ones, ones, np.ones((1, 2)), True) == 0.0


def test_visible_patches_do_not_count():
    rng = np.random.default_rng(0)
    prediction, patches = rng.standard_normal((2, 1, 2, 12), np.float32)
    mask = np.array([[1.0, 0.0]])
    before = losses.masked_pixel_loss(prediction, patches, mask, True)
    prediction[:, 1] = 1e3
    assert losses.masked_pixel_loss(prediction, patches, mask, True) == before


def test_normalising_is_undone_exactly():
    image = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    normal = pixels.normalise(image, colours.IMAGENET_MEAN, colours.IMAGENET_STD)
    np.testing.assert_allclose(
        normal[0, 0], -np.array(colours.IMAGENET_MEAN) / np.array(colours.IMAGENET_STD), rtol=1e-6
    )
    np.testing.assert_array_equal(
        pixels.denormalise(normal, colours.IMAGENET_MEAN, colours.IMAGENET_STD), image
    )
