"""Images and the values of their pixels stay together through every augmentation, and what is told
of data sets and schedules is what they are."""

import colorsys
import hashlib

import jax
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from tests.evaluators.scenes import COLOURS, METRES, class_file, record, scene
from webssl_jax.config import UserError
from webssl_jax.data import annotations, records
from webssl_jax.data.decode import DecodeError
from webssl_jax.data.dense_views import (
    DepthView,
    SegmentationView,
    box,
    distort,
    resize,
    saturate,
    size_for,
)
from webssl_jax.evaluators.dense import recipes
from webssl_jax.evaluators.dense.classes import TABLES, class_table, palette


def nearest_colour(image):
    gaps = np.abs(image[:, :, None].astype(int) - COLOURS).sum(axis=-1)
    return gaps.argmin(axis=-1)


def test_images_are_resized_as_opencv_and_torch_do_without_smoothing():
    pixels = np.random.default_rng(0).integers(0, 256, (37, 50, 3), np.uint8)
    theirs = torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1)[None]
    for width, height in ((23, 17), (110, 61)):
        found = resize(Image.fromarray(pixels), width, height)
        expected = F.interpolate(theirs, (height, width), mode="bilinear")[0].permute(1, 2, 0)
        assert np.abs(found - expected.numpy()).max() < 0.501
        part = resize(Image.fromarray(pixels), width, height, (5, 3, 20, 15))
        np.testing.assert_array_equal(part, found[3:15, 5:20])
    assert size_for(Image.fromarray(pixels), 74) == (100, 74)
    assert size_for(Image.new("RGB", (683, 511)), 512) == (684, 512)


def test_a_mask_follows_its_image_through_the_segmentation_view(tmp_path):
    image, classes, _ = scene(3, height=64, width=96)
    one = records.decode(record(image, "a", mask=annotations.encode_mask(classes)))
    view = SegmentationView(class_table(class_file(tmp_path)), 64, 48, (0.5, 2.0), (9, 8, 7))
    rng = np.random.default_rng(0)
    smaller = agree = count = 0
    for _ in range(30):
        seen = view(one, rng)
        mask = seen["mask"]
        assert seen["image"].shape == (48, 48, 3) and mask.shape == (48, 48)
        filled = (seen["image"] == (9, 8, 7)).all(axis=-1)
        assert (mask[filled] == 255).all()
        smaller += filled.any()
        # away from the edges of blocks, and as bright as the classes differ in hue
        known = (mask != 255) & (mask > 0)
        hue = seen["image"].astype(int)
        agree += ((hue[..., 0] > hue[..., 2]) == (mask == 1))[known].sum()
        count += known.sum()
    assert smaller  # short sides from 32 on
    assert agree / count > 0.9


def test_a_crop_that_is_nearly_all_of_one_class_is_drawn_again(tmp_path):
    classes = np.zeros((64, 256), np.uint8)
    classes[:, 200:] = 1
    image = np.zeros((64, 256, 3), np.uint8)
    one = records.decode(record(image, "a", mask=annotations.encode_mask(classes)))
    table, rng = class_table(class_file(tmp_path)), np.random.default_rng(0)
    shares = {}
    for most in (0.75, 1.1):
        view = SegmentationView(table, 64, 64, (1.0, 1.0), (0, 0, 0), most)
        masks = [view(one, rng)["mask"] for _ in range(60)]
        shares[most] = np.mean([0.25 < (mask == 1).mean() < 0.75 for mask in masks])
    assert shares[0.75] > 0.8 and shares[1.1] < 0.7


def test_saturation_is_hsvs_and_a_distortion_keeps_grey_grey():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (4, 5, 3), np.uint8)
    for factor in (0.5, 1.5):
        found = saturate(pixels, factor)
        for own, theirs in zip(pixels.reshape(-1, 3), found.reshape(-1, 3)):
            h, s, v = colorsys.rgb_to_hsv(*own / 255)
            expected = np.array(colorsys.hsv_to_rgb(h, min(s * factor, 1), v)) * 255
            assert np.abs(theirs - expected).max() <= 0.51
    grey = np.full((8, 8, 3), 100, np.uint8)
    seen = np.stack([distort(grey, rng) for _ in range(50)]).astype(int)
    assert np.ptp(seen, axis=-1).max() == 0 and np.ptp(seen) > 50


def test_depth_follows_its_image_through_the_depth_view():
    image, classes, metres = scene(5, height=80, width=112)
    one = records.decode(record(image, "a", depth=annotations.encode_depth(metres)))
    view = DepthView((8, 72, 8, 104), (48, 64), 1000)
    rng = np.random.default_rng(0)
    agree = []
    for _ in range(20):
        seen = view(one, rng)
        assert seen["image"].shape == (48, 64, 3) and seen["depth"].dtype == np.float32
        known = seen["depth"] > 0
        expected = np.take(METRES, nearest_colour(seen["image"]))
        agree.append((np.abs(seen["depth"] - expected) < 0.01)[known].mean())
    assert np.median(agree) > 0.9  # a power of the grey levels may make ground of a ball
    # All of a resized image is what the test sees of it, turned or not.
    whole = DepthView(None, (40, 56), 1000, degrees=0, size=(40, 56))
    for _ in range(4):
        seen = whole(one, rng)
        expected = annotations.resize_mask(metres, 56, 40)
        assert any(np.allclose(seen["depth"], x, atol=1e-3) for x in (expected, expected[:, ::-1]))
    small = DepthView(None, (96, 64), 1000)
    with pytest.raises(records.RecordError, match="112 x 80 pixels are less than a crop"):
        small(one, rng)


def test_areas_are_boxes_or_the_middle_of_the_bottom():
    assert box((45, 472, 43, 608), 480, 640) == (45, 472, 43, 608)
    assert box((352, 1216), 375, 1242) == (23, 375, 13, 1229)
    for area in ((352, 1216), (45, 472, 43, 608)):
        with pytest.raises(DecodeError, match=r"600 x 351 pixels: too small for the area"):
            box(area, 351, 600)


def test_schedules_are_mmcvs():
    rate = jax.jit(recipes.poly(40_000, 1500, 1e-6))
    np.testing.assert_allclose(1e-3 * rate(1500), 9.625e-4, rtol=1e-6)
    np.testing.assert_allclose(rate(0), 1e-6, rtol=1e-3)
    np.testing.assert_allclose(rate(750), (1 - 750 / 40_000) * 0.5, rtol=1e-4)
    rate = jax.jit(recipes.cosine(38_400, 12_800, 1e-3))
    np.testing.assert_allclose(rate(12_800), 0.75, rtol=1e-5)  # it never gets to 1
    np.testing.assert_allclose(rate(0), 1e-3, rtol=1e-5)
    beta = jax.jit(recipes.one_cycle(38_400))
    found = [float(beta(step)) for step in (0, 11_519, 38_399, 11_519 // 2)]
    np.testing.assert_allclose(found, (0.95, 0.85, 0.95, 0.9), atol=1e-4)


def test_class_tables_are_those_of_the_data_sets():
    """Sums of the names, colours and numbers in masks that others have: mmsegmentation's ade.py and
    voc.py (its names agree with objectInfo150.txt of the data set), and labels.py of
    cityscapesscripts 2.3.0."""

    def sums(name):
        table, colours = TABLES[name], palette(TABLES[name])
        of = dict((i, number) for number, i in table.of)
        rows = [(x, of[i], *colours[i].tolist()) for i, x in enumerate(table.names)]
        return hashlib.sha256(repr(rows).encode()).hexdigest()[:16]

    assert {name: sums(name) for name in TABLES} == {
        "ade20k": "cdf8456ffbb86753",
        "voc2012": "f279af73863eb050",
        "cityscapes": "164c2b3c08f70a24",
    }
    names = {i: TABLES["ade20k"].names[i] for i in (0, 12, 79, 149)}
    assert names == {0: "wall", 12: "person", 79: "hovel", 149: "flag"}
    ade, voc, city = (TABLES[x].table for x in ("ade20k", "voc2012", "cityscapes"))
    assert ade[0] == ade[151] == 255 and ade[1] == 0 and ade[150] == 149
    assert voc[0] == 0 and voc[20] == 20 and voc[255] == 255
    assert list(city[[0, 7, 8, 9, 26, 33]]) == [255, 0, 1, 255, 13, 18]  # 13: car


def test_a_file_of_classes_that_is_none_is_one_line(tmp_path):
    with pytest.raises(UserError, match="neither ade20k, voc2012, cityscapes nor a file"):
        class_table("ade")
    (tmp_path / "twice.txt").write_text("a\nb\na\n")
    with pytest.raises(UserError, match="the class 'a' is there twice"):
        class_table(str(tmp_path / "twice.txt"))
