"""Sheets of segmentations and depths show each in its colours, and name them."""

import numpy as np

from webssl_jax.evaluators.dense.classes import TABLES, palette
from webssl_jax.visuals import depths, drawing, masks

VOC = TABLES["voc2012"]
COLOURS = palette(VOC)


def has(picture, colour):
    return (picture == np.asarray(colour, np.uint8)).all(axis=-1).any()


def segmented(score="0.50", seed=0):
    truth = np.full((300, 400), 15, np.uint8)  # a person
    truth[:, :40] = 255
    predicted = np.full_like(truth, 12)  # a dog
    image = np.full((300, 400, 3), 200, np.uint8)
    return masks.small(image, truth, predicted, score)


def test_a_segmentation_is_shown_in_its_colours_small_and_with_what_is_not_judged():
    one = segmented()
    assert one.image.shape == (192, 256, 3) and one.truth.shape == (192, 256)
    sheet = masks.sheet([one] * 3, VOC.names, COLOURS, "The best")
    for colour in (COLOURS[15], COLOURS[12], masks.NO_CLASS, (200, 200, 200)):
        assert has(sheet, colour)
    assert not has(sheet, COLOURS[7])
    legend = masks.legend([(VOC.names[i], COLOURS[i]) for i in (12, 15)], sheet.shape[1])
    np.testing.assert_array_equal(sheet[-len(legend) :], legend)


def test_classes_that_do_not_occur_have_no_bar():
    iou = np.full(21, np.nan)
    iou[[3, 5]] = 0.7, 0.2
    picture = masks.bars(VOC.names, iou, COLOURS, 0.45, "of a test")
    assert picture.dtype == np.uint8 and has(picture, COLOURS[3]) and has(picture, COLOURS[5])
    assert not has(picture, COLOURS[4])


def test_depths_share_a_scale_and_errors_have_their_own():
    truth = np.tile(np.linspace(1, 9, 120, dtype=np.float32), (90, 1))
    truth[:20] = 0
    image = np.zeros((90, 120, 3), np.uint8)
    right = depths.small(image, truth, np.where(truth > 0, truth, 3).astype(np.float32), "0 m")
    sheet = depths.sheet([right], 10, "Depth")
    assert has(sheet, depths.UNKNOWN)
    columns = [drawing.MARGIN + i * (drawing.MAX_CELL + drawing.GAP) + 128 for i in range(4)]
    row = next(y for y in range(len(sheet)) if (sheet[y, columns[1]] == depths.UNKNOWN).all()) + 150
    np.testing.assert_array_equal(sheet[row, columns[1]], sheet[row, columns[2]])
    assert np.ptp(sheet[row, columns[3]].astype(int)) < 5  # no error: the middle, which is grey
