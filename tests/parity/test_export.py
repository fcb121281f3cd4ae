"""Exported folders against transformers: no key missing, the same features, the same loss, the same
pixels.

The networks are small and random, but with non-trivial biases and norms, so that a swapped row
shows.
"""

import dataclasses
import importlib.util
import io
import json
import pathlib
import re
import sys

import huggingface_hub
import jax
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from ml_collections import ConfigDict
from PIL import Image

from webssl_jax import methods, params, publish
from webssl_jax.config import UserError
from webssl_jax.data.views import Preprocess
from webssl_jax.evaluators import outcome
from webssl_jax.evaluators.outcome import Outcome
from webssl_jax.evaluators.texts import retrieval
from webssl_jax.methods.base import Variables
from webssl_jax.model import Model
from webssl_jax.runs import Run
from webssl_jax.weights import load, preprocessing, safetensors_io
from webssl_jax.weights.card import Named
from webssl_jax.weights.families import table_of
from webssl_jax.weights.networks import Networks
from webssl_jax.weights.tables import WeightsError

_spec = importlib.util.spec_from_file_location(
    "export_tool", pathlib.Path(__file__).parents[2] / "tools" / "export.py"
)
export = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(export)

# Relative error of Euclidean norms, float32 on both sides. Measured: 2e-7 to 5e-7.
TOLERANCE = 5e-6
FAMILIES = ("hf-vit", "hf-vit-mae")
SIDE, PATCH = 48, 8


def make_config(**model):
    return ConfigDict(
        {
            "name": "test_run",
            "total_steps": 20,
            "global_batch": 4,
            "model": {"width": 32, "depth": 3, "heads": 4, "patch_size": PATCH, **model},
            "method": {
                "name": "mae",
                "mask_ratio": 0.75,
                "norm_pix_loss": True,
                "decoder": {"width": 16, "depth": 2, "heads": 2},
                "view": {"image_size": SIDE},
            },
            "data": {"train": "corpus:train"},
            "optim": {
                "lr": 1e-3,
                "warmup_steps": 2,
                "cooldown_steps": 0,
                "lr_scaling": "none",
                "lr_batch": 2,
            },
        }
    )


def make_run(workdir, **model):
    config = make_config(**model)
    method = methods.create(config)
    shapes = jax.eval_shape(lambda: method.init(jax.random.key(0), method.batch_spec(1))).params
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        values = rng.normal(0, 0.15, leaf.shape).astype(np.float32)
        return values + 1 if path.endswith("scale") else values

    return Run(
        str(workdir), config, 20, method, Variables(params.map_with_path(draw, shapes), {}, {})
    )


def outcome_of(hits, **baselines):
    """Of ten images so many were right."""
    metrics, items = outcome.scored("top1", np.arange(10) < hits)
    return Outcome(
        ("top1",),
        metrics | {"cls_k10": 0.123},
        items,
        "data",
        meaning="top1: share of test images that were right.",
        chosen={"top1": "k = 5"},
        baselines=baselines,
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    rows = [
        {"step": 10, "train/loss": 0.987654, "perf/images_per_s": 5.0},
        {"step": 20, "train/loss": 0.54321},
        {"step": 30, "train/loss": 0.11111},
    ]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (workdir / "environment.json").write_text(json.dumps({"git_revision": "0123abcd"}))
    for step, hits in ((0, 2), (20, 7), (30, 9)):
        path = outcome.step_path(workdir / "eval" / "flowers", step)
        outcome_of(hits, **{"raw pixels": outcome_of(3)}).write(path)
    return make_run(workdir)


@pytest.fixture(scope="module")
def folders(run, tmp_path_factory):
    root = tmp_path_factory.mktemp("exports")
    return {family: publish.export_run(run, family, root / family) for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_misses_no_key_and_meets_no_unknown_one(folders, family):
    model_class = {"hf-vit": "ViTModel", "hf-vit-mae": "ViTMAEForPreTraining"}[family]
    options = {"add_pooling_layer": False} if family == "hf-vit" else {}
    model, info = getattr(transformers, model_class).from_pretrained(
        folders[family], output_loading_info=True, **options
    )
    assert not any(info.values()), info
    assert model.config.layer_norm_eps == 1e-6 and model.config.hidden_act == "gelu"
    ours = set(safetensors_io.open_file(folders[family]).keys())
    assert len(ours) == len(model.state_dict())


@pytest.mark.parametrize("height, width", [(SIDE, SIDE), (64, 64), (40, 72), (72, 32)])
def test_features_agree_at_the_native_and_at_other_sizes(run, folders, height, width):
    model = transformers.ViTModel.from_pretrained(folders["hf-vit"], add_pooling_layer=False)
    images = np.random.default_rng(0).integers(0, 256, (2, height, width, 3)).astype(np.uint8)
    ours = Model.of(run.method, run.variables).features(images)
    mean, std = np.float32(run.method.mean), np.float32(run.method.std)
    x = torch.from_numpy(
        ((images.astype(np.float32) / 255 - mean) / std).transpose(0, 3, 1, 2).copy()
    )
    with torch.no_grad():
        theirs = model(
            x, interpolate_pos_encoding=(height, width) != (SIDE, SIDE)
        ).last_hidden_state.numpy()
    tokens = np.concatenate([ours.cls[:, None], ours.patches.reshape(2, -1, 32)], axis=1)
    assert np.linalg.norm(tokens - theirs) < TOLERANCE * np.linalg.norm(theirs)


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_the_loss_agrees_under_the_same_noise(run, tmp_path, norm_pix_loss):
    run = dataclasses.replace(
        run, method=dataclasses.replace(run.method, norm_pix_loss=norm_pix_loss)
    )
    folder = publish.export_run(run, "hf-vit-mae", tmp_path / "out")
    model = transformers.ViTMAEForPreTraining.from_pretrained(folder)
    loss = export._compare_decoder(Model.of(run.method, run.variables), model)[0]
    assert loss.relative < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_verify_of_bfloat16_compares_layouts_and_not_rounding(run, tmp_path, family):
    folder = publish.export_run(run, family, tmp_path / "out", "bfloat16")
    comparisons = verify(run, family, folder, "bfloat16")
    assert max(c.relative for c in comparisons) < TOLERANCE
    assert [c.what for c in comparisons][:2] == ["features at 48x48", "features at 56x72"]


@pytest.mark.parametrize("wrong", [{"num_attention_heads": 2}, {"layer_norm_eps": 1e-3}], ids=str)
def test_verify_notices_a_network_that_computes_something_else(run, tmp_path, wrong):
    folder = publish.export_run(run, "hf-vit", tmp_path / "out")
    config = json.loads((folder / "config.json").read_text()) | wrong
    (folder / "config.json").write_text(json.dumps(config))
    comparisons = verify(run, "hf-vit", folder, "float32")
    assert min(c.relative for c in comparisons) > export.TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("model", [{}, {"position": "learned"}, {"qkv_bias": False}], ids=str)
def test_import_of_an_export_is_bit_identical(tmp_path, family, model):
    run = make_run(tmp_path, **model)
    if family == "hf-vit-mae" and model:
        run = dataclasses.replace(
            run,
            method=dataclasses.replace(
                run.method, decoder=dataclasses.replace(run.method.decoder, position="sincos")
            ),
        )
    folder = publish.export_run(run, family, tmp_path / "out", max_file_bytes=20_000)
    assert (folder / "model.safetensors.index.json").exists()
    back, original = (params.flatten(p) for p in (load.load(folder).params, run.variables.params))
    assert set(back) == {
        path for path in original if family == "hf-vit-mae" or path.startswith("encoder/")
    }
    for path, value in back.items():
        assert value.dtype == np.float32
        np.testing.assert_array_equal(value, original[path])


@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_saves_itself_is_imported_bit_for_bit(run, folders, tmp_path, family):
    if family == "hf-vit":
        # with a pooler of random numbers
        model = transformers.ViTModel.from_pretrained(folders[family])
    else:
        model = transformers.ViTMAEForPreTraining.from_pretrained(folders[family])
    model.save_pretrained(tmp_path)
    back = load.load(tmp_path).params
    for path, value in params.flatten(back).items():
        np.testing.assert_array_equal(value, params.flatten(run.variables.params)[path])


def test_module_names_of_transformers_5_are_imported_as_well(run, folders, tmp_path):
    model = transformers.ViTModel.from_pretrained(folders["hf-vit"], add_pooling_layer=False)
    tensors = {key: value.numpy() for key, value in model.state_dict().items()}
    assert "layers.0.attention.q_proj.weight" in tensors
    file = tmp_path / "x.safetensors"
    safetensors_io.write_file(
        file, [safetensors_io.Spec(k, v.shape) for k, v in tensors.items()], tensors.items()
    )
    back = load.load(file, heads=4).params
    np.testing.assert_array_equal(
        back["encoder"]["blocks"]["attn"]["q"]["kernel"],
        run.variables.params["encoder"]["blocks"]["attn"]["q"]["kernel"],
    )


def verify(run, family, folder, dtype):
    networks = Networks.of(run.method)
    return export.verify(networks, run.variables.params, family, folder, dtype, transformers)


def rewrite(folder, change):
    """The folder's tensors after ``change``, as a single file beside it."""
    reader = safetensors_io.open_file(folder)
    tensors = {key: tensor.read().copy() for key, tensor in reader.items()}
    change(tensors)
    file = folder / "changed.safetensors"
    safetensors_io.write_file(
        file, [safetensors_io.Spec(k, v.shape) for k, v in tensors.items()], tensors.items()
    )
    return file


def set_to(key, value):
    def change(tensors):
        tensors[key][...] = value

    return change


@pytest.mark.parametrize(
    "change, named",
    [
        (
            lambda t: t.pop("vit.encoder.layer.1.output.dense.bias"),
            "missing.*vit.encoder.layer.1.output.dense.bias",
        ),
        (lambda t: t.update(x=np.zeros(1)), "not expected in the file: x"),
        (
            lambda t: t.update({"vit.layernorm.bias": np.zeros(31)}),
            r"vit.layernorm.bias is \(31,\), not \(32,\)",
        ),
        (
            set_to("decoder.decoder_pred.weight", np.nan),
            "NaN or infinity in decoder.decoder_pred.weight",
        ),
        (
            set_to("decoder.decoder_pos_embed", 0.5),
            "decoder.decoder_pos_embed is not MAE's fixed sin-cos table",
        ),
    ],
)
def test_a_file_that_does_not_fit_is_refused_by_name(run, tmp_path, change, named):
    file = rewrite(publish.export_run(run, "hf-vit-mae", tmp_path / "out"), change)
    with pytest.raises(WeightsError, match=named):
        load.load(file)


def test_a_network_that_the_family_cannot_hold_is_refused_by_name(run, tmp_path):
    for model, named in (
        ({"mlp": "swiglu"}, "mlp/w1"),
        ({"num_registers": 2}, "encoder/register_tokens"),
        ({"layer_scale": 1e-5}, "layer_scale1/gamma"),
    ):
        other = make_run(tmp_path, **model)
        with pytest.raises(WeightsError, match=f"hf-vit: has no place for our parameter.*{named}"):
            publish.export_run(other, "hf-vit", tmp_path / "out")
    with pytest.raises(WeightsError, match="have no decoder"):
        table_of(
            "hf-vit-mae",
            dataclasses.make_dataclass("CLIP", [("encoder", object)])(run.method.encoder),
        )
    assert not (tmp_path / "out").exists()


def preprocess(folder, size):
    """(our evaluation view, what transformers makes of the same image), both in grey levels."""
    view = Preprocess(48, 56, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    text = json.dumps(preprocessing.for_transformers(view, ""))
    (folder / "preprocessor_config.json").write_text(text)
    pixels = np.random.default_rng(0).integers(0, 256, (7, 5, 3)).astype(np.uint8)
    image = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
    encoded = io.BytesIO()
    image.save(encoded, "png")
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    theirs = processor(images=image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    theirs = (theirs * np.float32(view.std) + np.float32(view.mean)) * 255
    return view(encoded.getvalue()).astype(np.float32), theirs


@pytest.mark.parametrize("size", [(200, 130), (97, 300), (48, 48), (30, 41)])
def test_the_image_processor_repeats_our_evaluation_view(tmp_path, size):
    ours, theirs = preprocess(tmp_path, size)
    assert theirs.shape == ours.shape == (48, 48, 3)
    assert np.abs(theirs - ours).max() < 1.01  # one grey level, from rounding


def test_where_the_margin_is_odd_the_image_processor_crops_one_pixel_away(tmp_path):
    """67 pixels less 48 leave 9.5 a side: torchvision, and so we, round to even, transformers
    down."""
    ours, theirs = preprocess(tmp_path, (60, 50))
    assert np.abs(theirs[:, 1:] - ours[:, :-1]).max() < 1.01


def test_the_model_card_holds_the_figures_of_the_exported_step_and_what_they_mean(folders):
    card = (folders["hf-vit"] / "README.md").read_text()
    assert "flowers top1" in card and "top1: share of test images that were right." in card
    assert "flowers top1: k = 5" in card
    assert "| `train/loss` | 0.9877 (10) | 0.5432 (20) | training loss" in card
    # later than the exported step; not an estimate
    assert "0.1111" not in card and "cls k10" not in card and "cls_k10" not in card
    assert re.search(r"raw pixels +0.300 ± 0.145", card) and re.search(
        r"untrained\) +0.200 ± 0.126", card
    )
    assert re.search(r"step 20 \(this model\) +0.700 ± 0.145", card) and "0.900" not in card
    assert "Evaluation at step 20," in card
    assert "\n- git revision of the training code: 0123abcd\n" in card
    assert "corpus:train" in card and '"mask_ratio": 0.75' in card
    assert "add_pooling_layer=False" in card


def test_a_card_names_no_folder_of_this_machine_and_has_the_licence_it_is_given(tmp_path):
    run = make_run(tmp_path / "secret" / "run")
    run.config.data.train = "/mnt/disk7/anna/cats-*.arrayrecord,gs://lab-private/dogs-*"
    run.config.init_from = "/home/anna/first_run/"
    named = Named("lab/web-mae-small", "apache-2.0")
    (tmp_path / "secret" / "run").mkdir(parents=True)
    folder = publish.export_run(run, "hf-vit", tmp_path / "secret" / "out", named=named)
    card = (folder / "README.md").read_text()
    for part in (str(tmp_path), "disk7", "anna", "lab-private", "secret"):
        assert part not in card
    assert "training images: `cats-*.arrayrecord,dogs-*`" in card and '"first_run"' in card
    assert card.startswith("---\nlicense: apache-2.0\nlibrary_name: transformers\n")
    assert 'ViTModel.from_pretrained("lab/web-mae-small"' in card
    assert "may cut one less before and one more behind" in " ".join(card.split())


class Hub:
    """Stands for ``huggingface_hub.HfApi``."""

    calls: list = []

    def create_repo(self, repository, private, exist_ok):
        if "/" not in repository:
            raise huggingface_hub.errors.HFValidationError("no namespace\nin it")
        self.calls.append((repository, private, exist_ok))
        return f"https://hub/{repository}"

    def upload_folder(self, repo_id, folder_path, commit_message):
        self.calls.append((repo_id, sorted(p.name for p in folder_path.iterdir())))


def test_a_folder_is_pushed_to_the_hub_with_its_licence(monkeypatch, capsys, run, tmp_path):
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    flags = ["--format", "hf-vit", "--output", str(tmp_path / "out"), "--push"]
    with pytest.raises(SystemExit):
        call(monkeypatch, run, *flags, "lab/small")
    assert "--push needs --license" in capsys.readouterr().err and not Hub.calls
    assert call(monkeypatch, run, *flags, "lab/small", "--license", "mit") == 0
    assert "uploaded to https://hub/lab/small" in capsys.readouterr().out
    files = ["README.md", "config.json", "model.safetensors", "preprocessor_config.json"]
    assert Hub.calls == [("lab/small", True, True), ("lab/small", files)]
    with pytest.raises(UserError, match="--push small: no namespace in it; the export is whole"):
        call(monkeypatch, run, *flags, "small", "--license", "mit")


def test_the_model_card_of_a_run_without_figures_says_so(tmp_path):
    (tmp_path / "bare").mkdir()
    card = (
        publish.export_run(make_run(tmp_path / "bare"), "hf-vit", tmp_path / "out") / "README.md"
    ).read_text()
    assert "logged no figures" in card and "was not evaluated" in card and "not recorded" in card


def test_the_model_card_of_a_run_measured_by_texts_alone_tells_their_figures(tmp_path):
    links = np.array([(0, 0), (1, 1)])
    behind = retrieval.ranks(np.eye(2), np.eye(2), links)[0]
    found = outcome.scored("image_to_text_r1", behind < 1)
    texts = Outcome(("image_to_text_r1",), *found, "data", chance=retrieval.chance(links))
    texts.write(outcome.step_path(tmp_path / "eval" / "captions", 5))
    text = publish.evaluation(tmp_path, 5)
    assert "Evaluation at step 5," in text and "captions image to text r1" in text
    assert re.search(r"chance +0.500\n", text) and re.search(r"model\) +1.000 ± 0.000\n", text)


def test_the_example_in_the_model_card_runs_beside_the_folder(folders, monkeypatch):
    for folder in folders.values():
        monkeypatch.chdir(folder.parent)
        code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
        scope = {"image": Image.new("RGB", (64, 80), "red")}
        exec(code, scope)
        assert ("tokens" in scope and scope["tokens"].shape == (1, 37, 32)) or scope[
            "output"
        ].loss.item() > 0


def test_bfloat16_halves_the_file_and_rounds_weights_to_nearest(run, folders, tmp_path):
    small = publish.export_run(run, "hf-vit", tmp_path / "out", "bfloat16")
    full, half = safetensors_io.open_file(folders["hf-vit"]), safetensors_io.open_file(small)
    for key in full.keys():
        positions = key == "embeddings.position_embeddings"  # a formula, kept exact
        assert half[key].read().dtype == (np.float32 if positions else ml_dtypes.bfloat16)
        np.testing.assert_array_equal(
            half[key].read(), full[key].read().astype(half[key].read().dtype)
        )
    model = transformers.AutoModel.from_pretrained(small, add_pooling_layer=False)
    assert model.dtype == torch.bfloat16
    # a sin-cos table rounded to bfloat16 still counts as the table
    model.save_pretrained(tmp_path / "theirs")
    load.load(tmp_path / "theirs")


def test_an_earlier_export_is_replaced_whole_and_anything_else_is_left_alone(run, tmp_path):
    out = tmp_path / "out"
    publish.export_run(run, "hf-vit", out, max_file_bytes=20_000)
    publish.export_run(run, "hf-vit", out)
    assert sorted(p.name for p in out.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(WeightsError, match="thesis.tex"):
        publish.export_run(run, "hf-vit", out)
    assert (out / "thesis.tex").exists() and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_diverged_run_exports_nothing(run, tmp_path):
    bad = jax.tree.map(np.copy, run.variables.params)
    bad["encoder"]["norm"]["bias"][3] = np.nan
    with pytest.raises(WeightsError, match="encoder/norm/bias"):
        publish.export_run(
            dataclasses.replace(run, variables=Variables(bad, {}, {})), "hf-vit", tmp_path / "out"
        )
    assert list(tmp_path.iterdir()) == []


def call(monkeypatch, run, *argv):
    def load_run(workdir, step=None):
        assert (workdir, step) == ("W", 20)
        return run

    monkeypatch.setattr(export.runs, "load_run", load_run)
    return export.main(["--workdir", "W", "--step", "20", *argv])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tool_exports_and_verifies(monkeypatch, capsys, run, tmp_path, family):
    out = tmp_path / "out"
    assert call(monkeypatch, run, "--format", family, "--output", str(out), "--verify") == 0
    printed = capsys.readouterr().out
    assert "verified with transformers" in printed and "features at 56x72" in printed
    assert ("reconstruction loss" in printed) == (family == "hf-vit-mae")
    assert (out / "model.safetensors").exists()


def test_the_tool_converts_foreign_weights_and_verifies_them(capsys, folders, tmp_path):
    out = tmp_path / "out.pth"
    argv = ["--weights", str(folders["hf-vit-mae"]), "--format", "mae-pth", "--output", str(out)]
    assert export.main([*argv, "--verify"]) == 0
    printed = capsys.readouterr().out
    assert "hf-vit-mae, ViT of 3 blocks" in printed and "verified with torch" in printed
    argv = ["--weights", str(out), "--format", "hf-vit", "--output", str(tmp_path / "back")]
    assert export.main([*argv, "--verify"]) == 0
    assert "verified with transformers" in capsys.readouterr().out
    assert (
        f"converted by webssl_jax from `{out.name}`"
        in (tmp_path / "back" / "README.md").read_text()
    )


@pytest.mark.parametrize(
    "argv, named",
    [
        (("--weights", "W", "--workdir", "W"), "not allowed with"),
        (("--weights", "W", "--step", "3"), "--step belongs to --workdir"),
    ],
)
def test_a_run_or_weights_and_not_both(capsys, argv, named):
    with pytest.raises(SystemExit) as caught:
        export.main([*argv, "--format", "hf-vit", "--output", "o"])
    lines = capsys.readouterr().err.strip().splitlines()
    assert caught.value.code == 2 and len(lines) == 1 and named in lines[0]


@pytest.mark.parametrize("height, width", [(64, 64), (40, 72)])
def test_trained_positions_are_resized_as_transformers_does(tmp_path, height, width):
    run = make_run(tmp_path, position="learned")
    folder = publish.export_run(run, "hf-vit", tmp_path / "out")
    model = transformers.ViTModel.from_pretrained(folder, add_pooling_layer=False)
    loaded = load.load(folder)
    images = np.random.default_rng(0).integers(0, 256, (2, height, width, 3)).astype(np.uint8)
    own = Model(loaded.networks, loaded.params)
    ours = own.features(images)
    with torch.no_grad():
        x = torch.from_numpy(export._pixels(own, images))
        theirs = model(x, interpolate_pos_encoding=True).last_hidden_state.numpy()
    tokens = np.concatenate([ours.cls[:, None], ours.patches.reshape(2, -1, 32)], axis=1)
    assert np.linalg.norm(tokens - theirs) < TOLERANCE * np.linalg.norm(theirs)


def test_the_tool_exits_1_when_the_features_differ(monkeypatch, capsys, run, tmp_path):
    off = [export.Comparison("features", absolute=1.0, relative=1e-3)]
    monkeypatch.setattr(export, "verify", lambda *args: off)
    argv = ("--format", "hf-vit", "--output", str(tmp_path / "o"), "--verify")
    assert call(monkeypatch, run, *argv) == 1
    assert "DIFFERENT" in capsys.readouterr().out


@pytest.mark.parametrize("module", ["torch", "transformers"])
def test_verify_without_pytorch_says_what_to_install_before_any_work(
    monkeypatch, run, tmp_path, module
):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=r"pip install '.\[export\]'") as caught:
        call(monkeypatch, run, "--format", "hf-vit", "--output", str(tmp_path / "o"), "--verify")
    assert "\n" not in str(caught.value) and not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    "flag, value, named",
    [
        ("--format", "onnx", "hf-vit"),
        ("--dtype", "int4", "bfloat16"),
        ("--step", "last", "int"),
        ("--verfy", "x", "--verify"),
        ("--output", None, "--output"),
    ],
)
def test_a_bad_flag_is_one_line_and_exit_code_2(monkeypatch, capsys, run, flag, value, named):
    flags = {"--format": "hf-vit", "--output": "o", flag: value}
    argv = [item for pair in flags.items() if pair[1] is not None for item in pair]
    with pytest.raises(SystemExit) as caught:
        call(monkeypatch, run, *argv)
    lines = capsys.readouterr().err.strip().splitlines()
    assert caught.value.code == 2 and len(lines) == 1 and named in lines[0]
