"""Sheets and panels: right pixels in the right place, whatever the sizes, and files that are never
half written."""

import os

import numpy as np
import pytest
from PIL import Image

from webssl_jax.errors import UserError
from webssl_jax.visuals import crop_sheet, drawing, image_grid, panel, save_png


def flat(colour, height=48, width=48):
    return np.full((height, width, 3), colour, np.uint8)


def count(picture, colour):
    return int((picture == np.array(colour)).all(-1).sum())


def test_tiny_images_grow_by_a_whole_factor_without_new_colours():
    checks = (np.indices((48, 48)).sum(0) % 2 * 255).astype(np.uint8)[..., None].repeat(3, -1)
    picture = image_grid([checks], 1)
    assert count(picture, (255,) * 3) == count(picture, (0,) * 3) == 144 * 144 // 2
    assert picture.dtype == np.uint8 and picture.shape[2] == 3


def test_images_of_any_size_and_shape_fit_their_cells():
    images = [
        flat((255, 0, 0), 900, 300),
        flat((0, 255, 0), 20, 200),
        flat((0, 0, 255), 1, 1),
        flat((9, 9, 9), 64, 65),
    ]
    picture = image_grid(
        images, 2, captions=["tall", "wide", "dot " * 50, "ä ß 猫"], title="t" * 500
    )
    assert picture.shape[1] == 2 * 256 + drawing.GAP + 2 * drawing.MARGIN
    assert all(
        count(picture, colour) > 1000
        for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255), (9, 9, 9))
    )


def test_the_grid_is_filled_row_by_row():
    colours = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]
    picture = image_grid(np.stack([flat(c) for c in colours]), 2)
    corners = [np.argwhere((picture == np.array(c)).all(-1)).min(0) for c in colours]
    assert corners[0][0] == corners[1][0] < corners[2][0]
    assert corners[0][1] == corners[2][1] < corners[1][1]


def test_small_local_crops_stay_small_beside_large_ones():
    picture = crop_sheet(
        [flat((90, 90, 90), 300, 400)],
        {"global": flat((200, 0, 0), 224, 224)[None], "local": flat((0, 0, 200), 96, 96)[None]},
    )
    assert count(picture, (200, 0, 0)) == 224 * 224
    assert count(picture, (0, 0, 200)) == 96 * 96


def test_a_crop_sheet_takes_one_array_of_views():
    picture = crop_sheet([flat((90, 90, 90))] * 12, np.stack([flat((200, 0, 0))] * 12))
    assert count(picture, (200, 0, 0)) == 12 * 144 * 144


@pytest.mark.parametrize("n", [1, 4, 5, 8])
def test_every_reconstruction_has_its_four_pictures(n):
    colours = ((200, 0, 0), (0, 200, 0), (0, 0, 200), (150, 0, 150))
    picture = panel(*(np.stack([flat(c)] * n) for c in colours), title="step 3")
    assert all(count(picture, c) == n * 144 * 144 for c in colours)


def test_what_is_no_image_is_refused_with_its_shape():
    with pytest.raises(ValueError, match=r"float64"):
        image_grid([np.zeros((8, 8, 3))], 1)
    with pytest.raises(ValueError, match="2 captions for 1"):
        image_grid([flat(0)], 1, captions=["a", "b"])
    with pytest.raises(ValueError, match="nothing to draw"):
        image_grid([], 3)
    with pytest.raises(ValueError, match="crop"):
        crop_sheet([flat(0)], {"crop": []})


def test_long_captions_are_cut_to_their_cell():
    assert drawing.shorten("short", 200, 14) == "short"
    cut = drawing.shorten("a very long caption indeed " * 9, 120, 14)
    assert cut.endswith("...") and drawing.font(14).getlength(cut) <= 120


def test_a_png_is_whole_or_absent(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "p.png"
    picture = np.random.default_rng(0).integers(0, 255, (5, 7, 3), np.uint8)
    save_png(path, picture)
    np.testing.assert_array_equal(np.asarray(Image.open(path)), picture)

    def broken(self, file, format):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", broken)
    with pytest.raises(OSError, match="disk full"):
        save_png(path, picture * 0)
    assert os.listdir(path.parent) == ["p.png"]
    np.testing.assert_array_equal(np.asarray(Image.open(path)), picture)
    with pytest.raises(ValueError, match=r"\(5, 7\)"):
        save_png(path, picture[..., 0])
    with pytest.raises(UserError, match="deep: is a folder; name the PNG file"):
        save_png(path.parent, picture)
