"""Weights in timm's names against timm itself: it loads what we write, strictly, and both compute
the same features, at the native and at other sizes; and the other way round."""

import dataclasses
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from tests.weights import samples
from webssl_jax import colours
from webssl_jax.model import Model
from webssl_jax.models import clip_sizes, pixels
from webssl_jax.models.features import Want
from webssl_jax.weights import load, preprocessing
from webssl_jax.weights.networks import Networks

ORACLES = pathlib.Path(sys.prefix) / "oracles"
SIZES = ((32, 32), (48, 48), (40, 24), (24, 56))
TOLERANCE = 5e-6  # relative, Euclidean; float32 on both sides. Measured: 2.7e-7 to 3.9e-7
ENCODERS = {"sincos": {}, "learned": {"position": "learned"}, "bare": {"qkv_bias": False}}
DINO = {
    "dino": {"mlp_hidden": 53},  # of an odd ratio to the width
    "dino-gelu": {"mlp": "gelu"},
    "dino-registers": {"num_registers": 3},
}
TOWERS = {
    "clip": clip_sizes.vision("micro", mlp="quick_gelu"),
    "siglip": clip_sizes.vision("siglip_micro"),
}
ROPE = dict(position="rope", key_bias=False, norm_eps=1e-5, num_registers=3)
OTHERS = {
    "our-dinov3": ("timm-dinov3", ROPE | {"mlp": "gelu", "rope_base": 50.0}),
    # the hidden width is none of timm's own
    "our-dinov3-gated": ("timm-dinov3", ROPE | {"mlp_hidden": 53, "qkv_bias": False}),
    "our-ijepa": (
        "timm-ijepa",
        dict(mlp="gelu", pooling="mean", position="sincos", mask_token=False, layer_scale=None),
    ),
}


def images_of(height, width):
    rng = np.random.default_rng(height * width)
    return rng.integers(0, 256, (2, height, width, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def timm(tmp_path_factory):
    """(folder of our exports by encoder, folder timm wrote, its features by name)."""
    assert (ORACLES / "timm").is_dir(), "timm is not there: bash tools/test.sh installs it"
    root = tmp_path_factory.mktemp("timm")
    folders = []
    for name, encoder in ENCODERS.items():
        method = samples.make_method(depth=3, **encoder)
        samples.write("timm", root, method)
        folders.append((root / "timm").rename(root / name))
    for name, encoder in DINO.items():
        samples.write("timm", root, samples.make_dino(**encoder))
        folders.append((root / "timm").rename(root / name))
    for name, (family, encoder) in OTHERS.items():
        samples.write(family, root, samples.make_dino(**encoder))
        folders.append((root / family).rename(root / name))
    for name, encoder in TOWERS.items():
        networks = Networks(encoder, preprocess=preprocessing.default(32, name))
        samples.write(f"timm-{name}", root, networks)
        folders.append((root / f"timm-{name}").rename(root / f"tower-{name}"))
    method = samples.make_method()
    images = {f"{h}x{w}": images_of(h, w) for h, w in SIZES}
    values = {
        name: np.array(pixels.normalise(x, method.mean, method.std)).transpose(0, 3, 1, 2)
        for name, x in images.items()
    }
    np.savez(root / "pixels.npz", **values)
    script = pathlib.Path(__file__).with_name("timm_oracle.py")
    command = [sys.executable, script, ORACLES, root / "pixels.npz", root / "theirs", *folders]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return root, root / "theirs", np.load(root / "theirs" / "features.npz")


def difference(loaded, theirs, height, width):
    model = Model(loaded.networks, loaded.params)
    with jax.default_matmul_precision("highest"):
        seen = model.features(images_of(height, width), Want(registers=True))
    patches = seen.patches.reshape(2, -1, theirs.shape[-1])
    cls = [seen.cls[:, None]] if loaded.networks.encoder.pooling != "mean" else []
    ours = np.concatenate([*cls, seen.registers, patches], axis=1)
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


@pytest.mark.parametrize("height, width", SIZES)
@pytest.mark.parametrize("name", (*ENCODERS, *DINO))
def test_timm_computes_what_we_compute_from_our_export(timm, name, height, width):
    root, _, features = timm
    loaded = load.load(root / name)
    assert difference(loaded, features[f"{name}/{height}x{width}"], height, width) < TOLERANCE


@pytest.mark.parametrize("height, width", SIZES)
@pytest.mark.parametrize("file", ["random.pth", "random.safetensors"])
def test_we_compute_what_timm_computes_from_its_own_files(timm, file, height, width):
    _, theirs, features = timm
    loaded = load.load(theirs / file, heads=2)
    assert loaded.networks.encoder.position == "learned" and set(loaded.left) == {
        "head.weight",
        "head.bias",
    }
    assert difference(loaded, features[f"random/{height}x{width}"], height, width) < TOLERANCE


@pytest.mark.parametrize("height, width", SIZES)
@pytest.mark.parametrize("name", ("dinov2", "dinov2_reg4"))
def test_we_compute_what_timm_computes_from_its_own_dinov2(timm, name, height, width):
    _, theirs, features = timm
    loaded = load.load(theirs / f"{name}.safetensors", heads=2)
    c = loaded.networks.encoder
    assert (loaded.family, c.mlp, c.hidden) == ("timm", "swiglu", 88)
    assert c.num_registers == (4 if name == "dinov2_reg4" else 0)
    assert difference(loaded, features[f"{name}/{height}x{width}"], height, width) < TOLERANCE


@pytest.mark.parametrize("name", OTHERS)
def test_timm_computes_what_we_compute_from_our_dinov3_and_ijepa(timm, name):
    root, _, features = timm
    loaded = load.load(root / name)
    assert difference(loaded, features[f"{name}/32x32"], 32, 32) < TOLERANCE
    assert difference(loaded, features[f"{name}/40x24"], 40, 24) < TOLERANCE


@pytest.mark.parametrize("size", ((32, 32), (40, 24)), ids=str)
@pytest.mark.parametrize("name", ("dinov3", "dinov3_gated", "ijepa"))
def test_we_compute_what_timm_computes_from_its_own_dinov3_and_ijepa(timm, name, size):
    _, theirs, features = timm
    # without a config nothing says that I-JEPA's is timm's
    given = {"position_resize": "antialias"} if name == "ijepa" else {}
    loaded = load.load(theirs / f"{name}.safetensors", heads=2, **given)
    assert loaded.family == ("ijepa-pth" if name == "ijepa" else "timm-dinov3")
    assert loaded.networks.encoder.mlp == ("swiglu" if name == "dinov3_gated" else "gelu")
    assert difference(loaded, features["{}/{}x{}".format(name, *size)], *size) < TOLERANCE


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("whose", ("ours", "theirs"))
def test_image_towers_of_clip_and_siglip_are_timms_in_both_directions(timm, tower, whose):
    root, theirs, features = timm
    path = root / f"tower-{tower}" if whose == "ours" else theirs / f"{tower}.safetensors"
    given = {} if whose == "ours" else {"heads": 2}
    loaded = load.load(path, **given)
    assert loaded.family == f"timm-{tower}" and loaded.networks.encoder.heads == 2
    name = f"tower-{tower}" if whose == "ours" else tower
    view = dataclasses.replace(
        loaded.networks.preprocess, mean=colours.IMAGENET_MEAN, std=colours.IMAGENET_STD
    )  # as the pixels of this file were normalised
    networks = dataclasses.replace(loaded.networks, preprocess=view)
    loaded = dataclasses.replace(loaded, networks=networks)
    assert difference(loaded, features[f"{name}/32x32"], 32, 32) < TOLERANCE
