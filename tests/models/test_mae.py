"""Random masking: counts and inverse."""

import numpy as np
import pytest

from webssl_jax.models import mae


def test_the_patches_with_the_least_noise_stay_in_the_order_of_their_noise():
    made = mae.random_mask(np.array([[0.9, 0.1, 0.5, 0.3, 0.7, 0.2]]), 3)
    assert made.keep.tolist() == [[1, 5, 3]]
    assert made.mask.tolist() == [[1, 0, 1, 0, 1, 0]]
    assert made.restore.tolist() == [[5, 0, 3, 2, 4, 1]]


def test_restore_undoes_the_shuffle():
    noise = np.random.default_rng(0).random((5, 36))
    made = mae.random_mask(noise, 9)
    shuffled = np.argsort(noise, axis=1)
    np.testing.assert_array_equal(
        np.take_along_axis(shuffled, np.asarray(made.restore), 1),
        np.broadcast_to(np.arange(36), (5, 36)),
    )
    assert made.mask.sum(axis=1).tolist() == [27] * 5


@pytest.mark.parametrize(
    ("patches", "ratio", "kept"), [(196, 0.75, 49), (256, 0.75, 64), (36, 0.75, 9), (25, 0.6, 10)]
)
def test_the_number_of_visible_patches_is_the_original_s(patches, ratio, kept):
    assert mae.visible_count(patches, ratio) == int(patches * (1 - ratio)) == kept


@pytest.mark.parametrize("ratio", [0.0, 1.0, 0.99])
def test_a_ratio_that_leaves_nothing_is_refused(ratio):
    with pytest.raises(ValueError, match="mask_ratio"):
        mae.visible_count(36, ratio)
