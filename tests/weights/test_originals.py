"""Weights in the names of the originals of DINOv3, I-JEPA and MoCo v3: names and shapes are theirs,
what comes back is what was written, and of a whole checkpoint the network that is evaluated is
taken. ``originals.json`` has {name: shape} as their own code makes them, for small sizes."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest
import torch

from tests.weights import samples
from webssl_jax import params
from webssl_jax.models.heads import HeadConfig
from webssl_jax.models.sizes import ViTConfig
from webssl_jax.weights import load
from webssl_jax.weights.families import table_of
from webssl_jax.weights.networks import Networks
from webssl_jax.weights.shapes import known_heads
from webssl_jax.weights.stored import WeightsError

NAMES = json.loads(pathlib.Path(__file__).with_name("originals.json").read_text())
SMALL = dict(width=32, depth=2, heads=4, patch_size=8, image_size=32)
ROPE = dict(position="rope", mask_token=True, num_registers=3, layer_scale=1e-5)
ROPE |= dict(norm_eps=1e-5, mlp_hidden=64)
GATED = dict(mlp="swiglu", mlp_hidden=48, qkv_bias=False)
HEADS = dict(
    dino_head=HeadConfig(24, 8, 20, weight_norm=False),
    ibot_head=HeadConfig(16, 12, 20, weight_norm=False),
)
CASES = {
    "dinov3": ("dinov3-pth", ROPE | dict(key_bias=False), {}),
    "dinov3 with biases of keys": ("dinov3-pth", ROPE, {}),
    "dinov3 7b": ("dinov3-pth", ROPE | GATED, {}),
    "dinov3 training": ("dinov3-teacher", ROPE | dict(key_bias=False, norm_eps=1e-6), HEADS),
    "ijepa": ("ijepa-pth", dict(position="sincos", pooling="mean"), {}),
    "mocov3": ("mocov3-pth", dict(position="sincos_rows"), {}),
}


def networks_of(name):
    family, encoder, heads = CASES[name]
    return family, Networks(ViTConfig(**SMALL | encoder), **heads)


def saved(path):
    """(key, {name: tensor})."""
    found = torch.load(path, weights_only=True)
    key = next((x for x in ("teacher", "target_encoder", "state_dict") if x in found), None)
    return key, dict(found[key] if key else found)


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """(name, family, networks, parameters, the file that was written)."""
    family, networks = networks_of(request.param)
    weights = samples.make_params(networks)
    path = samples.write(family, tmp_path_factory.mktemp("originals"), networks, weights)
    return request.param, family, networks, weights, path


def test_names_and_shapes_are_those_of_the_original(case):
    name, *_, path = case
    assert {key: list(x.shape) for key, x in saved(path)[1].items()} == NAMES[name]


def test_what_was_written_comes_back(case):
    name, family, networks, weights, path = case
    given = {"heads": 4} if name in ("ijepa", "mocov3") else {}  # of no published size
    if family == "dinov3-pth":  # which need not say it: positions are rotated
        given["image_size"] = 32
    back = load.load(path, **given)
    assert back.family == family and not back.left
    wanted = params.flatten(weights)
    got = params.flatten(back.params)
    assert set(got) == set(wanted)
    for key, value in got.items():
        np.testing.assert_array_equal(value, wanted[key], err_msg=key)
    for field in dataclasses.fields(ViTConfig):
        ours = getattr(networks.encoder, field.name)
        if field.name not in ("mlp_hidden", "layer_scale", "init", "position_resize"):
            assert getattr(back.networks.encoder, field.name) == ours, field.name
    assert (back.networks.dino_head, back.networks.ibot_head) == (
        networks.dino_head,
        networks.ibot_head,
    )


def test_biases_of_keys_that_are_masked_are_dead_and_heads_and_base_are_told_by_the_periods(
    tmp_path,
):
    family, networks = networks_of("dinov3")
    encoder = dataclasses.replace(networks.encoder, rope_base=50.0, heads=2)
    networks = Networks(encoder)
    weights = samples.make_params(networks)
    _, tensors = saved(samples.write(family, tmp_path, networks, weights))
    bias = tensors["blocks.1.attn.qkv.bias"]
    assert not bias[32:64].any() and bias[:32].all()
    bias[32:64] = torch.nan
    tensors |= {f"local_cls_norm.{x}": torch.ones(32) for x in ("weight", "bias")}  # the 7B's
    torch.save(tensors, tmp_path / "x.pth")
    back = load.load(tmp_path / "x.pth")
    assert (back.networks.encoder.heads, back.networks.encoder.key_bias) == (2, False)
    assert back.networks.encoder.rope_base == pytest.approx(50, rel=1e-5)
    assert back.left == ("local_cls_norm.weight", "local_cls_norm.bias")
    np.testing.assert_array_equal(
        back.params["encoder"]["blocks"]["attn"]["v"]["bias"],
        weights["encoder"]["blocks"]["attn"]["v"]["bias"],
    )
    mask = "blocks.1.attn.qkv.bias_mask"
    periods = tensors["rope_embed.periods"]
    for name, value in ((mask, torch.ones(96)), ("rope_embed.periods", periods.flip(0))):
        torch.save(tensors | {name: value}, tmp_path / "wrong.pth")
        with pytest.raises(WeightsError, match=f"{name} is not .*off by"):
            load.load(tmp_path / "wrong.pth")
    rounded = periods.bfloat16().float()
    torch.save(tensors | {"rope_embed.periods": rounded}, tmp_path / "rounded.pth")
    assert load.load(tmp_path / "rounded.pth").networks.encoder.heads == 2


@pytest.mark.parametrize("name", ["ijepa", "mocov3"])
def test_of_a_whole_checkpoint_the_network_that_is_evaluated_is_taken(tmp_path, name):
    family, networks = networks_of(name)
    weights = samples.make_params(networks)
    key, tensors = saved(samples.write(family, tmp_path, networks, weights))
    other = {k: x if "pos_embed" in k else x + 1 for k, x in tensors.items()}
    whole = {"encoder": other, "predictor": {"module.mask_token": torch.ones(1, 1, 4)}}
    if name == "ijepa":
        own = {f"module.{k}": x for k, x in tensors.items()}  # as its checkpoints call them
    else:
        momentum = {k.replace("base", "momentum"): x for k, x in other.items()}
        head = {"module.base_encoder.head.0.weight": torch.ones(4, 32)}
        own, whole = momentum | tensors | head, {}
        own |= {"module.predictor.0.weight": torch.ones(4, 4)}
    torch.save(whole | {key: own, "epoch": 300}, tmp_path / "x.pth.tar")
    back = load.load(tmp_path / "x.pth.tar", heads=4)
    assert (back.family, back.inside) == (family, key)
    bias = weights["encoder"]["norm"]["bias"]
    np.testing.assert_array_equal(back.params["encoder"]["norm"]["bias"], bias)
    if name == "mocov3":
        table = table_of(family, back.networks)
        assert table.family == family and len(back.left) == len(momentum) + 2
        file = f"{tmp_path / 'x.pth.tar'}:state_dict/module.momentum_encoder"  # by its place
        average = load.load(file, heads=4).params["encoder"]["norm"]["bias"]
        np.testing.assert_allclose(average, bias + 1, rtol=1e-6)


def test_what_their_code_computes_otherwise_is_refused(tmp_path):
    for name, field, said in (
        ("dinov3", {"norm_eps": 1e-6}, "norm_eps = 1e-05 built in"),
        ("mocov3", {"image_size": (32, 48)}, "knows square grids alone"),
        ("ijepa", {"mlp": "swiglu"}, "has no mlp"),
    ):
        family, networks = networks_of(name)
        networks = Networks(dataclasses.replace(networks.encoder, **field))
        with pytest.raises(WeightsError, match=said):
            samples.write(family, tmp_path, networks)


def test_heads_of_published_sizes_follow_from_the_kind_of_positions():
    small = dict(width=384, depth=12)
    assert known_heads(small | {"position": "sincos_rows"}) == 12  # MoCo v3's ViT-S
    assert known_heads(small | {"position": "sincos"}) == 6
    huge = dict(width=1280, depth=32)
    assert known_heads(huge | {"position": "rope"}) == 20  # DINOv3's H+
    assert known_heads(huge | {"position": "sincos"}) == 16
