"""Encoders of DINOv3 and I-JEPA against transformers: features at two sizes, masked patches, the
attention that pictures show, and folders both ways."""

import jax
import numpy as np
import pytest
import torch
import transformers

from tests.weights import samples
from webssl_jax import params, publish
from webssl_jax.models.features import Want, compute_features
from webssl_jax.models.sizes import ViTConfig
from webssl_jax.models.vit import ViT
from webssl_jax.weights import load
from webssl_jax.weights.card import Named
from webssl_jax.weights.networks import Networks
from webssl_jax.weights.tables import WeightsError

TOLERANCE = 1e-5
SMALL = dict(width=32, depth=2, heads=4, patch_size=8, image_size=32)
DINOV3 = dict(
    position="rope",
    key_bias=False,
    mask_token=True,
    num_registers=3,
    layer_scale=1e-5,
    norm_eps=1e-5,
)
CASES = {
    "dinov3": ("hf-dinov3", "DINOv3ViTModel", DINOV3),
    # the 7B's block: a gated MLP, no biases of q and v either; another base
    "dinov3-7b": (
        "hf-dinov3",
        "DINOv3ViTModel",
        DINOV3 | dict(mlp="swiglu", mlp_hidden=48, qkv_bias=False, rope_base=50.0),
    ),
    "ijepa": ("hf-ijepa", "IJepaModel", dict(pooling="mean", position="sincos")),
}


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """(networks, our parameters, the folder, transformers' model of it)."""
    family, model, fields = CASES[request.param]
    networks = Networks(ViTConfig(**SMALL | fields))
    weights = samples.make_params(networks)
    folder = samples.write(family, tmp_path_factory.mktemp("export"), networks, weights)
    theirs, info = getattr(transformers, model).from_pretrained(
        folder,
        output_loading_info=True,
        attn_implementation="eager",
        **({"add_pooling_layer": False} if family == "hf-ijepa" else {}),
    )
    assert not any(info.values()), info
    return networks, weights, folder, theirs.eval()


def images(height, width):
    x = np.random.default_rng(0).standard_normal((2, height, width, 3), np.float32)
    return x, torch.from_numpy(x.transpose(0, 3, 1, 2).copy())


def tokens_of(c, out):
    cls = [out.cls[:, None]] if c.pooling == "cls" else []
    return np.concatenate([*cls, out.registers, out.patches], axis=1)


@pytest.mark.parametrize("size", [(32, 32), (40, 24)])
def test_features_are_those_of_transformers(case, size):
    networks, weights, _, model = case
    ours, theirs = images(*size)
    c = networks.encoder
    out = ViT(c).apply({"params": weights["encoder"]}, ours)
    more = {"interpolate_pos_encoding": True} if c.pooling == "mean" else {}
    with torch.no_grad():
        wanted = model(theirs, **more).last_hidden_state.numpy()
    assert np.linalg.norm(tokens_of(c, out) - wanted) < TOLERANCE * np.linalg.norm(wanted)
    if c.pooling == "mean":
        np.testing.assert_allclose(out.cls, wanted.mean(axis=1), atol=1e-5)


def test_masked_patches_and_the_attention_of_pictures_are_those_of_transformers(case):
    networks, weights, _, model = case
    ours, theirs = images(40, 24)
    c = networks.encoder
    if c.mask_token:
        mask = np.random.default_rng(1).random((2, 15)) < 0.4
        out = ViT(c).apply({"params": weights["encoder"]}, ours, mask=mask)
        with torch.no_grad():
            wanted = model(theirs, bool_masked_pos=torch.from_numpy(mask)).last_hidden_state.numpy()
        assert np.linalg.norm(tokens_of(c, out) - wanted) < TOLERANCE * np.linalg.norm(wanted)
    want = Want(patches="none", diagnostics=True)
    seen = compute_features(c, weights["encoder"], ours, want).diagnostics.attention
    more = {"interpolate_pos_encoding": True} if c.pooling == "mean" else {}
    with torch.no_grad():
        last = model(theirs, output_attentions=True, **more).attentions[-1].numpy()
    rows = last[:, :, 0] if c.pooling == "cls" else last.mean(axis=2)
    np.testing.assert_allclose(seen.reshape(2, 4, -1), rows[:, :, c.prefix :], atol=1e-5)


def test_what_transformers_saves_comes_back_bit_for_bit_and_known(case, tmp_path):
    networks, weights, _, model = case
    model.save_pretrained(tmp_path)
    back = load.load(tmp_path)
    assert not back.assumed and back.family.startswith("hf-")
    for field in ("position", "pooling", "key_bias", "qkv_bias", "rope_base", "mlp", "heads"):
        assert getattr(back.networks.encoder, field) == getattr(networks.encoder, field), field
    jax.tree.map(np.testing.assert_array_equal, back.params["encoder"], weights["encoder"])


def test_formats_of_other_encoders_refuse_them(case, tmp_path):
    networks, weights, _, _ = case
    for family in ("hf-vit", "timm", "dinov2-pth", "hf-dinov3", "hf-ijepa"):
        own = "hf-ijepa" if networks.encoder.pooling == "mean" else "hf-dinov3"
        if family != own:
            with pytest.raises(WeightsError, match="its networks have"):
                samples.write(family, tmp_path, networks, weights)


def test_a_position_says_nothing_of_the_size_of_an_image():
    """Rotated positions: the parameters are the same at every image size."""
    small, large = (ViTConfig(**SMALL | DINOV3 | {"image_size": size}) for size in (32, 64))
    shapes = [params.flatten(samples.shapes_of(Networks(c))) for c in (small, large)]
    assert {k: v.shape for k, v in shapes[0].items()} == {k: v.shape for k, v in shapes[1].items()}


def test_the_licence_is_said_once_and_stands_in_the_card_of_what_is_converted(
    case, tmp_path, caplog
):
    networks, _, folder, _ = case
    load._say.cache_clear()
    opened = [load.open_(folder) for _ in range(2)][0]
    said = [x for x in caplog.messages if "weights published in this format" in x]
    made = publish.export_loaded(opened, opened.family, tmp_path / "out")
    card = (made / "README.md").read_text()
    ijepa = networks.encoder.pooling == "mean"
    assert len(said) == 1 and ("CC BY-NC" if ijepa else "DINOv3 License") in said[0]
    assert "license: cc-by-nc-4.0\n" in card if ijepa else "license_name: dinov3-license\n" in card
    named = Named("a", "apache-2.0")  # what is one's own
    made = publish.export_loaded(opened, opened.family, tmp_path / "own", named=named)
    assert "license: apache-2.0\n" in (made / "README.md").read_text()
