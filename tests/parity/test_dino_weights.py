"""Web-DINO's weights against those who wrote the formats: DINOv2's own ViT and heads, and
transformers; at the native and at other sizes, square and not. (timm: ``test_timm.py``.)

golden/dino_weights.npz was made with the modules of facebookresearch/dinov2 (Apache-2.0;
``DinoVisionTransformer`` and ``DINOHead``) in PyTorch 2.13 on a CPU in float32: state dicts of
random numbers as ``teacher_checkpoint.pth`` holds them, and what the modules make of the images.
``swiglu`` has 5 blocks built with block_chunks=2 (chunks of 2, 2 and 1), ``registers`` has plain
names, GELU and 3 registers. Both were built with the constructor's default, the offset; the hub and
the configs build networks with registers with antialiasing and without offset.

Tolerances are relative, of Euclidean norms, float32 on both sides: the same sums in another order.
"""

import dataclasses
import importlib.util
import pathlib

import numpy as np
import pytest
import torch
import transformers
from ml_collections import ConfigDict
from PIL import Image

from tests.weights import samples
from webssl_jax import colours, params, publish
from webssl_jax.methods.base import Variables
from webssl_jax.methods.dino.method import DINO, View
from webssl_jax.model import Model
from webssl_jax.models import pixels
from webssl_jax.models.features import Want
from webssl_jax.models.heads import Head
from webssl_jax.runs import Run
from webssl_jax.weights import load
from webssl_jax.weights.networks import Networks

_spec = importlib.util.spec_from_file_location(
    "export_dino_tool", pathlib.Path(__file__).parents[2] / "tools" / "export.py"
)
tool = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tool)

GOLDEN = np.load(pathlib.Path(__file__).parent / "golden" / "dino_weights.npz")
SIZES = ((16, 16), (24, 24), (28, 12), (12, 20))  # the first is native; patches of 4
TOLERANCE = 5e-6


def tokens_of(loaded, images):
    seen = Model(loaded.networks, loaded.params).features(images, Want(registers=True))
    patches = seen.patches.reshape(len(images), -1, seen.cls.shape[-1])
    return np.concatenate([seen.cls[:, None], seen.registers, patches], axis=1)


def off(ours, theirs):
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


@pytest.fixture(scope="module", params=("swiglu", "registers"))
def original(request, tmp_path_factory):
    """(name, what our importer makes of the original's teacher file)."""
    prefix = f"{request.param}/teacher/"
    tensors = {
        key.removeprefix(prefix): torch.from_numpy(GOLDEN[key].astype(np.float32))
        for key in GOLDEN.files
        if key.startswith(prefix)
    }
    path = tmp_path_factory.mktemp("original") / "teacher_checkpoint.pth"
    torch.save({"teacher": tensors}, path)
    return request.param, load.load(path, heads=3, position_resize="offset")


@pytest.mark.parametrize("height, width", SIZES)
def test_the_original_computes_the_same_tokens_and_logits(original, height, width):
    """Measured: 2e-7 to 4e-7."""
    name, loaded = original
    size = f"{height}x{width}"
    tokens = tokens_of(loaded, GOLDEN[f"images/{size}"])
    assert off(tokens, GOLDEN[f"{name}/tokens/{size}"]) < TOLERANCE
    first = 1 + loaded.networks.encoder.num_registers
    for head, x in (("dino", tokens[:, 0]), ("ibot", tokens[0, first:])):
        config = getattr(loaded.networks, f"{head}_head")
        scores = Head(config).apply({"params": loaded.params[f"{head}_head"]}, x)
        assert off(scores.logits(), GOLDEN[f"{name}/{head}/{size}"]) < TOLERANCE


def test_the_originals_own_file_comes_out_again(original, tmp_path):
    """Name by name and bit by bit, so that its modules load it strictly."""
    name, loaded = original
    chunks = 2 if name == "swiglu" else None
    path = publish.export_loaded(loaded, "dinov2-teacher", tmp_path / "x.pth", chunks=chunks)
    written = torch.load(path, weights_only=True)["teacher"]
    prefix = f"{name}/teacher/"
    theirs = {key.removeprefix(prefix): GOLDEN[key] for key in GOLDEN.files if prefix in key}
    assert set(written) == set(theirs)
    for key, value in theirs.items():
        np.testing.assert_array_equal(written[key].numpy(), value.astype(np.float32))


def test_at_another_size_the_plain_resize_is_another_function(original):
    """So the tolerance above does tell the two apart."""
    name, loaded = original
    encoder = dataclasses.replace(loaded.networks.encoder, position_resize="plain")
    networks = dataclasses.replace(loaded.networks, encoder=encoder)
    plain = dataclasses.replace(loaded, networks=networks)
    tokens = tokens_of(plain, GOLDEN["images/24x24"])
    assert off(tokens, GOLDEN[f"{name}/tokens/24x24"]) > 100 * TOLERANCE


@pytest.mark.parametrize("name", ("swiglu", "registers"))
def test_a_released_file_is_resized_as_its_hub_builds_the_network(name, tmp_path):
    """Against PyTorch's own resize of the table, in a file of the new size."""
    prefix = f"{name}/teacher/"
    tensors = {
        key.removeprefix(prefix).removeprefix("backbone."): torch.from_numpy(GOLDEN[key])
        for key in GOLDEN.files
        if key.startswith(f"{prefix}backbone.")
    }
    tensors = {key: x.float() for key, x in tensors.items()}
    torch.save(tensors, tmp_path / "small.pth")
    table = tensors["pos_embed"]
    square = table[:, 1:].reshape(1, 4, 4, -1).permute(0, 3, 1, 2)
    how = {"swiglu": dict(scale_factor=6.1 / 4), "registers": dict(size=6, antialias=True)}
    square = torch.nn.functional.interpolate(square, mode="bicubic", **how[name])
    square = square.permute(0, 2, 3, 1).flatten(1, 2)
    tensors["pos_embed"] = torch.cat([table[:, :1], square], dim=1)
    torch.save(tensors, tmp_path / "large.pth")
    small, large = (load.load(tmp_path / f"{size}.pth", heads=3) for size in ("small", "large"))
    assert small.networks.encoder.image_size == 16 and large.networks.encoder.image_size == 24
    images = GOLDEN["images/24x24"]
    assert off(tokens_of(small, images), tokens_of(large, images)) < TOLERANCE


CLASSES = {
    "hf-dinov2": transformers.Dinov2Model,
    "hf-dinov2-registers": transformers.Dinov2WithRegistersModel,
}
MODELS = [
    ("hf-dinov2", {}),
    ("hf-dinov2", {"mlp": "gelu", "qkv_bias": False, "mask_token": False}),
    ("hf-dinov2-registers", {"num_registers": 3}),
]


@pytest.fixture(scope="module", params=MODELS, ids=str)
def folder(request, tmp_path_factory):
    family, encoder = request.param
    networks = samples.make_dino(patch_size=4, image_size=16, **encoder)
    return family, samples.write(family, tmp_path_factory.mktemp("hf"), networks)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_transformers_misses_no_key_and_computes_the_same_tokens(folder, size):
    """Measured: 2e-7 to 4e-7."""
    family, path = folder
    model, info = CLASSES[family].from_pretrained(path, output_loading_info=True)
    assert not any(info.values()), info
    loaded = load.load(path)
    own = "antialias" if family == "hf-dinov2-registers" else "plain"
    assert loaded.networks.encoder.position_resize == own
    images = GOLDEN[f"images/{size[0]}x{size[1]}"]
    x = np.array(pixels.normalise(images, colours.IMAGENET_MEAN, colours.IMAGENET_STD))
    with torch.no_grad():
        theirs = model(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).last_hidden_state.numpy()
    assert off(tokens_of(loaded, images), theirs) < TOLERANCE


def test_what_transformers_saves_itself_is_imported_bit_for_bit(folder, tmp_path):
    family, path = folder
    CLASSES[family].from_pretrained(path).save_pretrained(tmp_path)
    ours, back = load.load(path), load.load(tmp_path)
    assert back.family == family and back.networks == ours.networks
    for name, value in params.flatten(back.params).items():
        np.testing.assert_array_equal(value, params.flatten(ours.params)[name])


# Exports of a run.


@pytest.fixture(scope="module")
def run():
    """Of student and teacher that differ."""
    networks = samples.make_dino(patch_size=4, image_size=16)
    view = View(global_size=16, local_size=8, local_count=2)
    method = DINO(
        networks.encoder, networks.dino_head, networks.ibot_head, group_images=2, view=view
    )
    student, teacher = (samples.make_params(networks, seed) for seed in (0, 1))
    config = {"name": "dino_run", "total_steps": 9, "global_batch": 2, "model": {}, "method": {}}
    config |= {
        "data": {"train": "corpus:train"},
        "optim": {
            "lr": 1e-3,
            "warmup_steps": 2,
            "cooldown_steps": 0,
            "lr_scaling": "none",
            "lr_batch": 2,
        },
    }
    return Run("nowhere", ConfigDict(config), 9, method, Variables(student, teacher, {}))


@pytest.mark.parametrize("family", ("hf-dinov2", "dinov2-teacher", "dinov2-pth"))
def test_the_tool_exports_the_teacher_of_a_run_and_verifies_it(
    monkeypatch, capsys, run, tmp_path, family
):
    monkeypatch.setattr(tool.runs, "load_run", lambda workdir, step=None: run)
    out = tmp_path / ("out" if family == "hf-dinov2" else "out.pth")
    argv = ["--workdir", "W", "--format", family, "--output", str(out), "--verify"]
    argv += [] if family == "hf-dinov2" else ["--chunks", "2"]
    assert tool.main(argv) == 0
    printed = capsys.readouterr().out
    assert "W: step 9, its teacher" in printed and "all relative errors within" in printed
    loaded = load.load(out, heads=2)
    assert loaded.family == family
    teacher = params.flatten(run.variables.teacher)
    for name, value in params.flatten(loaded.params).items():
        np.testing.assert_array_equal(value, teacher[name])
    if family == "hf-dinov2":
        assert "features at 20x28" in printed
        card = (out / "README.md").read_text()
        assert "webssl_jax (DINO; these are the weights of the teacher" in card
        assert "transformers resizes positions plainly and the training with DINOv2's" in card
        scope = {"image": Image.new("RGB", (30, 20), "red")}
        monkeypatch.chdir(tmp_path)
        exec(card.split("```python\n")[1].split("```")[0], scope)
        assert scope["tokens"].shape == (1, 17, 32)


def test_the_student_of_a_run_is_written_where_it_is_asked_for(monkeypatch, capsys, run, tmp_path):
    monkeypatch.setattr(tool.runs, "load_run", lambda workdir, step=None: run)
    argv = ["--workdir", "W", "--format", "hf-dinov2", "--output", str(tmp_path / "out")]
    assert tool.main([*argv, "--student"]) == 0
    assert "W: step 9, its student" in capsys.readouterr().out
    student = params.flatten(run.variables.params)
    for name, value in params.flatten(load.load(tmp_path / "out").params).items():
        np.testing.assert_array_equal(value, student[name])
    assert "these are the weights of the student)" in (tmp_path / "out" / "README.md").read_text()


def test_a_converted_folder_says_what_it_is(run, tmp_path):
    networks = Networks.of(run.method)
    source = samples.write("dinov2-teacher", tmp_path, networks, run.variables.teacher)
    folder = publish.export_loaded(load.open_(source), "hf-dinov2", tmp_path / "folder")
    card = (folder / "README.md").read_text()
    assert (
        "from `dinov2-teacher.pth` (`dinov2-teacher`)" in card
        and "tags: [vision, dino, webssl_jax]" in card
    )
