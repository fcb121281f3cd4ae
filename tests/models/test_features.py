"""What somebody wants of an image is what he gets, and no more."""

import jax
import numpy as np
import pytest

from tests.models.test_cls_attention import DINO, IMAGES, init
from webssl_jax.models.features import Want, compute_features


@pytest.fixture(scope="module")
def compute():
    tree = init(DINO)
    return jax.jit(lambda want: compute_features(DINO, tree, IMAGES, want), static_argnums=0)


@pytest.fixture(scope="module")
def everything(compute):
    return compute(Want(blocks=(1, 2), registers=True))


def test_nothing_that_is_not_wanted_is_there(compute):
    found = compute(Want(cls=False, patches="none", blocks=(1,)))
    assert found.cls is found.patches is found.registers is found.diagnostics is None
    assert found.blocks == {1: (None, None)}


def test_means_are_those_of_the_grid(compute, everything):
    found = compute(Want(patches="mean", blocks=(1,)))
    assert everything.patches.shape == (2, 4, 6, 32) and found.patches.shape == (2, 32)
    wanted = everything.patches.mean(axis=(1, 2))
    np.testing.assert_allclose(found.patches, wanted, rtol=1e-5, atol=1e-6)
    cls, patches = found.blocks[1]
    np.testing.assert_allclose(cls, everything.blocks[1][0], rtol=1e-5, atol=1e-6)
    wanted = everything.blocks[1][1].mean(axis=(1, 2))
    np.testing.assert_allclose(patches, wanted, rtol=1e-5, atol=1e-6)


def test_blocks_count_from_the_last_too_and_the_last_is_what_leaves_the_network(
    compute, everything
):
    found = compute(Want(blocks=(-2, -1)))
    assert set(found.blocks) == {-2, -1}
    for theirs, ours in ((found.blocks[-2], everything.blocks[1]), (found.blocks[-1], found)):
        for a, b in zip(theirs, ours):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_a_word_or_a_block_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="patches = 'all' is not one of none, mean, grid"):
        Want(patches="all")
    with pytest.raises(ValueError, match="layer 3 was asked of a ViT with blocks 0 to 2"):
        compute_features(DINO, init(DINO), IMAGES, Want(blocks=(3,)))


def test_a_want_from_a_config_is_hashable():
    assert hash(Want(blocks=[1, 2])) == hash(Want(blocks=(1, 2)))


def test_blocks_without_the_final_norm_are_what_the_norm_makes_normed_blocks_of(
    compute, everything
):
    tree = init(DINO)
    raw = compute(Want(blocks=(1,), blocks_norm=False)).blocks[1]
    scale, bias = (np.asarray(tree["norm"][x]) for x in ("scale", "bias"))
    for x, normed in zip(raw, everything.blocks[1]):
        x = np.asarray(x)
        own = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + DINO.norm_eps)
        np.testing.assert_allclose(own * scale + bias, normed, rtol=1e-4, atol=1e-5)


def test_padded_images_are_zeros_around_the_normalised_ones():
    tree = init(DINO)
    cut = IMAGES[:, 1:-3, 3:-4]

    @jax.jit
    def compute(cut):
        whole = np.zeros(IMAGES.shape, np.float32)
        placed = jax.numpy.asarray(whole).at[:, 2:-2, 3:-4].set(cut)
        return [
            compute_features(DINO, tree, images, want).patches
            for images, want in ((cut, Want(pad=True)), (placed, Want()))
        ]

    np.testing.assert_array_equal(*compute(cut))
