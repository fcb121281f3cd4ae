"""Sheets of images and texts: the right pairs are framed, the brightest cell is the largest cosine,
and whatever their number they make a picture."""

import numpy as np
import pytest

from webssl_jax.visuals import pairs
from webssl_jax.visuals.neighbours import OTHER, SAME

TEXTS = ["a cat", "a very long caption " * 20, ""]
IMAGES = [np.full((48, 48, 3), level, np.uint8) for level in (10, 120, 250)]


def pixels(picture, colour):
    return int((picture == np.array(colour)).all(-1).sum())


def test_right_pairs_have_frames_and_are_counted():
    cosines = np.array([[0.9, -0.001, 0.1], [0.2, 0.0, 0.3], [0.1, 0.4, 0.2]])
    sheet = pairs.similarity_sheet(IMAGES, TEXTS, cosines, np.eye(3, dtype=bool), "title")
    none = pairs.similarity_sheet(IMAGES, TEXTS, cosines, np.zeros((3, 3), bool), "title")
    one = pairs.similarity_sheet(IMAGES, TEXTS, cosines, np.eye(3, dtype=bool) * [1, 0, 0] > 0, "")
    framed = pixels(sheet, (255, 255, 255)) - pixels(none, (255, 255, 255))
    assert framed > 2.5 * (pixels(one, (255, 255, 255)) - pixels(none, (255, 255, 255))) > 1000
    top, bottom = (tuple(int(255 * x) for x in pairs._MAP(share)[:3]) for share in (1.0, 0.0))
    assert pixels(none, top) > 5000 and pixels(none, bottom) > 5000


@pytest.mark.parametrize("n", [1, 2, 64])
def test_any_number_of_pairs_and_a_collapsed_network_make_a_picture(n):
    flat, own = np.ones((n, n)), np.eye(n, dtype=bool)
    sheet = pairs.similarity_sheet(IMAGES[:1] * n, ["text"] * n, flat, own, "")
    assert sheet.dtype == np.uint8 and max(sheet.shape) < 3300
    found = [[("text", 0.5, True)] * 2] * n
    assert pairs.texts_sheet(IMAGES[:1] * n, found, [None] * n, "", "").ndim == 3
    assert pairs.images_sheet(["text"] * n, [[(IMAGES[0], 0.5, True)]] * n, "", "").ndim == 3


def test_what_is_fed_is_shown_and_a_text_that_is_cut_off_is_red():
    fed = [pairs.FedText(text, ("a", "cat") * 20, cut) for text, cut in zip(TEXTS, (0, 5, 0))]
    sheet = pairs.fed_sheet(IMAGES, IMAGES[:1] * 3, fed)
    assert pixels(sheet, OTHER) > 10 and pixels(sheet, (10, 10, 10)) > 3 * 96**2
    assert pixels(pairs.fed_sheet(IMAGES[:1], IMAGES[:1], fed[:1]), OTHER) == 0


def test_own_texts_are_green_and_the_missed_one_is_red():
    found = [[(text, 0.5, own) for text, own in zip(TEXTS, owns)] for owns in ([1, 0, 0], [0] * 3)]
    sheet = pairs.texts_sheet(IMAGES[:2], found, [None, ("missed", 0.1, 1234)], "", "")
    assert pixels(sheet, SAME) > 10 and pixels(sheet, OTHER) > 10
    hit = pairs.texts_sheet(IMAGES[:1], found[:1], [None], "", "")
    assert pixels(hit, SAME) > 10 and pixels(hit, OTHER) == 0


def test_own_images_have_a_green_frame():
    def frames(owns):
        found = [[(image, 0.5, own) for image, own in zip(IMAGES, owns)]]
        return pixels(pairs.images_sheet(TEXTS[:1], found, "", ""), SAME)

    assert frames([0, 0, 0]) == 0 and 2 * frames([0, 1, 0]) == frames([1, 0, 1]) > 1000
