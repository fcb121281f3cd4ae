"""CLIP's towers in files: both directions, what is named when it does not fit, and what a run takes
of it. (Against the libraries: ``parity/test_clip_export.py``, ``parity/test_clip_towers.py``.)"""

import dataclasses
import importlib.util
import json
import logging
import pathlib

import numpy as np
import pytest

from tests.weights import samples
from tests.weights.test_init_from import fresh
from webssl_jax import colours, params, publish
from webssl_jax.config import UserError
from webssl_jax.data.views import Preprocess
from webssl_jax.methods.mae.method import MAE, View
from webssl_jax.model import Model
from webssl_jax.weights import load
from webssl_jax.weights.init_from import from_weights
from webssl_jax.weights.tables import WeightsError

_spec = importlib.util.spec_from_file_location(
    "inspect_weights", pathlib.Path(__file__).parents[2] / "tools" / "inspect_weights.py"
)
tool = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tool)

FOLDERS = ("hf-clip", "open-clip")


def assert_same(got, wanted):
    got, wanted = params.flatten(got), params.flatten(wanted)
    for path, value in got.items():
        np.testing.assert_array_equal(value, wanted[path], err_msg=path)


@pytest.mark.parametrize("family", samples.CLIP)
@pytest.mark.parametrize("mlp", ["gelu", "quick_gelu"])
def test_what_is_written_is_read_again_bit_by_bit_with_all_that_shapes_do_not_say(
    tmp_path, family, mlp
):
    networks = samples.make_clip(mlp=mlp, text={"mlp": mlp})
    weights = samples.make_params(networks)
    loaded = load.load(samples.write(family, tmp_path, networks, weights))
    assert loaded.family == ("open-clip" if family == "open-clip-pth" else family)
    parts = {"encoder"} if family == "hf-clip-vision" else set(weights)
    assert set(loaded.params) == parts and not loaded.assumed
    assert_same(loaded.params, {name: weights[name] for name in parts})
    resize = "antialias" if family.startswith("open") else "plain"
    encoder = dataclasses.replace(networks.encoder, position_resize=resize)
    assert dataclasses.replace(loaded.networks.encoder, init="clip") == encoder
    if family != "hf-clip-vision":
        assert loaded.networks.text == dataclasses.replace(networks.text, mlp_hidden=96)
    expected = dict(mean=colours.CLIP_MEAN, std=colours.CLIP_STD)
    assert loaded.networks.preprocess == Preprocess(size=24, resize=24, **expected)


@pytest.mark.parametrize("family", ["open-clip", "open-clip-pth"])
def test_siglips_bias_travels_with_open_clip(tmp_path, family):
    networks = samples.make_clip("sigmoid")
    weights = samples.make_params(networks)
    loaded = load.load(samples.write(family, tmp_path, networks, weights))
    assert loaded.networks.contrast == "sigmoid"
    assert_same(loaded.params, weights)
    with pytest.raises(WeightsError, match="has no place for our parameter.* logit_bias"):
        publish.export_loaded(loaded, "hf-clip", tmp_path / "out")


@pytest.mark.parametrize("to", samples.CLIP)
@pytest.mark.parametrize("family", ["hf-clip", "open-clip", "open-clip-pth"])
def test_each_family_becomes_each_other_tensor_by_tensor(tmp_path, family, to):
    networks = samples.make_clip()
    path = samples.write(family, tmp_path, networks)
    opened = load.open_(path)
    output = tmp_path / ("out.pt" if to.endswith("pth") else "out")
    again = load.load(publish.export_loaded(opened, to, output))
    assert_same(again.params, samples.make_params(networks))


def test_of_an_image_tower_alone_no_texts_can_be_written(tmp_path):
    opened = load.open_(samples.write("hf-clip-vision", tmp_path, samples.make_clip()))
    with pytest.raises(WeightsError, match="hf-clip: needs a text tower, and .* has none"):
        publish.export_loaded(opened, "hf-clip", tmp_path / "out")


def test_a_tower_with_its_projection_and_without_texts_is_an_image_tower(tmp_path):
    path = samples.write("hf-clip", tmp_path, samples.make_clip())

    def change(tensors):
        for name in [n for n in tensors if n.startswith("text_") or n == "logit_scale"]:
            del tensors[name]

    folder = tmp_path / "other"
    folder.mkdir()
    loaded = load.load(samples.damaged(path, "hf-clip", folder, change))
    assert (loaded.family, loaded.kind) == ("hf-clip-vision", "encoder")
    assert loaded.left == ("visual_projection.weight",)


def test_the_image_tower_alone_gives_the_features_of_both(tmp_path):
    networks = samples.make_clip()
    whole = load.load(samples.write("hf-clip", tmp_path, networks))
    alone = load.load(samples.write("hf-clip-vision", tmp_path, networks))
    images = np.random.default_rng(0).integers(0, 256, (2, 24, 24, 3)).astype(np.uint8)
    one, other = (Model(x.networks, x.params).features(images) for x in (whole, alone))
    np.testing.assert_array_equal(one.cls, other.cls)
    assert one.patches.shape == (2, 3, 3, 32)


@pytest.mark.parametrize("family", samples.CLIP)
def test_a_file_is_described_and_fits(tmp_path, capsys, family):
    path = samples.write(family, tmp_path, samples.make_clip())
    assert tool.main([str(path)]) == 0
    printed = capsys.readouterr().out
    assert "3 blocks, width 32, 2 heads, quick-GELU MLP 57, norm eps 1e-05" in printed
    assert "it fits" in printed and "24 pixels, 3x3 patches of 8" in printed
    words = "2 blocks, width 24, 3 heads, quick-GELU MLP 96, norm eps 1e-05, 12 tokens, 64 ids of a"
    assert (
        (words in printed)
        == ("softmax contrast in 20" in printed)
        == (family in FOLDERS[:2] or family.endswith("pth"))
    )


def test_a_bare_file_takes_what_is_given_or_what_most_have_and_says_so(tmp_path, capsys):
    networks = samples.make_clip(width=48, heads=3, text={"width": 64, "heads": 1})
    path = samples.write("hf-clip", tmp_path, networks) / "model.safetensors"
    bare = path.rename(tmp_path / "x.safetensors")
    assert tool.main([str(bare), "--heads", "3"]) == 0
    printed = capsys.readouterr().out
    assert (
        "assumed" in printed and "mlp = quick_gelu (OpenAI's and MetaCLIP's; of LAION's" in printed
    )
    assert "text heads = 1 (width / 64" in printed
    loaded = load.open_(bare, heads=3, mlp="gelu")
    assert loaded.networks.encoder.mlp == loaded.networks.text.mlp == "gelu"
    with pytest.raises(WeightsError, match="attention of encoder .* give it: heads=N"):
        load.open_(bare)
    path = samples.write("timm", tmp_path)
    with pytest.raises(UserError, match="mlp=gelu: .* is timm; leave it out"):
        load.open_(path, mlp="gelu")


def change_config(path, change):
    file = path / ("config.json" if (path / "config.json").exists() else "open_clip_config.json")
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


def put(*keys, value):
    def change(values):
        for key in keys[:-1]:
            values = values[key]
        values[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    "family, change, named",
    [
        ("hf-clip", put("vision_config", "hidden_size", value=48), "hidden_size = 48, not 32"),
        ("hf-clip", put("text_config", "vocab_size", value=65), "vocab_size = 65, not 64"),
        ("hf-clip", put("text_config", "eos_token_id", value=7), "eos_token_id = 7, not 63"),
        ("hf-clip", put("text_config", "hidden_act", value="relu"), "hidden_act = relu is none of"),
        ("hf-clip", put("text_config", value=[]), "text_config = .* is no object"),
        ("hf-clip", put("model_type", value="siglip"), "model_type = siglip is not that"),
        (
            "hf-clip",
            put("vision_config", "layer_norm_eps", value=-1),
            "layer_norm_eps = -1.0 makes",
        ),
        ("open-clip", put("model_cfg", "embed_dim", value=8), "embed_dim = 8, not 20"),
        ("open-clip", put("model_cfg", "text_cfg", "layers", value=3), "layers = 3, not 2"),
        ("open-clip", put("model_cfg", "vision_cfg", "mlp_ratio", value=4.0), "MLP of 128, the"),
        ("open-clip", put("model_cfg", "vision_cfg", "qk_norm", value=True), "qk_norm = True"),
        ("open-clip", put("model_cfg", "vision_cfg", "head_width", value=5), "does not divide"),
        ("open-clip", put("model_cfg", "quick_gelu", value="yes"), "quick_gelu = yes makes no"),
        ("open-clip", put("preprocess_cfg", "std", value=[0, 1]), "are no three numbers"),
    ],
)
def test_a_config_that_contradicts_the_weights_or_this_code_is_refused(
    tmp_path, family, change, named
):
    path = samples.write(family, tmp_path, samples.make_clip())
    change_config(path, change)
    with pytest.raises(WeightsError, match=named) as caught:
        load.open_(path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_the_end_of_texts_in_old_configs_is_the_largest_id(tmp_path):
    path = samples.write("hf-clip", tmp_path, samples.make_clip())
    change_config(path, put("text_config", "eos_token_id", value=2))
    assert load.open_(path).networks.text.pooling == "eot"


@pytest.mark.parametrize("family, name", [
    ("hf-clip", "vision_model.encoder.layers.1.mlp.fc1.weight"),
    ("hf-clip", "text_model.final_layer_norm.bias"),
    ("hf-clip-vision", "vision_model.embeddings.class_embedding"),
    ("open-clip", "visual.ln_post.weight"),
    ("open-clip-pth", "transformer.resblocks.0.attn.in_proj_bias"),
])  # fmt: skip
def test_what_is_missing_misshapen_unknown_or_nan_is_named(tmp_path, family, name):
    # a .pt that is not ours does not state heads: text as published ones
    networks = samples.make_clip(text={"width": 64, "heads": 1})
    path = samples.write(family, tmp_path, networks)

    def refused(change, says):
        folder = tmp_path / says.split()[0]
        folder.mkdir()
        damaged = samples.damaged(path, family, folder, change)
        with pytest.raises(WeightsError, match=says) as caught:
            load.load(damaged, heads=2)
        assert name in str(caught.value) or "extra.weight" in str(caught.value)

    def longer(tensors):
        tensors[name] = np.concatenate([tensors[name], tensors[name][:1]])

    refused(lambda tensors: tensors.pop(name), "missing")
    refused(longer, "shape")
    refused(lambda tensors: tensors.update({"extra.weight": np.zeros(3)}), "not expected")
    refused(lambda tensors: tensors[name].__setitem__(..., np.nan), "NaN")


def start(path, method):
    tree = fresh(method)
    return from_weights(str(path), method, {"params": tree, "teacher": {}})["params"], tree


@pytest.mark.parametrize("family", samples.CLIP)
def test_a_run_of_clip_takes_both_towers_and_the_scale(tmp_path, caplog, family):
    networks = samples.make_clip()
    weights = samples.make_params(networks)
    path = samples.write(family, tmp_path, networks, weights)
    with caplog.at_level(logging.INFO):
        got, before = start(path, networks)
    line = caplog.messages[-1]
    if family == "hf-clip-vision":
        assert_same(got, before | {"encoder": weights["encoder"]})
        assert "fresh: logit_scale, projection, text" in line and "took the encoder," in line
    else:
        assert_same(got, weights)
        assert "took the encoder and the text" in line and "fresh" not in line


def test_a_run_with_other_texts_takes_the_image_tower_alone_and_says_why(tmp_path, caplog):
    path = samples.write("open-clip", tmp_path, samples.make_clip())
    method = samples.make_clip(text={"causal": False, "depth": 1})
    with caplog.at_level(logging.INFO):
        got, before = start(path, method)
    assert "left in the file: the text (depth = 2, not 1; causal = True, not" in caplog.messages[-1]
    assert "logit_scale" in caplog.messages[-1].split("left in the file")[1]
    for name in ("text", "projection", "logit_scale"):
        assert_same({name: got[name]}, before)


def test_a_bias_is_taken_by_a_run_that_has_one(tmp_path, caplog):
    weights = samples.make_params(samples.make_clip("sigmoid"))
    path = samples.write("open-clip", tmp_path, samples.make_clip("sigmoid"), weights)
    got, _ = start(path, samples.make_clip("sigmoid"))
    assert_same(got, weights)
    with caplog.at_level(logging.INFO):
        got, _ = start(path, samples.make_clip())
    assert "left in the file: logit_bias" in caplog.messages[-1] and "logit_bias" not in got


def test_a_method_without_texts_begins_from_the_image_tower(tmp_path, caplog):
    networks = samples.make_clip()
    weights = samples.make_params(networks)
    path = samples.write("hf-clip", tmp_path, networks, weights)
    decoder = dataclasses.replace(samples.make_method().decoder, image_size=24)
    method = MAE(networks.encoder, decoder, view=View(image_size=24))
    with caplog.at_level(logging.INFO):
        got, _ = start(path, method)
    assert_same({"encoder": got["encoder"]}, weights)
    assert "left in the file: the text (this method has none)" in caplog.messages[-1]


def test_another_activation_is_another_encoder(tmp_path):
    path = samples.write("hf-clip", tmp_path, samples.make_clip())
    method = samples.make_clip(mlp="gelu", text={"mlp": "gelu"})
    with pytest.raises(WeightsError, match="another encoder: mlp = quick_gelu, not gelu"):
        start(path, method)


def test_a_bare_file_takes_its_activation_from_the_run(tmp_path, caplog):
    networks = samples.make_clip(mlp="gelu", text={"mlp": "gelu"})
    path = samples.write("hf-clip", tmp_path, networks) / "model.safetensors"
    bare = path.rename(tmp_path / "x.safetensors")
    with caplog.at_level(logging.INFO):
        start(bare, networks)
    assert "mlp = gelu (of the run)" in caplog.messages[-1]


def test_families_without_such_blocks_refuse_the_tower_by_name(tmp_path):
    opened = load.open_(samples.write("hf-clip", tmp_path, samples.make_clip()))
    with pytest.raises(WeightsError, match="hf-vit: its code has no mlp = 'quick_gelu'"):
        publish.export_loaded(opened, "hf-vit", tmp_path / "out")
