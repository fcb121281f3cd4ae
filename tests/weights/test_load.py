"""Weights of every family in, out again and across, bit by bit; whatever contradicts is named."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
import torch

from tests.weights import big_files, samples
from webssl_jax import params, publish
from webssl_jax.config import UserError
from webssl_jax.models import sizes
from webssl_jax.weights import load, safetensors_io, shapes
from webssl_jax.weights.families import FAMILIES
from webssl_jax.weights.given import Given
from webssl_jax.weights.stored import WeightsError

ROOT = pathlib.Path(__file__).parents[2]


def refused(path, named, **options):
    with pytest.raises(WeightsError, match=named) as caught:
        load.load(path, **options)
    assert "\n" not in str(caught.value)


def configure(folder, name="config.json", **changes):
    file = folder / name
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("family", samples.FAMILIES)
@pytest.mark.parametrize("encoder", [{}, {"position": "learned"}, {"qkv_bias": False}], ids=str)
def test_import_export_import_is_bit_identical_within_and_across_families(
    tmp_path, family, encoder
):
    method = samples.make_method(**encoder)
    weights = samples.make_params(method)
    first = samples.write(family, tmp_path, method, weights, max_file_bytes=20_000)
    loaded = load.load(first)
    kind = "mae" if family in samples.BOTH else "encoder"
    assert (loaded.family, loaded.kind, loaded.dtype) == (family, kind, "float32")
    same = ("width", "depth", "heads", "patch_size", "image_size", "hidden", "position", "norm_eps")
    for ours, theirs in (
        (method.encoder, loaded.networks.encoder),
        (method.decoder, loaded.networks.decoder),
    ):
        assert theirs is None or all(getattr(ours, f) == getattr(theirs, f) for f in same)
    if kind == "mae":
        assert (loaded.networks.mask_ratio, loaded.networks.norm_pix_loss) == (0.6, False)
    samples.assert_same(loaded.params, weights, kind)
    for other in samples.FAMILIES if kind == "mae" else ("hf-vit", "timm"):
        output = tmp_path / f"second-{other}.pth"
        publish.export_loaded(load.open_(first), other, output)
        again = load.load(output)
        assert again.family == other
        samples.assert_same(again.params, weights, again.kind)


@pytest.mark.parametrize("family", samples.FAMILIES)
def test_bfloat16_is_half_the_size_and_comes_back_as_it_was_rounded(tmp_path, family):
    weights = samples.make_params(samples.make_method())
    rounded = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float32), weights)
    loaded = load.load(samples.write(family, tmp_path, weights=weights, dtype="bfloat16"))
    assert loaded.dtype == "bfloat16"
    samples.assert_same(loaded.params, rounded, loaded.kind)


def test_float16_is_read_too(tmp_path):
    path = samples.write("mae-pth", tmp_path)
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["model"] = {name: x.half() for name, x in checkpoint["model"].items()}
    torch.save(checkpoint, path)
    weights = samples.make_params(samples.make_method())
    halved = jax.tree.map(lambda x: x.astype(np.float16).astype(np.float32), weights)
    loaded = load.load(path)
    assert loaded.dtype == "float16" and loaded.networks.encoder.position == "sincos"
    samples.assert_same(loaded.params, halved, "mae")


def test_a_published_file_needs_no_word_about_its_heads(tmp_path):
    """As webssl-mae*.pth are: an encoder in timm's names, and nothing beside the tensors."""
    path = samples.write("mae-pth", tmp_path)
    model = torch.load(path, weights_only=True)["model"]
    bare = {k: v for k, v in model.items() if not k.startswith(("decoder", "mask_token"))}
    torch.save(bare, path)
    loaded = load.load(path)
    assert (loaded.family, loaded.kind, loaded.networks.encoder.heads) == ("timm", "encoder", 2)
    assert shapes.size_name(loaded.networks.encoder) == "web-mae-micro"
    torch.save({"model": {f"module.{k}": v for k, v in bare.items()}}, path)
    samples.assert_same(load.load(path).params, loaded.params, "encoder")


def test_of_an_unknown_size_the_heads_are_asked_for(tmp_path):
    path = samples.write("mae-pth", tmp_path, samples.make_method(width=48, heads=3))
    model = torch.load(path, weights_only=True)["model"]
    torch.save({"model": model}, path)
    refused(path, "does not say how many heads.*heads=N")
    refused(path, "heads its decoder has.*decoder_heads=N", heads=3)
    refused(path, "48 does not divide", heads=5, decoder_heads=2)
    assert load.load(path, heads=3, decoder_heads=2).networks.encoder.heads == 3


def bare_safetensors(tmp_path, **encoder):
    """An encoder of transformers without its config.json."""
    folder = samples.write("hf-vit", tmp_path, samples.make_method(**encoder))
    return (folder / "model.safetensors").rename(tmp_path / "bare.safetensors")


def test_heads_that_are_given_go_before_those_of_the_published_size(tmp_path):
    path = bare_safetensors(tmp_path, heads=4)  # web-mae-micro has 2
    assert load.open_(path).networks.encoder.heads == 2
    assert load.open_(path, heads=4).networks.encoder.heads == 4


def test_heads_that_contradict_the_file_are_refused(tmp_path):
    path = samples.write("hf-vit-mae", tmp_path)
    assert load.open_(path, heads=2, decoder_heads=4).networks.encoder.heads == 2
    refused(path, "states heads = 2, but heads=4 was given", heads=4)
    refused(path, "states decoder_heads = 4, but decoder_heads=2 was given", decoder_heads=2)


@pytest.mark.parametrize("given", [{"heads": 0}, {"heads": -2}, {"decoder_heads": -2}], ids=str)
def test_no_number_of_heads_is_refused_even_where_it_is_not_needed(tmp_path, given):
    path = samples.write("hf-vit", tmp_path)
    with pytest.raises(UserError, match=f"{next(iter(given))}=.*: must be at least 1"):
        load.open_(path, **given)


def test_what_nothing_says_is_told_as_assumed(tmp_path):
    heads = "heads = 2 (of the published size)"
    eps = "norm_eps = 1e-06 (no config.json says it; transformers' default is 1e-12)"
    path = bare_safetensors(tmp_path)
    assert load.open_(path).assumed == (heads, eps)
    assert load.open_(path, heads=2).assumed == (eps,)
    folder = samples.write("timm", tmp_path)
    assert load.open_(folder).assumed == ()
    bare = (folder / "model.safetensors").rename(tmp_path / "timm.safetensors")
    assert load.open_(bare).assumed == (heads,)  # the epsilon is built into timm


@pytest.mark.parametrize("size", sizes.WEB_MAE_SIZES)
def test_every_published_size_is_known_by_its_shapes(size):
    c = sizes.web_mae(size)
    assert shapes.size_name(c) == f"web-mae-{size}"
    assert shapes.known_heads({"width": c.width, "depth": c.depth}) == c.heads


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_positions_that_are_not_the_sin_cos_table_become_a_parameter(tmp_path, value):
    """0 is what a fresh ViTMAE of transformers 5 holds; its features are those of such a table."""
    path = samples.write("hf-vit", tmp_path)
    key = "embeddings.position_embeddings"
    file = path / "model.safetensors"
    tensor = safetensors_io.open_file(file)[key]
    data = bytearray(file.read_bytes())
    table = np.full(tensor.shape, value, np.float32)
    data[tensor.offset : tensor.offset + table.nbytes] = table.tobytes()
    file.write_bytes(data)
    loaded = load.load(path)
    assert loaded.networks.encoder.position == "learned"
    np.testing.assert_array_equal(loaded.params["encoder"]["pos_embed"], table)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": 64},
        {"num_hidden_layers": 3},
        {"intermediate_size": 64},
        {"patch_size": 16},
        {"image_size": 224},
        {"qkv_bias": False},
        {"hidden_act": "gelu_new"},
        {"num_channels": 1},
        {"decoder_hidden_size": 512},
        {"decoder_num_hidden_layers": 2},
        {"num_attention_heads": 3},
        {"num_attention_heads": "2"},
        {"layer_norm_eps": 0},
        {"layer_norm_eps": "1e-6"},
        {"mask_ratio": 0.0},
        {"mask_ratio": 1.5},
        {"norm_pix_loss": None},
        {"model_type": "clip"},
        {"model_type": None},
    ],
    ids=str,
)
def test_a_config_that_disagrees_is_refused_by_name(tmp_path, change):
    path = samples.write("hf-vit-mae", tmp_path)
    configure(path, **change)
    name = next(iter(change))
    refused(path, {"num_attention_heads": "heads"}.get(name, name))


@pytest.mark.parametrize(
    "change",
    [
        {"embed_dim": 64},
        {"depth": 3},
        {"img_size": 48},
        {"mlp_ratio": 3.9},
        {"mlp_ratio": "4"},
        {"act_layer": "quick_gelu"},
        {"norm_layer": "layernorm"},
        {"class_token": False},
        {"init_values": 1e-5},
        {"of_a_later_timm": [1]},
    ],
    ids=str,
)
def test_a_config_of_timm_that_disagrees_is_refused_by_name(tmp_path, change):
    path = samples.write("timm", tmp_path)
    configure(path, model_args=change)
    refused(path, next(iter(change)))


def test_what_timm_may_say_of_a_plain_vit_is_taken(tmp_path):
    path = samples.write("timm", tmp_path)
    plain = dict(act_layer="gelu", norm_layer=None, class_token=True, reg_tokens=0, mlp_ratio=4.01)
    free = dict(num_classes=1000, global_pool="avg", drop_path_rate=0.1, dynamic_img_size=True)
    configure(path, model_args=plain | free | {"num_heads": 4})
    assert load.open_(path).networks.encoder.heads == 4


def test_colours_come_from_the_folder(tmp_path):
    path = samples.write("hf-vit", tmp_path)
    assert load.open_(path).networks.preprocess == samples.make_method().preprocess
    configure(path, "preprocessor_config.json", image_mean=[0.5, 0.4, 0.3])
    assert load.open_(path).networks.preprocess.mean == (0.5, 0.4, 0.3)
    configure(path, "preprocessor_config.json", image_std=[1, 2])
    refused(path, "colours")


def test_what_is_not_weights_is_refused_by_name(tmp_path):
    refused(tmp_path / "nothing", "nothing: no such file")
    refused(tmp_path, "holds none of model.safetensors")
    path = samples.write("hf-vit", tmp_path)
    refused(path, "no weight family 'vit'", family="vit")
    refused(path, "missing from the file", family="timm")
    (path / "config.json").unlink()
    refused(path, "has no config.json")
    torch.save({"model": {"a.weight": torch.zeros(2)}}, tmp_path / "x.pth")
    refused(tmp_path / "x.pth", "belong to none of hf-vit")
    torch.save({"epoch": 3}, tmp_path / "x.pth")
    refused(tmp_path / "x.pth", "holds no tensors")
    torch.save({}, tmp_path / "x.pth")
    refused(tmp_path / "x.pth", "holds no tensors")


def test_an_index_and_its_files_must_agree(tmp_path):
    path = samples.write("hf-vit", tmp_path, max_file_bytes=40_000)
    index = path / safetensors_io.INDEX_FILE
    assert load.load(index).family == "hf-vit"
    where = json.loads(index.read_text())["weight_map"]
    first, second = sorted(set(where.values()))[:2]
    swapped = {k: {first: second, second: first}.get(v, v) for k, v in where.items()}
    for weight_map, named in (
        (swapped, "the index says"),
        (where | {"x": first}, "promises x"),
        (where | {"x": "../x.safetensors"}, "outside its folder"),
        (where | {"x": "gone.safetensors"}, "not there: gone.safetensors"),
        (list(where), "is not an index"),
    ):
        index.write_text(json.dumps({"weight_map": weight_map}))
        refused(path, named)


def test_values_beyond_bfloat16_are_not_written_as_infinity(tmp_path):
    weights = samples.make_params(samples.make_method())
    weights["encoder"]["norm"]["bias"][0] = 3.4e38
    with pytest.raises(WeightsError, match="layernorm.bias has values too large for bfloat16"):
        samples.write("hf-vit", tmp_path, weights=weights, dtype="bfloat16")
    assert list(tmp_path.iterdir()) == []


def test_an_export_that_fails_half_way_leaves_nothing(tmp_path):
    weights = samples.make_params(samples.make_method())
    weights["encoder"]["norm"]["bias"][0] = np.nan
    for family in samples.FAMILIES:
        with pytest.raises(WeightsError, match="NaN or infinity"):
            samples.write(family, tmp_path, weights=weights)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("family", samples.BOTH)
def test_weights_without_a_decoder_are_not_written_where_one_is_needed(tmp_path, family):
    loaded = load.open_(samples.write("timm", tmp_path))
    with pytest.raises(WeightsError, match=f"{family}: needs a decoder"):
        publish.export_loaded(loaded, family, tmp_path / "x.pth")
    assert not (tmp_path / "x.pth").exists()


_CONVERT = """
import resource, sys
from webssl_jax import publish
from webssl_jax.weights import load
load.open_(sys.argv[3])  # everything that any conversion imports and allocates once
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
publish.export_loaded(load.open_(sys.argv[1]), "timm", sys.argv[2], "bfloat16")
print(before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def convert(tmp_path, encoder):
    """(bytes of the tensors, kB resident before and at the most) of a conversion in a child."""
    small = tmp_path / "small"
    big_files.write(small, sizes.web_mae("micro"))
    size = big_files.write(tmp_path / "in", encoder)
    arguments = map(str, (tmp_path / "in", tmp_path / "out", small))
    output = subprocess.run(
        [sys.executable, "-c", _CONVERT, *arguments],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return (size, *map(int, output.split()))


def test_a_conversion_holds_one_tensor_and_not_the_model(tmp_path):
    encoder = sizes.web_mae("300m", width=512, heads=8, depth=64)
    size, before, most = convert(tmp_path, encoder)
    assert size > 400e6
    # measured: 0, as imports alone had needed more; a whole model would be 404 MB
    assert most - before < 60_000


@pytest.mark.slow
def test_the_5b_model_passes_through_4_gb(tmp_path):
    size, _, most = convert(tmp_path, sizes.web_mae("5b"))
    assert size > 9.8e9 and most < 4e6


def test_headers_alone_say_what_a_file_is(tmp_path):
    """Nothing but the position table of 5B parameters is read."""
    big_files.write(tmp_path / "in", sizes.web_mae("5b"))
    opened = load.open_(tmp_path / "in")
    assert (
        shapes.size_name(opened.networks.encoder) == "web-mae-5b"
        and opened.networks.encoder.position == "sincos"
    )
    assert params.count(opened.params) == 4_937_035_264 - 257 * 3584


@pytest.mark.parametrize("family", ("hf-vit", "hf-vit-mae", "hf-dinov2", "hf-clip"))
def test_a_transposed_tensor_is_blamed_and_not_the_config(tmp_path, family):
    made = {"hf-dinov2": samples.make_dino, "hf-clip": samples.make_clip}
    path = samples.write(family, tmp_path, made.get(family, samples.make_method)())
    tensors = load.open_files(path).tensors
    name = next(
        key
        for key in tensors
        if key.endswith(("fc1.weight", "intermediate.dense.weight", "weights_in.weight"))
    )
    (tmp_path / "turned").mkdir()

    def turn(arrays):
        arrays[name] = arrays[name].T.copy()

    turned = samples.damaged(path, family, tmp_path / "turned", turn)
    refused(turned, f"of another shape: {name} is .*transposed")


def test_nan_in_a_file_is_named_with_its_tensor_when_it_is_converted(tmp_path):
    path = samples.write("hf-vit", tmp_path)
    name = "encoder.layer.1.layernorm_after.bias"

    def spoil(arrays):
        arrays[name][3] = np.nan

    (tmp_path / "bad").mkdir()
    bad = samples.damaged(path, "hf-vit", tmp_path / "bad", spoil)
    with pytest.raises(WeightsError, match=f"the tensor {name} .* NaN or infinity; nothing was ex"):
        publish.export_loaded(load.open_(bad), "timm", tmp_path / "out")


def test_a_family_that_says_nothing_of_its_epsilon_gets_ours_and_that_is_told(tmp_path):
    """As somebody adds one: neither a config nor code with the epsilon built in."""
    path = samples.write("dinov2-pth", tmp_path, samples.make_dino())
    family = dataclasses.replace(FAMILIES["dinov2-pth"], fixed_eps=False)
    networks, _, assumed = load.describe(load.open_files(path), family, Given(heads=2))
    assert networks.encoder.norm_eps == 1e-6 and "norm_eps = 1e-06 (nothing says it)" in assumed
