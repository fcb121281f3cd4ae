"""Attention maps: the mass mask is the smallest, maps stand on their patches, pages stay
readable."""

import numpy as np
import pytest

from webssl_jax.visuals import attention, drawing


def test_the_mask_is_the_fewest_patches_that_hold_the_mass():
    weights = np.array([[0.1, 0.3], [0.2, 0.4]]) * 0.5  # whatever the patches get together
    assert attention.mass_mask(weights, 0.6).tolist() == [[False, True], [False, True]]
    assert attention.mass_mask(weights, 0.7).tolist() == [[False, True], [False, True]]
    assert attention.mass_mask(weights, 0.71).tolist() == [[False, True], [True, True]]
    assert attention.mass_mask(weights, 1.0).all()


def test_even_weights_give_a_mask_of_that_share():
    assert attention.mass_mask(np.full((10, 10), 1e-3, np.float32), 0.6).sum() == 60


def test_heat_is_brightest_on_the_largest_patch_and_black_on_nothing():
    weights = np.zeros((2, 3))
    weights[1, 2] = 0.01
    heat = attention.heat(weights, 20, 30).astype(int).sum(-1)
    assert (heat[10:, 20:] == heat.max()).all() and heat.max() > 600
    assert (heat[:10] < 10).all() and (heat[:, :20] < 10).all()


def test_patches_are_enlarged_to_flat_rectangles_also_where_they_do_not_divide():
    tokens = np.arange(6).reshape(2, 3)
    assert (drawing.enlarge(tokens, 4, 6) == tokens.repeat(2, 0).repeat(2, 1)).all()
    odd = drawing.enlarge(tokens, 5, 7)
    assert odd.shape == (5, 7) and set(odd.ravel()) == set(range(6))


def test_an_overlay_keeps_what_is_inside_and_dims_the_rest():
    image = np.full((8, 8, 3), (200, 100, 0), np.uint8)
    out = attention.overlay(image, np.array([[True, False]]))
    assert (out[:, :4] == (200, 100, 0)).all()
    assert (out[:, 4:] == 22).all()


@pytest.mark.parametrize(
    "images, heads, columns, rows",
    ((1, 3, 5, 2), (8, 4, 12, 8), (8, 12, 10, 12), (8, 32, 10, 8), (3, 1, 6, 4)),
)
def test_any_number_of_heads_makes_a_page(images, heads, columns, rows):
    maps = np.random.default_rng(0).random((images, heads, 6, 6)) / 36
    sheet = attention.attention_sheet(np.full((images, 48, 48, 3), 99, np.uint8), maps)
    cell = 144
    assert (sheet.shape[1] - 2 * drawing.MARGIN + drawing.GAP) // (cell + drawing.GAP) == columns
    assert rows * cell < sheet.shape[0] < rows * (cell + 30) + 120


def test_images_and_maps_must_be_as_many():
    with pytest.raises(ValueError, match="1 images with attention maps of 2"):
        attention.attention_sheet(np.zeros((1, 8, 8, 3), np.uint8), np.zeros((2, 1, 2, 2)))
