"""How images are made, against transformers' own processors: of the same config both make the same
pixels, whatever spelling its sizes have; and of what we write."""

import json

import numpy as np
import pytest
import transformers
from PIL import Image

from tests.data.image_shards import smooth_image
from webssl_jax.data.views import Preprocess
from webssl_jax.weights import preprocessing

GREY_LEVELS = 1.01  # both round, one of them twice
SQUARE = {"height": 48, "width": 48}


@pytest.fixture(scope="module")
def image():
    """100 x 150 pixels; the longer side leaves an even margin at the sizes below."""
    return Image.fromarray(smooth_image(np.random.default_rng(0), 150, 100))


def difference(folder, config, view, image):
    """The largest, in grey levels."""
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps(config))
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    theirs = processor(images=image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    theirs = (theirs * np.float32(view.std) + np.float32(view.mean)) * 255
    ours = view(image)
    assert ours.shape == theirs.shape
    return np.abs(theirs - ours.astype(np.float32)).max()


@pytest.mark.parametrize(
    "given",
    [
        {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 56}, "resample": 3},
        {"image_processor_type": "CLIPImageProcessor", "size": 48, "crop_size": 48},
        {"feature_extractor_type": "CLIPFeatureExtractor", "size": 56, "crop_size": 48},
        {"feature_extractor_type": "ViTFeatureExtractor", "size": 48, "resample": 2},
        {"image_processor_type": "ViTImageProcessor", "size": SQUARE, "resample": 1},
        {"image_processor_type": "ViTImageProcessorFast", "size": SQUARE, "do_center_crop": None},
        {"image_processor_type": "SiglipImageProcessor", "size": SQUARE, "resample": 3},
        {"image_processor_type": "CLIPImageProcessor", "size": SQUARE, "crop_size": SQUARE},
    ],
    ids=str,
)
def test_a_config_makes_the_pixels_that_its_processor_makes(tmp_path, image, given):
    given = {"crop_size": SQUARE, "resample": 2, **given}
    given |= {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
    view = preprocessing.of_transformers("here", given, preprocessing.default(224))
    assert view.size == 48
    assert difference(tmp_path, given, view, image) < GREY_LEVELS
    other = Preprocess(48, 48 if view.resize != 48 else None, view.mean, view.std)
    assert np.abs(other(image).astype(int) - view(image)).max() > 10  # it is not all the same


@pytest.mark.parametrize("towers", ["", "clip", "siglip"])
@pytest.mark.parametrize("resize", [None, 48, 56])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "lanczos"])
def test_what_we_write_makes_our_pixels_there(tmp_path, image, towers, resize, interpolation):
    usual = preprocessing.default(48, towers)
    view = Preprocess(48, resize, usual.mean, usual.std, interpolation)
    config = preprocessing.for_transformers(view, towers)
    assert difference(tmp_path, config, view, image) < GREY_LEVELS
    assert preprocessing.of_transformers("here", config, usual) == view
