"""What pictures see inside a network is what transformers sees, and one command draws it."""

import importlib.util
import pathlib

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from webssl_jax.config import UserError
from webssl_jax.model import load
from webssl_jax.models import pixels, position
from webssl_jax.models.features import Want

_spec = importlib.util.spec_from_file_location(
    "pictures_tool", pathlib.Path(__file__).parents[2] / "tools" / "pictures.py"
)
tool = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tool)


def save(folder, depth, kind=transformers.ViTModel):
    """A random network, with attention far from even, in a folder as the hub has it."""
    fields = dict(
        hidden_size=32,
        num_hidden_layers=depth,
        num_attention_heads=4,
        intermediate_size=128,
        image_size=32,
        patch_size=8,
        layer_norm_eps=1e-6,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    if kind is transformers.ViTModel:
        model = kind(transformers.ViTConfig(**fields), add_pooling_layer=False)
    else:
        decoder = dict(decoder_hidden_size=16, decoder_num_hidden_layers=1)
        decoder |= dict(decoder_num_attention_heads=2, decoder_intermediate_size=64)
        model = kind(transformers.ViTMAEConfig(**fields, **decoder))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:  # the fixed positions of ViTMAE are not
                parameter.add_(0.2 * torch.randn_like(parameter))
        if kind is not transformers.ViTModel:  # made by its from_pretrained only
            table = np.pad(position.sincos_2d(16, (4, 4)), ((1, 0), (0, 0)))
            model.decoder.decoder_pos_embed.copy_(torch.from_numpy(table)[None])
    model.save_pretrained(folder)
    return model.eval()


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    save(folder, 2)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(12):
        picture = rng.integers(0, 256, (5, 7, 3), np.uint8).repeat(12, 0).repeat(12, 1)
        path = folder / ("cats" if i % 2 else "dogs") / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(picture).save(path)
    (folder / "broken.jpg").write_bytes(b"no image")
    return folder


@pytest.mark.parametrize("depth", (1, 3))
@pytest.mark.parametrize("side", (32, 48))
def test_attention_and_norms_of_the_last_block_equal_those_of_transformers(tmp_path, depth, side):
    model = save(tmp_path, depth)
    ours = load(tmp_path)
    pictures = np.random.default_rng(1).integers(0, 256, (3, side, side, 3), np.uint8)
    seen = ours.features(pictures, Want(diagnostics=True)).diagnostics
    p = ours.preprocess
    x = np.array(pixels.normalise(pictures, p.mean, p.std)).transpose(0, 3, 1, 2).copy()
    with torch.no_grad():
        theirs = model(
            torch.from_numpy(x),
            interpolate_pos_encoding=True,
            output_attentions=True,
            output_hidden_states=True,
        )
    grid = side // 8
    attention = theirs.attentions[-1][:, :, 0, 1:].numpy().reshape(3, 4, grid, grid)
    np.testing.assert_allclose(seen.attention, attention, atol=2e-6)
    assert attention.max() > 3 / grid**2  # it is not even
    norms = theirs.hidden_states[-1].norm(dim=-1).numpy()  # before the final norm
    np.testing.assert_allclose(seen.cls_norm, norms[:, 0], rtol=1e-5)
    np.testing.assert_allclose(seen.patch_norms, norms[:, 1:].reshape(3, grid, grid), rtol=1e-5)


def test_imported_weights_are_drawn_by_one_command(tmp_path, capsys, encoder, images):
    flags = ["--weights", str(encoder), "--images", str(images), "--output", str(tmp_path)]
    assert tool.main([*flags, "--size", "48", "--count", "5"]) == 0
    drawn = {path.stem: np.asarray(Image.open(path)) for path in tmp_path.iterdir()}
    assert sorted(drawn) == ["attention", "neighbours", "norms", "pca"]
    assert all(picture.std() > 10 for picture in drawn.values())
    output = capsys.readouterr().out
    assert "12 of 13 images" in output  # one is broken
    assert "no reconstruction: these weights are an encoder" in output


def test_weights_with_a_decoder_are_drawn_reconstructing(tmp_path, images):
    save(tmp_path / "mae", 2, transformers.ViTMAEForPreTraining)
    flags = ["--weights", str(tmp_path / "mae"), "--images", str(images)]
    flags += ["--output", str(tmp_path / "out"), "--pictures", "reconstruction"]
    assert tool.main(flags) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["reconstruction.png"]


@pytest.mark.parametrize(
    "flags, says",
    (
        (["--size", "50"], "--size 50: an image of 50x50 pixels does not divide into patches of 8"),
        (["--size", "-8"], "--size -8: must be a positive"),
        (["--pictures", "pac"], "did you mean 'pca'"),
        (["--pictures", "reconstruction"], "no picture 'reconstruction' of these weights"),
        (["--count", "0"], "--count 0: must lie between 1 and 64"),
        (["--candidates", "1"], "--candidates 1: must be at least 2"),
        (["--step", "3"], "--step: goes with --workdir"),
        (["--images", "/nowhere"], "/nowhere"),
        (["--weights", "/nowhere.pth"], "/nowhere.pth: no such file"),
    ),
)
def test_bad_flags_are_one_line(tmp_path, encoder, flags, says):
    common = ["--weights", str(encoder), "--output", str(tmp_path / "out")]
    with pytest.raises(UserError) as caught:
        tool.main([*common, *flags])
    assert says in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_folder_without_images_is_one_line(tmp_path, encoder):
    with pytest.raises(UserError, match="no image files and no .* in it"):
        tool.main(["--weights", str(encoder), "--output", str(tmp_path), "--images", str(tmp_path)])
