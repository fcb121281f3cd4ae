"""How images are made for inference: the geometry of each family, at its own size and at others."""

import pickle

import numpy as np
import pytest
from PIL import Image

from tests.data.image_shards import encode_image, smooth_image
from webssl_jax.data.views import INTERPOLATIONS, Preprocess, with_margin

PILLOW = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
}


@pytest.fixture(scope="module")
def image():
    """60 pixels high and 91 wide."""
    return Image.fromarray(smooth_image(np.random.default_rng(0), 91, 60))


@pytest.mark.parametrize("name", INTERPOLATIONS)
def test_interpolation_is_pillow_s_of_that_name(image, name):
    squashed = Preprocess(40, None, interpolation=name)(image)
    np.testing.assert_array_equal(squashed, image.resize((40, 40), PILLOW[name]))
    cropped = Preprocess(40, 40, interpolation=name)(image)
    whole = image.resize((int(40 * 91 / 60), 40), PILLOW[name])
    np.testing.assert_array_equal(cropped, whole.crop((10, 0, 50, 40)))
    assert len({Preprocess(40, None, interpolation=x)(image).tobytes() for x in PILLOW}) == 3


def test_without_a_resize_both_sides_become_the_size_and_nothing_is_cut_off():
    image = np.zeros((20, 60, 3), np.uint8)
    image[:, :10] = image[:, 50:] = 255  # white at both ends, which a central crop would lose
    made = Preprocess(20, None)(encode_image(image))
    assert made.shape == (20, 20, 3)
    assert (made[:, 0] == 255).all() and (made[:, -1] == 255).all() and (made[:, 10] == 0).all()
    assert not Preprocess(20, 20)(encode_image(image)).any()


def test_encoded_bytes_and_images_are_seen_alike(image):
    encoded = encode_image(np.asarray(image))
    for view in (Preprocess(32, 36), Preprocess(32, None)):
        np.testing.assert_array_equal(view(encoded), view(image))


def test_at_another_size_the_same_share_is_cut_off():
    for view, at in (
        (Preprocess(224, 224), (518, 518)),  # CLIP: nothing
        (Preprocess(384, None), (512, None)),  # SigLIP: squashed
        (Preprocess(224, 256), (518, 592)),  # DINOv2 and MAE: 256 / 224
        (Preprocess(48, with_margin(48)), (224, 256)),
        (Preprocess(200, 250), (400, 500)),
    ):
        made = view.at(at[0])
        assert (made.size, made.resize) == at
        assert made.at(view.size) == view
    view = Preprocess(224, 248, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear")
    made = view.at(448)
    assert (made.mean, made.std, made.interpolation) == (view.mean, view.std, "bilinear")
    assert (made.resize - made.size) % 2 == 0  # so that the crop is central


def test_pixels_alone_know_no_colours():
    one, two = Preprocess(32, 36, (0.1,) * 3), Preprocess(32, 36, (0.2,) * 3, (0.3,) * 3)
    assert one.for_pixels() == two.for_pixels() != Preprocess(32, 32).for_pixels()


def test_it_says_what_it_does_is_hashable_and_pickles():
    view = Preprocess(32, None, (0.5,) * 3, (0.25,) * 3, "lanczos")
    assert repr(view) == (
        "Preprocess(size=32, resize=None, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), "
        "interpolation='lanczos')"
    )
    assert pickle.loads(pickle.dumps(view)) == view and hash(view) == hash(view.at(32))


@pytest.mark.parametrize(
    "given, says",
    [
        ((0, 0), "size = 0 must be at least 1"),
        ((56, 48), "resize 48 is smaller than size 56"),
        ((48, 48, (0.5,) * 3, (0.5,) * 3, "nearest"), "interpolation = 'nearest' is not bicubic"),
        ((48, 48, (0.5, 0.5)), "mean"),
        ((48, 48, (0.5,) * 3, (0.5, 0.5, 0.0)), "std"),
    ],
)
def test_fields_that_cannot_be_are_refused(given, says):
    with pytest.raises(ValueError, match=says):
        Preprocess(*given)
