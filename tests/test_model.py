"""The front door: features of image files from whatever holds weights, and what a model is."""

import dataclasses
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import webssl_jax
from tests.data.image_shards import smooth_image
from tests.evaluators.small_models import changed, mesh_of, save_run, small_clip, small_mae
from tests.weights import samples
from webssl_jax import model as models
from webssl_jax import params
from webssl_jax.config import UserError
from webssl_jax.models import pixels
from webssl_jax.models.features import compute_features
from webssl_jax.weights.families import FAMILIES

ORACLES = pathlib.Path(sys.prefix) / "oracles"
SOURCES = ("run", "hf-vit", "hf-dinov2", "timm", "pth")
RELATIVE = 1e-5


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Three image files of different sizes and kinds."""
    folder, rng = tmp_path_factory.mktemp("files"), np.random.default_rng(0)
    paths = [folder / name for name in ("a.png", "b.jpg", "c.png")]
    for path, size in zip(paths, ((50, 40), (40, 64), (90, 33))):
        Image.fromarray(smooth_image(rng, *size)).save(path)
    return paths


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(workdir, method, state) of a run of two checkpoints."""
    workdir = tmp_path_factory.mktemp("runs") / "mine"
    return workdir, *save_run(workdir, steps=(3, 7))


def save_transformers(model, folder, processor):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model.eval()


def seen_by_transformers(model, folder, files):
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    images = [Image.open(file).convert("RGB") for file in files]
    with torch.no_grad():
        seen = model(**processor(images, return_tensors="pt")).last_hidden_state.numpy()
    return seen[:, 0], seen[:, 1:].reshape(3, 4, 4, 32)


FIELDS = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32)
FIELDS |= dict(patch_size=8, attn_implementation="eager")


@pytest.fixture(scope="module")
def hf_vit(tmp_path_factory, files):
    folder = tmp_path_factory.mktemp("hf-vit")
    config = transformers.ViTConfig(**FIELDS, intermediate_size=128, layer_norm_eps=1e-6)
    processor = transformers.ViTImageProcessorPil(size={"height": 32, "width": 32})
    model = transformers.ViTModel(config, add_pooling_layer=False)
    model = save_transformers(model, folder, processor)
    return folder, {}, *seen_by_transformers(model, folder, files)


@pytest.fixture(scope="module")
def hf_dinov2(tmp_path_factory, files):
    folder = tmp_path_factory.mktemp("hf-dinov2")
    processor = transformers.BitImageProcessorPil(
        size={"shortest_edge": 36},
        crop_size={"height": 32, "width": 32},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    model = transformers.Dinov2Model(transformers.Dinov2Config(**FIELDS, mlp_ratio=4))
    model = save_transformers(model, folder, processor)
    return folder, {}, *seen_by_transformers(model, folder, files)


@pytest.fixture(scope="module")
def pth(tmp_path_factory, hf_dinov2):
    """The same network as DINOv2's own code keeps it: tensors alone."""
    folder, _, *seen = hf_dinov2
    written = webssl_jax.load(folder).save(tmp_path_factory.mktemp("pth") / "x.pth", "dinov2-pth")
    bare = {name: x for name, x in torch.load(written).items() if isinstance(x, torch.Tensor)}
    assert "blocks.1.attn.qkv.weight" in bare
    torch.save(bare, written.with_name("original.pth"))
    return written.with_name("original.pth"), {"heads": 2}, *seen


@pytest.fixture(scope="module")
def timm(tmp_path_factory, files):
    assert (ORACLES / "timm").is_dir(), "timm is not there: bash tools/test.sh installs it"
    folder = tmp_path_factory.mktemp("timm") / "out"
    script = pathlib.Path(__file__).with_name("parity") / "timm_own.py"
    command = [sys.executable, script, ORACLES, folder, *files]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    tokens = np.load(folder / "features.npy")
    return folder, {}, tokens[:, 0], tokens[:, 1:].reshape(3, 4, 4, 32)


@pytest.fixture(scope="module")
def run_source(run, files):
    workdir, method, state = run
    view = method.preprocess
    images = np.stack([view(file.read_bytes()) for file in files])
    images = pixels.normalise(images, view.mean, view.std)
    seen = jax.jit(compute_features, static_argnums=(0, 3))(
        method.encoder, state.teacher["encoder"], images, webssl_jax.Want()
    )
    return workdir, {}, seen.cls, seen.patches


def relative(ours, theirs):
    return np.linalg.norm(np.asarray(ours) - theirs) / np.linalg.norm(theirs)


@pytest.mark.parametrize("name", SOURCES)
def test_features_of_image_files_equal_those_of_the_weights_own_library(request, files, name):
    fixture = {"run": "run_source"}.get(name, name.replace("-", "_"))
    path, options, cls, patches = request.getfixturevalue(fixture)
    model = webssl_jax.load(path, **options)
    features = model(files)
    assert features.cls.shape == cls.shape == (3, features.cls.shape[1])
    assert features.patches.shape == patches.shape and features.patches.ndim == 4
    assert relative(features.cls, cls) < RELATIVE and relative(features.patches, patches) < RELATIVE


def test_a_run_is_opened_at_its_newest_step_or_another_and_its_teacher_is_what_is_seen(run):
    workdir, method, state = run
    model = webssl_jax.load(workdir)
    assert model.origin.step == 7 and model.origin.name == "mine, step 7"
    assert webssl_jax.load(workdir, step=3).origin.step == 3
    for path, leaf in params.flatten(model.params).items():
        np.testing.assert_array_equal(leaf, params.flatten(state.teacher)[path], err_msg=path)
    assert model.networks.encoder == method.encoder and model.preprocess == method.preprocess
    assert repr(model).startswith("Model(mine, step 7: ") and "Preprocess(size=32" in repr(model)


def test_images_may_be_paths_pillow_s_or_arrays_one_or_many(files):
    model = small_mae(1)
    wanted = model(files)
    opened = [Image.open(file) for file in files]
    arrays = [np.asarray(image) for image in opened]
    for given in ([str(file) for file in files], opened, arrays, (files[0], opened[1], arrays[2])):
        for found, right in zip(model(given)[:2], wanted[:2]):
            np.testing.assert_allclose(found, right, rtol=1e-6, atol=1e-6)
    for one in (files[0], str(files[0]), opened[0], arrays[0]):
        single = model(one)
        assert single.cls.shape == (1, 32) and single.patches.shape == (1, 4, 4, 32)
        np.testing.assert_allclose(single.cls, wanted.cls[:1], rtol=1e-5, atol=1e-5)
    batch = np.stack([arrays[0]] * 2)  # (2, H, W, 3): two images
    np.testing.assert_allclose(model(batch).cls, wanted.cls[[0, 0]], rtol=1e-5, atol=1e-5)
    grey = arrays[0][..., 0]
    np.testing.assert_allclose(
        model(grey).cls, model(np.repeat(grey[..., None], 3, -1)).cls, rtol=1e-6
    )


def test_the_number_of_images_a_call_changes_nothing_and_is_filled_up(files, monkeypatch):
    model, calls, plain = small_mae(), [], models.Model.features

    def spy(self, images, want):
        calls.append(len(images))
        return plain(self, images, want)

    monkeypatch.setattr(models.Model, "features", spy)
    many = [*files, *files, *files, *files]
    whole, parts = model(many), model(many, batch=3)  # eight devices: at least eight images a call
    assert calls == [16, 8, 8]
    assert whole.cls.shape == (12, 32) and isinstance(whole.cls, np.ndarray)
    np.testing.assert_allclose(parts.cls, whole.cls, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(whole.cls[9:], small_mae(1)(files).cls, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "image, says",
    [
        ("/nowhere.png", "/nowhere.png: no image can be read .*No such file"),
        (np.zeros((4, 4, 3), np.float32), r"an array of float32 \(4, 4, 3\) is no image"),
        (np.zeros((4, 4, 5), np.uint8), r"an array of uint8 \(4, 4, 5\) is no image"),
        (np.zeros((0, 4, 3), np.uint8), "no image can be read|is no image"),
        (None, "an array of object .* is no image"),
    ],
    ids=["missing", "float", "five channels", "empty", "none"],
)
def test_what_is_no_image_is_one_line(image, says):
    with pytest.raises(UserError, match=says) as caught:
        small_mae(1)([image])
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_image_is_named_in_one_line(tmp_path):
    (tmp_path / "notes.txt").write_text("no pixels here")
    with pytest.raises(UserError, match="notes.txt: no image can be read .not an image of a known"):
        small_mae(1)(tmp_path / "notes.txt")
    with pytest.raises(UserError, match="no image was given"):
        small_mae(1)([])
    with pytest.raises(UserError, match="no text was given"):
        small_clip(1).text([])


def lowered(model, want):
    images = jax.ShapeDtypeStruct((8, 32, 32, 3), np.uint8)
    return models.feature_program(model.mesh, want).lower(model, images)


def test_what_is_not_wanted_is_neither_returned_nor_computed():
    Want = webssl_jax.Want
    model, flops, shapes = small_mae(1), {}, {}
    wants = {
        "cls": Want(patches="none"),
        "mean": Want(patches="mean"),
        "grid": Want(),
        "blocks": Want(cls=False, patches="mean", blocks=(0, -1)),
        "first": Want(cls=False, patches="none", blocks=()),
        "diagnostics": Want(patches="none", diagnostics=True),
    }
    for name, want in wants.items():
        program = lowered(model, want)
        shapes[name] = jax.tree.map(lambda x: x.shape, program.out_info)
        if name not in ("mean", "blocks"):
            flops[name] = program.compile().cost_analysis().get("flops", 0)
    assert shapes["cls"][:3] == ((8, 32), None, None) and not shapes["cls"].blocks
    assert shapes["mean"].patches == (8, 32) and shapes["grid"].patches == (8, 4, 4, 32)
    assert shapes["blocks"].cls is None
    assert shapes["blocks"].blocks == {0: (None, (8, 32)), -1: (None, (8, 32))}
    assert shapes["diagnostics"].diagnostics.attention == (8, 2, 4, 4)
    assert flops["cls"] < flops["grid"] and flops["cls"] < flops["diagnostics"]
    assert flops["first"] < flops["cls"] / 100  # nothing is left of it


def test_pooled_features_of_blocks_are_means_over_the_whole_grid_through_the_final_norm(files):
    want = webssl_jax.Want(blocks=(0, 2, -1), registers=True)
    model = small_mae(1)
    whole, pooled = model(files, want), model(files, dataclasses.replace(want, patches="mean"))
    np.testing.assert_allclose(pooled.patches, whole.patches.mean(axis=(1, 2)), atol=1e-5)
    for block in want.blocks:
        np.testing.assert_allclose(
            pooled.blocks[block][1], whole.blocks[block][1].mean(axis=(1, 2)), atol=1e-5
        )
    for block in (2, -1):
        np.testing.assert_allclose(whole.blocks[block][0], whole.cls, rtol=1e-6)
    assert np.abs(whole.blocks[0][0] - whole.cls).max() > 0.1
    assert whole.registers.shape == (3, 0, 32)
    with pytest.raises(ValueError, match="patches = 'all' is not one of none, mean, grid"):
        webssl_jax.Want(patches="all")


def test_outputs_stay_sharded_until_they_are_asked_for_whole(files):
    model = small_mae()
    images = np.zeros((16, 32, 32, 3), np.uint8)
    seen = model.features(images)
    for array in (seen.cls, seen.patches):
        assert {shard.data.shape[0] for shard in array.addressable_shards} == {2}
        assert len(array.sharding.device_set) == 8
    whole = models.to_host(seen)
    assert isinstance(whole.patches, np.ndarray) and whole.patches.shape == (16, 4, 4, 32)
    assert small_mae().mesh == mesh_of() and small_mae(1).mesh.size == 1


def test_parameters_are_the_leaves_of_a_pytree_and_networks_are_static(files):
    model = small_mae(1)
    assert len(jax.tree.leaves(model)) == len(jax.tree.leaves(model.params))
    doubled = jax.tree.map(lambda x: 2 * x, model)
    assert isinstance(doubled, webssl_jax.Model) and doubled.networks is model.networks
    np.testing.assert_allclose(
        doubled.params["encoder"]["cls_token"], 2 * model.params["encoder"]["cls_token"]
    )
    traced = []

    @jax.jit
    def cls(given, images):
        traced.append(given.networks)
        return given.features(images).cls

    images = np.stack([model.preprocess(file.read_bytes()) for file in files])
    bare = jax.device_get(model)  # parameters that lie on no mesh
    assert bare.mesh is None
    for given in (bare, jax.device_get(doubled)):
        cls(given, images)
    assert traced == [model.networks]  # one compilation for all parameters
    np.testing.assert_allclose(cls(bare, images), model(files).cls, rtol=1e-5, atol=1e-5)


def test_a_fingerprint_is_of_the_numbers_and_the_networks_alone():
    one = small_mae(1)
    assert one.fingerprint == small_mae().fingerprint and len(one.fingerprint) == 16
    renamed = webssl_jax.Model(one.networks, one.params, models.Origin("other"))
    assert renamed.fingerprint == one.fingerprint
    swapped = jax.tree.map(lambda x: x, one)
    bias = swapped.params["encoder"]["norm"]["bias"]
    swapped.params["encoder"]["norm"]["bias"] = bias[::-1]
    eps = dataclasses.replace(one.networks.encoder, norm_eps=1e-3)
    other = webssl_jax.Model(dataclasses.replace(one.networks, encoder=eps), one.params)
    slightly = changed(one, "decoder/mask_token", 1e-7)
    prints = {x.fingerprint for x in (one, swapped, other, slightly)}
    assert len(prints) == 4


def test_texts_are_a_capability_of_models_that_have_a_text_tower():
    assert small_mae(1).text is None
    text = small_clip(1).text
    assert text.has_tokenizer and text.context == 77
    one, many = text("a cat"), text(["a cat", "two dogs", "a cat"])
    assert one.shape == (1, many.shape[1])
    np.testing.assert_allclose(many[[0, 2]], np.repeat(one, 2, axis=0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(many, axis=1), 1, rtol=1e-5)
    assert np.abs(many[0] - many[1]).max() > 1e-3
    scale, bias = text.scale_and_bias
    assert scale == pytest.approx(np.exp(float(small_clip(1).params["logit_scale"]))) and bias == 0


def test_texts_for_a_tower_of_another_tokenizer_are_one_line():
    networks = samples.make_clip()
    weights = jax.device_put(samples.make_params(networks), jax.devices()[0])
    model = webssl_jax.Model(networks, weights, models.Origin("foreign"))
    with pytest.raises(UserError, match="foreign: its text tower has 64 ids of a tokenizer"):
        model.text(["a cat"])
    assert not model.text.has_tokenizer
    tokens = np.random.default_rng(0).integers(0, 64, (3, 12)).astype(np.int32)
    assert model.text.embed(tokens).shape == (3, 20)


@pytest.mark.parametrize("format", ["hf-vit-mae", "timm", "mae-pth"])
def test_a_saved_model_is_loaded_as_the_same_network(tmp_path, files, format):
    model = small_mae(1)
    path = model.save(tmp_path / ("x.pth" if format == "mae-pth" else "folder"), format)
    again = webssl_jax.load(path)
    assert again.origin.family == format and again.preprocess == model.preprocess
    assert relative(again(files).patches, model(files).patches) < RELATIVE
    if path.is_dir():
        assert FAMILIES[format].opens in (path / "README.md").read_text()


def test_a_model_is_not_saved_where_something_else_lies_or_in_a_format_that_lacks_it(tmp_path):
    (tmp_path / "notes.txt").touch()
    for output, format, says in (
        (tmp_path, "hf-vit", "holds other things .notes.txt.; name a new folder"),
        (tmp_path / "x.bin", "mae-pth", "name a .pth file"),
        (tmp_path / "new", "hf-clip", "hf-clip"),
        (tmp_path / "new", "hf-vitt", "did you mean 'hf-vit'"),
    ):
        with pytest.raises(UserError, match=says):
            small_mae(1).save(output, format)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_only_a_model_with_a_decoder_reconstructs(hf_vit):
    model = webssl_jax.load(hf_vit[0])
    with pytest.raises(UserError, match="has no decoder to reconstruct with"):
        model.reconstruct(np.zeros((1, 32, 32, 3), np.uint8), np.zeros((1, 16), np.float32))


def test_sizes_and_families_are_listed_by_the_names_that_are_in_use():
    known = webssl_jax.list_models()
    assert {"web-mae-1b", "web-dino-7b", "clip-l14", "siglip-so400m"} <= set(known.sizes)
    assert known.sizes["web-dino-7b"].width == 4096 and known.sizes["web-mae-1b"].patch_size
    assert {"hf-vit", "timm", "dinov2-pth", "hf-clip", "mae-pth"} <= set(known.families)


def test_paths_that_hold_no_model_are_one_line(tmp_path, run, hf_vit):
    (tmp_path / "weights.pth").write_bytes(b"no tensors")
    (tmp_path / "empty").mkdir()
    heads = samples.write("dinov2-heads", tmp_path, samples.make_dino())
    for path, options, says in (
        ("/nowhere.pth", {}, "/nowhere.pth: no such file or folder"),
        (tmp_path / "weights.pth", {}, "weights.pth: "),
        (tmp_path / "empty", {}, "empty: holds none of"),
        (heads, {}, "holds heads and no encoder"),
        (hf_vit[0], {"step": 3}, "is no run, so it has no step 3"),
        (run[0], {"step": 5}, "has no checkpoint of step 5; there are 3, 7"),
        (run[0], {"heads": 2}, "is a run, which knows its heads itself"),
    ):
        with pytest.raises(UserError, match=says) as caught:
            webssl_jax.load(path, **options)
        assert "\n" not in str(caught.value)


def test_weights_that_are_not_finite_are_refused_by_name(tmp_path):
    path = samples.write("mae-pth", tmp_path)
    stored = torch.load(path)
    stored["model"]["blocks.1.norm1.bias"][3] = float("nan")
    torch.save(stored, tmp_path / "broken.pth")
    with pytest.raises(
        UserError, match="broken.pth: NaN or infinity in .*blocks.1.norm1"
    ) as caught:
        webssl_jax.load(tmp_path / "broken.pth")
    assert "\n" not in str(caught.value)


def test_a_model_is_laid_over_the_mesh_or_the_device_that_is_named(hf_vit, files):
    folder, _, cls, _ = hf_vit
    spread = webssl_jax.load(folder, mesh=mesh_of())
    assert spread.mesh == mesh_of()
    kernel = spread.params["encoder"]["blocks"]["mlp"]["fc1"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 8
    assert relative(spread(files).cls, cls) < RELATIVE
    third = webssl_jax.load(folder, device=jax.devices()[3])
    assert {x.device for x in jax.tree.leaves(third.params)} == {jax.devices()[3]}
