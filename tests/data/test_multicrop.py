"""DINOv2's views: shapes, geometry, and which crop is distorted how often."""

import json
import pathlib
import pickle

import numpy as np
import pytest

from tests.data.image_shards import encode_image, smooth_image
from webssl_jax.data import decode, photometric
from webssl_jax.data.decode import DecodeError
from webssl_jax.data.multicrop import BLUR_AS_EXECUTED, BLUR_AS_WRITTEN, MultiCropView
from webssl_jax.data.photometric import Distortion

GOLDEN = pathlib.Path(__file__).parent / "golden"
PLAIN = {
    "distortion": Distortion(jitter=0.0, grayscale=0.0),
    "blur": (0.0, 0.0, 0.0),
    "solarize": (0.0, 0.0, 0.0),
}


def test_the_default_views_are_web_dinos():
    data = encode_image(smooth_image(np.random.default_rng(0), 300, 200), "JPEG")
    views = MultiCropView()(data, np.random.default_rng(0))
    assert {name: (crops.shape, crops.dtype) for name, crops in views.items()} == {
        "global_crops": ((2, 224, 224, 3), np.uint8),
        "local_crops": ((8, 98, 98, 3), np.uint8),
    }
    crops = list(views["local_crops"])
    assert all((a != b).any() for i, a in enumerate(crops) for b in crops[:i])
    assert (views["global_crops"][0] != views["global_crops"][1]).any()


def test_views_are_a_function_of_bytes_and_generator_state():
    data = encode_image(smooth_image(np.random.default_rng(0), 90, 70), "PNG")
    view = pickle.loads(pickle.dumps(MultiCropView(global_size=32, local_size=16, local_count=3)))
    first, again, other = (view(data, np.random.default_rng(seed)) for seed in (5, 5, 6))
    for name in first:
        np.testing.assert_array_equal(first[name], again[name])
        assert (first[name] != other[name]).any()


def test_crops_have_torchvisions_geometry():
    golden = json.loads((GOLDEN / "preprocess.json").read_text())["crops"]
    # Red tells the column and green the row, so a crop tells its box.
    width, height = 160, 90
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.linspace(0, 240, width).round()
    pixels[..., 1] = np.linspace(0, 240, height).round()[:, None]
    data, rng = encode_image(pixels), np.random.default_rng(0)
    view = MultiCropView(global_size=24, local_size=16, local_count=4, **PLAIN)
    found = {"global_crops": [], "local_crops": []}
    for _ in range(500):
        for name, crops in view(data, rng).items():
            found[name] += list(crops.astype(float))
    cases = {"global_crops": "global_0.32_1", "local_crops": "local_0.05_0.32"}
    for name, case in cases.items():
        crops, expected = np.stack(found[name]), golden[case]
        n, size = crops.shape[:2]
        # The middle, where no edge bends the ramp, spans 1/2 of the crop.
        a, b = size // 4, size - 1 - size // 4
        share = (size / (b - a)) / 240
        across = (crops[:, :, b, 0] - crops[:, :, a, 0]).mean(1) * share
        down = (crops[:, b, :, 1] - crops[:, a, :, 1]).mean(1) * share
        flipped = across < 0
        assert abs(flipped.mean() - 0.5) < 4 * (0.25 / n) ** 0.5
        area, aspect = np.abs(across) * down, np.abs(across) * width / (down * height)
        for measured, key in ((area, "area"), (aspect, "aspect")):
            mean, std, low, high = expected[key]
            # Four standard errors of the difference from a golden sample of 2,000.
            assert abs(measured.mean() - mean) < 4 * std * (1 / n + 1 / 2000) ** 0.5
            assert abs(measured.std() / std - 1) < 0.15
            assert measured.min() > low - 0.1 and measured.max() < high + 0.1


def rates(monkeypatch, operation: str, view: MultiCropView) -> list[float]:
    """How often the first global, the second global and the local crops meet an operation."""
    monkeypatch.setattr(photometric, operation, lambda pixels, *unused: np.zeros_like(pixels))
    data, rng, hit = encode_image(np.full((20, 20, 3), 99, np.uint8)), np.random.default_rng(0), []
    for _ in range(800):
        views = view(data, rng)
        crops = [*views["global_crops"], *views["local_crops"]]
        hit.append([not crop.any() for crop in crops])
    first, second, *local = np.mean(hit, axis=0)
    return [first, second, float(np.mean(local))]


@pytest.mark.parametrize(
    "blur, expected",
    [(BLUR_AS_EXECUTED, (0.0, 0.9, 0.5)), (BLUR_AS_WRITTEN, (1.0, 0.1, 0.5))],
    ids=["as executed", "as written"],
)
def test_blur_rates_are_dinov2s(monkeypatch, blur, expected):
    small = {"global_size": 8, "local_size": 6, "local_count": 4}
    view = MultiCropView(**small, **PLAIN | {"blur": blur})
    found = rates(monkeypatch, "blur", view)
    assert found == pytest.approx(expected, abs=4 * (0.25 / 800) ** 0.5)
    assert MultiCropView().blur == BLUR_AS_EXECUTED
    if blur is BLUR_AS_EXECUTED:
        golden = (0.0, 0.906, 0.4935)  # torchvision behind DINOv2's wrapper, 2,000 draws
        assert found == pytest.approx(golden, abs=4 * (0.25 / 800 + 0.25 / 2000) ** 0.5)


def test_only_the_second_global_crop_is_solarized_in_a_fifth_of_the_images(monkeypatch):
    small = {"global_size": 8, "local_size": 6, "local_count": 4}
    view = MultiCropView(**small, **PLAIN | {"solarize": MultiCropView().solarize})
    first, second, local = rates(monkeypatch, "solarize", view)
    assert first == local == 0 and abs(second - 0.2) < 4 * (0.16 / 800) ** 0.5


def test_one_decode_at_the_least_scale_serves_all_crops(monkeypatch):
    decodes, crops = [], []
    plain_decode, plain_crop = decode.OpenedImage.decode, decode.DecodedImage.crop

    def record_decode(self, scale=1.0):
        decodes.append(plain_decode(self, scale))
        return decodes[-1]

    def record_crop(self, box, size):
        crops.append((box, size))
        return plain_crop(self, box, size)

    monkeypatch.setattr(decode.OpenedImage, "decode", record_decode)
    monkeypatch.setattr(decode.DecodedImage, "crop", record_crop)
    view = MultiCropView(global_size=40, local_size=20, local_count=3, **PLAIN)
    data = encode_image(smooth_image(np.random.default_rng(0), 640, 480), "JPEG")
    reductions = set()
    for seed in range(30):
        decodes.clear()
        crops.clear()
        view(data, np.random.default_rng(seed))
        (decoded,) = decodes
        reductions.add(decoded.reduction)
        least = max(size / min(box[2:]) for box, size in crops)
        assert 1 / decoded.reduction >= least
        if decoded.reduction < 8:
            assert 0.5 / decoded.reduction < least * 1.03  # whole pixels are asked for
    assert reductions > {4}


def test_there_may_be_no_local_crops():
    view = MultiCropView(global_size=40, local_size=20, local_count=0, **PLAIN)
    data = encode_image(smooth_image(np.random.default_rng(0), 64, 48), "JPEG")
    made = view(data, np.random.default_rng(0))
    assert {name: crop.shape for name, crop in made.items()} == {"global_crops": (2, 40, 40, 3)}


def test_bad_input_is_refused():
    with pytest.raises(DecodeError):
        MultiCropView()(b"<html>404</html>", np.random.default_rng(0))
    with pytest.raises(ValueError, match="local_count -1 is below 0"):
        MultiCropView(local_count=-1)
    with pytest.raises(ValueError, match="crops of 4 pixels are too small"):
        MultiCropView(local_size=4)
