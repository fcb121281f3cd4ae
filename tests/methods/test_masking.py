"""The noise behind random masks does not depend on the batch around an example."""

import jax
import numpy as np

from webssl_jax.methods import masking
from webssl_jax.models import mae


def test_the_noise_of_an_example_depends_on_its_position_alone():
    rng = jax.random.key(3)
    whole = masking.per_example_noise(rng, np.arange(8), 36)
    part = masking.per_example_noise(rng, np.array([6, 2]), 36)
    np.testing.assert_array_equal(part, whole[np.array([6, 2])])
    assert len(np.unique(whole)) > 280  # and differs between examples


def test_every_patch_is_hidden_equally_often():
    noise = masking.per_example_noise(jax.random.key(0), np.arange(4000), 16)
    share = np.asarray(mae.random_mask(noise, 4).mask).mean(axis=0)
    np.testing.assert_allclose(share, 0.75, atol=0.03)  # standard error 0.007
