"""Views: the images of torchvision."""

import io
import json
import pathlib
import pickle

import numpy as np
import pytest
from PIL import Image

from tests.data.image_shards import encode_image, smooth_image
from webssl_jax.data import views
from webssl_jax.data.decode import DecodeError, open_image, ratio_of
from webssl_jax.data.views import Preprocess, RandomResizedCropView

GOLDEN = pathlib.Path(__file__).parent / "golden"


@pytest.mark.parametrize("name", ["landscape", "portrait", "small", "exact"])
def test_eval_view_equals_torchvision_resize_and_centre_crop(name):
    golden = np.load(GOLDEN / "preprocess.npz")
    ours = Preprocess(size=64, resize=73)(encode_image(golden[f"{name}/image"]))
    assert ours.dtype == np.uint8
    np.testing.assert_array_equal(ours, golden[f"{name}/eval_73_64"])


def test_a_banner_too_thin_to_resize_is_a_decode_error():
    flat = encode_image(np.full((1, 60_000, 3), 7, np.uint8))  # would be 4 gigapixels
    with pytest.raises(DecodeError, match="60000 x 1 pixels: too thin"):
        Preprocess(size=224, resize=256)(flat)
    view = RandomResizedCropView(224)(flat, np.random.default_rng(0))
    assert (view["image"] == 7).all()


@pytest.mark.parametrize("case", ["global_0.32_1", "local_0.05_0.32"])
def test_crop_geometry_has_torchvisions_distribution(case):
    golden = json.loads((GOLDEN / "preprocess.json").read_text())["crops"][case]
    height, width = golden["image_hw"]
    scale = tuple(float(s) for s in case.split("_")[1:])
    rng = np.random.default_rng(1)
    n = 6000
    boxes = np.array(
        [views.sample_crop(width, height, scale, (3 / 4, 4 / 3), rng) for _ in range(n)]
    )
    left, top, w, h = boxes.T
    assert (left >= 0).all() and (top >= 0).all()
    assert (left + w <= width).all() and (top + h <= height).all()
    for name, values in (("area", w * h / (width * height)), ("aspect", w / h)):
        mean, std, low, high = golden[name]
        # Four standard errors of the difference from a golden sample of 2,000.
        assert abs(values.mean() - mean) < 4 * std * (1 / n + 1 / 2000) ** 0.5
        assert abs(values.std() / std - 1) < 0.08
        # Rounding to pixels moves the ends by at most half a pixel a side.
        assert abs(values.min() - low) < 0.03 and abs(values.max() - high) < 0.04
    # Corners are uniform over where the crop fits.
    free = height - h
    share = (top[free > 5] / free[free > 5]).mean()
    assert abs(share - 0.5) < 0.03


def test_ten_failed_tries_fall_back_to_the_centre():
    rng = np.random.default_rng(0)
    draw = lambda w, h: views.sample_crop(w, h, (0.9, 1.0), (3 / 4, 4 / 3), rng)  # noqa: E731
    assert draw(1000, 10) == (493, 0, 13, 10)
    assert draw(10, 1000) == (0, 493, 10, 13)
    assert draw(1, 1) == (0, 0, 1, 1)


@pytest.mark.parametrize("size", [8, 48, 224])
def test_the_smallest_decode_that_serves_the_crop_is_taken(size):
    data = encode_image(np.zeros((333, 507, 3), np.uint8), "JPEG")
    rng = np.random.default_rng(size)
    for _ in range(50):
        _, _, w, h = views.sample_crop(507, 333, (0.05, 1.0), (3 / 4, 4 / 3), rng)
        scale = max(size / w, size / h)
        reduction = open_image(data).decode(scale).reduction
        if reduction > 1:
            assert min(w, h) / reduction >= size
        if reduction < 8:
            assert min(w, h) / (2 * reduction) < size * 1.03  # whole pixels are asked for


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_crop_that_is_no_square_keeps_the_shape_of_things(orientation):
    """Of an image of that shape the largest crop is all of it: PIL's resize of the whole, to a grey
    level or two. Orientation 6: the file lies on its side."""
    image = Image.fromarray(smooth_image(np.random.default_rng(0), 128, 64))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = image.transpose(Image.Transpose.ROTATE_90) if orientation == 6 else image
    stream = io.BytesIO()
    stored.save(stream, "PNG", exif=exif)
    view = RandomResizedCropView((16, 32), scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0)
    made = view(stream.getvalue(), np.random.default_rng(0))["image"]
    whole = np.asarray(image.resize((32, 16), Image.Resampling.BICUBIC))
    assert np.abs(made.astype(int) - whole).max() <= 2
    for size, low, high in (((16, 32), 1.5, 8 / 3), ((32, 16), 3 / 8, 2 / 3)):
        _, _, w, h = views.sample_crop(
            999, 999, (0.3, 0.3), ratio_of(size, (3 / 4, 4 / 3)), np.random.default_rng(1)
        )
        assert low - 0.01 < w / h < high + 0.01


def test_a_view_is_a_function_of_bytes_and_generator_state():
    data = encode_image(smooth_image(np.random.default_rng(0), 90, 70), "WEBP")
    view = RandomResizedCropView(32)
    first, again, other = (view(data, np.random.default_rng(s))["image"] for s in (5, 5, 6))
    assert first.shape == (32, 32, 3) and first.dtype == np.uint8
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_half_of_the_views_are_flipped():
    ramp = np.repeat(np.linspace(0, 255, 64).astype(np.uint8)[None, :, None], 64, 0).repeat(3, 2)
    data, rng = encode_image(ramp), np.random.default_rng(0)
    view = RandomResizedCropView(16)
    flipped = [
        image[8, 0, 0] > image[8, -1, 0] for image in (view(data, rng)["image"] for _ in range(400))
    ]
    assert 0.42 < np.mean(flipped) < 0.58
    kept = [RandomResizedCropView(16, flip=0.0)(data, rng)["image"] for _ in range(20)]
    assert all(image[8, 0, 0] < image[8, -1, 0] for image in kept)


def test_views_pickle_and_compare():
    for view in (RandomResizedCropView(48, scale=(0.3, 1.0)), Preprocess(48, 56)):
        assert pickle.loads(pickle.dumps(view)) == view
    with pytest.raises(ValueError, match="is smaller than size"):
        Preprocess(size=56, resize=48)
