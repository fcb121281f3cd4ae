"""Grids of patches that are not square: what a file says, what is assumed, and what comes out."""

import json

import jax
import numpy as np
import pytest
import torch
import transformers

from tests.weights import samples
from webssl_jax import params, publish
from webssl_jax.config import UserError
from webssl_jax.model import Model
from webssl_jax.models import pixels
from webssl_jax.models.sizes import ViTConfig
from webssl_jax.weights import load
from webssl_jax.weights.networks import Networks
from webssl_jax.weights.stored import WeightsError

WIDE = dict(width=32, depth=2, heads=2, patch_size=8, image_size=(16, 64), init="mae")  # 2 x 8


def write(family, folder, **encoder):
    networks = Networks(ViTConfig(**WIDE | encoder))
    return samples.write(family, folder, networks), samples.make_params(networks)


def bare(folder):
    """The tensors of timm's export, with nothing that says more."""
    return (folder / "model.safetensors").rename(folder.with_suffix(".safetensors"))


def test_a_grid_that_nothing_states_is_told_as_assumed_and_another_can_be_given(tmp_path):
    """16 trained positions may stand in 4 x 4, 2 x 8 or 8 x 2."""
    folder, weights = write("timm", tmp_path)
    assert load.open_(folder).networks.encoder.grid == (2, 8)  # its config.json says so
    path = bare(folder)
    square = load.open_(path)
    assert square.networks.encoder.grid == (4, 4)
    assert square.assumed[0].startswith("a square grid of 4x4 patches")
    wide = load.load(path, image_size=(16, 64))
    assert wide.networks.encoder.grid == (2, 8) and "grid" not in str(wide.assumed)
    samples.assert_same(wide.params, weights, "encoder")
    with pytest.raises(UserError, match="image_size=16x32: .* has positions of 16 patches of 8"):
        load.open_(path, image_size=(16, 32))


def test_a_number_of_positions_that_makes_no_square_is_asked_about(tmp_path):
    path = bare(write("timm", tmp_path, image_size=(16, 48))[0])
    with pytest.raises(WeightsError, match="12 positions make no square.*image_size=HEIGHTxWIDTH"):
        load.open_(path)
    assert load.open_(path, image_size=(48, 16)).networks.encoder.grid == (6, 2)


def test_a_sin_cos_table_tells_its_grid_itself(tmp_path):
    path = bare(write("timm", tmp_path, position="sincos")[0])
    loaded = load.open_(path)
    assert (loaded.networks.encoder.grid, loaded.networks.encoder.position) == ((2, 8), "sincos")
    assert "grid" not in str(loaded.assumed)


@pytest.mark.parametrize("family", ("hf-vit", "timm"))
def test_a_grid_that_is_not_square_goes_into_configs_and_comes_back(tmp_path, family):
    folder, weights = write(family, tmp_path)
    loaded = load.load(folder)
    assert loaded.networks.encoder.image_size == (16, 64) and not loaded.assumed
    assert loaded.networks.preprocess.shape == (16, 64)
    samples.assert_same(loaded.params, weights, "encoder")
    again = publish.export_loaded(loaded, family, tmp_path / "again")
    assert load.open_(again).networks == loaded.networks
    assert "images of 16x64 pixels" in (again / "README.md").read_text()


def test_transformers_computes_the_same_of_a_wide_image(tmp_path):
    folder, _ = write("hf-vit", tmp_path)
    assert json.loads((folder / "config.json").read_text())["image_size"] == [16, 64]
    loaded = load.load(folder)
    model = Model(loaded.networks, jax.tree.map(jax.numpy.asarray, loaded.params))
    image = np.random.default_rng(0).integers(0, 256, (30, 70, 3)).astype(np.uint8)
    ours = model(image)
    assert ours.patches.shape == (1, 2, 8, 32)
    view = model.preprocess
    x = np.array(pixels.normalise(model.preprocess(pil(image))[None], view.mean, view.std))
    theirs = transformers.ViTModel.from_pretrained(folder, add_pooling_layer=False)
    with torch.no_grad():
        tokens = theirs(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).last_hidden_state.numpy()
    np.testing.assert_allclose(ours.cls, tokens[:, 0], atol=2e-5)
    np.testing.assert_allclose(ours.patches.reshape(1, 16, 32), tokens[:, 1:], atol=2e-5)


def pil(image):
    from PIL import Image

    return Image.fromarray(image)


@pytest.mark.parametrize("family", ("hf-dinov2", "dinov2-pth"))
def test_code_that_knows_squares_alone_gets_no_other_grid(tmp_path, family):
    networks = samples.make_dino(image_size=(16, 64))
    with pytest.raises(WeightsError, match="square grids alone, .* 2x8; export as timm"):
        samples.write(family, tmp_path, networks)


def test_clips_image_tower_has_a_wide_grid_in_open_clip(tmp_path):
    networks = samples.make_clip(image_size=(16, 32))
    for family in ("open-clip", "open-clip-pth"):
        loaded = load.load(samples.write(family, tmp_path, networks))
        assert loaded.networks.encoder.grid == networks.encoder.grid and not loaded.assumed
        assert params.count(loaded.params) == params.count(samples.shapes_of(networks))
