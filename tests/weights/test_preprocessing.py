"""How images are made, as the config files of each library say it: read, written and refused.
(Against the processors themselves: ``parity/test_processors.py``.)"""

import dataclasses
import json
import math
import pathlib

import pytest

from tests.weights import samples
from webssl_jax import colours
from webssl_jax.data.views import Preprocess, with_margin
from webssl_jax.models import clip_sizes
from webssl_jax.weights import load, preprocessing
from webssl_jax.weights.networks import Networks
from webssl_jax.weights.stored import WeightsError

FILE = pathlib.Path("folder/preprocessor_config.json")
USUAL = preprocessing.default(64)
SQUARE = {"height": 48, "width": 48}
MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)


def test_where_nothing_is_said_images_are_made_as_the_originals_do():
    assert Preprocess(224, 256) == preprocessing.default(224)
    clip = Preprocess(224, 224, colours.CLIP_MEAN, colours.CLIP_STD)
    assert preprocessing.default(224, "clip") == clip
    siglip = Preprocess(224, None, colours.SIGLIP_MEAN, colours.SIGLIP_STD)
    assert preprocessing.default(224, "siglip") == siglip
    for read in (preprocessing.of_transformers, preprocessing.of_timm):
        assert read(FILE, {}, USUAL) == USUAL
        assert read(FILE, dict.fromkeys(("size", "mean", "crop_mode")), USUAL) == USUAL  # null


@pytest.mark.parametrize(
    "given, size, resize",
    [
        # DINOv2's folders, and those of CLIP, new and old
        ({"size": {"shortest_edge": 56}, "crop_size": SQUARE}, 48, 56),
        ({"size": {"shortest_edge": 56}, "crop_size": 48, "do_center_crop": True}, 48, 56),
        ({"size": {"shortest_edge": 48}}, 48, 48),
        ({"size": 48, "crop_size": 48, "feature_extractor_type": "CLIPFeatureExtractor"}, 48, 48),
        ({"size": 56, "crop_size": 48}, 48, 56),
        # one number is both sides for ViT and SigLIP
        ({"size": 48, "feature_extractor_type": "ViTFeatureExtractor"}, 48, None),
        ({"size": 48, "image_processor_type": "SiglipImageProcessor"}, 48, None),
        ({"size": 48, "default_to_square": True}, 48, None),
        # a square is one for all
        ({"size": SQUARE, "image_processor_type": "ViTImageProcessorFast"}, 48, None),
        ({"size": SQUARE, "image_processor_type": "SiglipImageProcessor"}, 48, None),
        ({"size": SQUARE, "do_center_crop": True, "crop_size": SQUARE}, 48, None),
        # crop_size is of no account without a crop; what would stay oblong is cut
        ({"size": {"shortest_edge": 56}, "crop_size": 48, "do_center_crop": False}, 56, 56),
        ({"size": SQUARE, "crop_size": {"height": 32, "width": 32}}, 48, None),
        ({"size": {"height": 48, "width": 64}}, (48, 64), None),
    ],
    ids=str,
)
def test_sizes_of_transformers_as_numbers_and_as_objects(given, size, resize):
    found = preprocessing.of_transformers(FILE, given, USUAL)
    assert found == Preprocess(size, resize)


@pytest.mark.parametrize("number, name", [(1, "lanczos"), (2, "bilinear"), (3, "bicubic")])
def test_colours_and_resampling_of_transformers_are_honoured(number, name):
    given = {"image_mean": list(MEAN), "image_std": list(STD), "resample": number}
    found = preprocessing.of_transformers(FILE, given, USUAL)
    assert found == dataclasses.replace(USUAL, mean=MEAN, std=STD, interpolation=name)


@pytest.mark.parametrize(
    "given, size, resize",
    [
        ({"input_size": [3, 48, 48]}, 48, with_margin(48)),
        ({"crop_pct": 0.9}, 64, 71),  # 71.1
        ({"crop_pct": 1}, 64, 64),
        ({"input_size": (3, 48, 48), "crop_pct": 0.875, "crop_mode": "center"}, 48, 54),
        ({"crop_pct": 1.0, "crop_mode": "squash"}, 64, None),
    ],
    ids=str,
)
def test_the_share_that_timm_crops_and_its_squash(given, size, resize):
    given = given | {"mean": MEAN, "std": STD, "interpolation": "bilinear"}
    wanted = Preprocess(size, resize, MEAN, STD, "bilinear")
    assert preprocessing.of_timm(FILE, given, USUAL) == wanted


@pytest.mark.parametrize(
    "given, resize",
    [({}, 64), ({"resize_mode": "shortest"}, 64), ({"resize_mode": "squash"}, None)],
)
def test_the_resize_mode_of_open_clip(given, resize):
    given = given | {"mean": MEAN, "std": STD, "interpolation": "bilinear", "size": 224}
    usual = preprocessing.default(64, "clip")  # its code takes the size from the network
    wanted = Preprocess(64, resize, MEAN, STD, "bilinear")
    assert preprocessing.of_open_clip(FILE, given, usual) == wanted


TRANSFORMERS, TIMM = preprocessing.of_transformers, preprocessing.of_timm
OPEN_CLIP = preprocessing.of_open_clip


@pytest.mark.parametrize(
    "read, given, says",
    [
        (TRANSFORMERS, {"size": 0}, "size = 0 makes no sense"),
        (TRANSFORMERS, {"size": "48"}, "size = 48 makes no sense"),
        (TRANSFORMERS, {"size": True}, "size = True makes no sense"),
        (TRANSFORMERS, {"size": {"longest_edge": 48}}, "size = None makes no sense"),
        (TRANSFORMERS, {"size": 56, "crop_size": {"height": 4, "width": 8}}, "crop_size = .* is"),
        (TRANSFORMERS, {"size": 56, "crop_size": [48]}, "crop_size = .* makes no sense"),
        (TRANSFORMERS, {"size": 40, "crop_size": 48}, "resize 40 is smaller than size 48"),
        (TRANSFORMERS, {"size": SQUARE, "do_center_crop": True, "crop_size": 32}, "crop_size = 32"),
        (TRANSFORMERS, {"resample": 0}, "resample = 0 is unknown"),
        (TRANSFORMERS, {"resample": [3]}, "resample = .* is unknown"),
        (TRANSFORMERS, {"do_normalize": False}, "do_normalize = False"),
        (TRANSFORMERS, {"do_resize": "no"}, "do_resize = no"),
        (TRANSFORMERS, {"rescale_factor": 1 / 127.5}, "rescale_factor = 0.0078"),
        (TRANSFORMERS, {"image_mean": [0.5, "x", 0.5]}, "are no three numbers"),
        (TRANSFORMERS, {"image_std": [0.5, 0.5]}, "are no three numbers"),
        (TRANSFORMERS, {"image_std": [0.5, 0.0, 0.5]}, "std = .* must be positive"),
        (TIMM, {"input_size": [3, 48, 64]}, "crop_mode = center to .48, 64. pixels is not here"),
        (TIMM, {"input_size": 48}, "input_size = 48 is no image"),
        (TIMM, {"input_size": [3, -1, -1]}, "input_size = -1 makes no sense"),
        (TIMM, {"crop_pct": 0}, "crop_pct = 0 makes no sense"),
        (TIMM, {"crop_pct": 1.2}, "crop_pct = 1.2 makes no sense"),
        (TIMM, {"crop_pct": "all"}, "crop_pct = all makes no sense"),
        (TIMM, {"crop_mode": "border"}, "crop_mode = border"),
        (TIMM, {"crop_mode": "squash", "crop_pct": 0.9}, "crop_mode = squash to 71 pixels"),
        (TIMM, {"interpolation": "random"}, "interpolation = 'random' is not bicubic"),
        (TIMM, {"interpolation": [3]}, "interpolation = .* makes no sense"),
        (TIMM, {"std": [math.nan] * 3}, "are no three numbers"),
        (OPEN_CLIP, {"resize_mode": "longest"}, "resize_mode = longest is unknown"),
        (OPEN_CLIP, {"interpolation": "nearest"}, "interpolation = 'nearest' is not bicubic"),
        (OPEN_CLIP, {"mean": 0.5}, "are no three numbers"),
    ],
    ids=lambda value: "" if callable(value) else str(value),
)
def test_nonsense_is_one_line_that_names_the_file(read, given, says):
    with pytest.raises(WeightsError, match=says) as caught:
        read(FILE, given, USUAL)
    assert str(caught.value).startswith(f"{FILE}: ") and "\n" not in str(caught.value)


def siglip():
    return Networks(
        clip_sizes.vision("siglip_micro"), text=clip_sizes.text("siglip_micro"), contrast="sigmoid"
    )


NETWORKS = {
    "hf-vit": lambda: Networks.of(samples.make_method()),
    "hf-vit-mae": lambda: Networks.of(samples.make_method()),
    "timm": lambda: Networks.of(samples.make_method()),
    "hf-dinov2": samples.make_dino,
    "hf-clip": samples.make_clip,
    "hf-clip-vision": samples.make_clip,
    "open-clip": samples.make_clip,
    "hf-siglip": siglip,
    "hf-siglip-vision": siglip,
}


def write(family, folder, **changes):
    """A folder of networks with a preprocess of those fields, which are of the network's size."""
    networks = NETWORKS[family]()
    side = networks.encoder.image_size
    wanted = Preprocess(**{"size": side, "resize": side, "mean": MEAN, "std": STD} | changes)
    networks = dataclasses.replace(networks, preprocess=wanted)
    return samples.write(family, folder, networks, samples.make_params(networks)), wanted


@pytest.mark.parametrize("family", NETWORKS)
@pytest.mark.parametrize(
    "changes", [{}, {"resize": None}, {"resize": 45, "interpolation": "lanczos"}], ids=str
)
def test_what_an_export_says_is_read_again(tmp_path, family, changes):
    if family == "open-clip" and changes.get("resize"):
        with pytest.raises(WeightsError, match="open-clip: its code resizes to the size of the"):
            write(family, tmp_path, **changes)
        assert list(tmp_path.iterdir()) == []
        return
    folder, wanted = write(family, tmp_path, **changes)
    assert load.open_(folder).networks.preprocess == wanted


def test_images_of_another_size_than_the_network_s_own_are_read_again(tmp_path):
    """DINOv2 is trained at 518 pixels and published with images of 224. timm's ViT takes its own
    size alone, so that there the same share is cut off."""
    folder, wanted = write("hf-dinov2", tmp_path, size=16, resize=18)
    assert load.open_(folder).networks.preprocess == wanted
    folder, wanted = write("timm", tmp_path, size=16, resize=18)
    assert load.open_(folder).networks.preprocess == wanted.at(32)


def test_timm_s_own_rounding_finds_the_size_that_was_meant():
    for size in range(8, 1025, 8):
        for resize in range(size, 2 * size):
            share = preprocessing.for_timm(Preprocess(size, resize))["crop_pct"]
            assert math.floor(size / share) == resize and share <= 1


def test_a_folder_of_siglip_that_says_nothing_squashes(tmp_path):
    folder, _ = write("hf-siglip-vision", tmp_path)
    (folder / "preprocessor_config.json").unlink()
    assert load.open_(folder).networks.preprocess == preprocessing.default(32, "siglip")
    own = {"image_processor_type": "SiglipImageProcessor", "size": {"height": 32, "width": 32}}
    (folder / "preprocessor_config.json").write_text(json.dumps(own | {"resample": 3}))
    assert load.open_(folder).networks.preprocess == preprocessing.default(32, "siglip")


@pytest.mark.parametrize(
    "family, file, key, value",
    [
        ("hf-vit", "preprocessor_config.json", "resample", 0),
        ("hf-clip", "preprocessor_config.json", "size", "large"),
        ("hf-siglip", "preprocessor_config.json", "do_rescale", False),
        ("timm", "config.json", "crop_pct", -1),
        ("open-clip", "open_clip_config.json", "resize_mode", "longest"),
    ],
)
def test_the_file_that_is_named_is_the_one_to_mend(tmp_path, family, file, key, value):
    folder, _ = write(family, tmp_path)
    given = json.loads((folder / file).read_text())
    inside = {"timm": "pretrained_cfg", "open-clip": "preprocess_cfg"}.get(family)
    (given[inside] if inside else given)[key] = value
    (folder / file).write_text(json.dumps(given))
    with pytest.raises(WeightsError, match=f"{key} = ") as caught:
        load.open_(folder)
    assert str(caught.value).startswith(f"{folder / file}: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("family", ["hf-vit", "hf-clip"])
def test_images_that_do_not_divide_into_patches_are_refused(tmp_path, family):
    folder, _ = write(family, tmp_path)
    file = folder / "preprocessor_config.json"
    change = {"size": {"shortest_edge": 30}, "crop_size": {"height": 30, "width": 30}}
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(WeightsError, match="an image of 30x30 pixels does not divide") as caught:
        load.open_(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
