"""Web-MAE against transformers' ViTMAE and ViT: same weights, images and noise give the same
numbers.

Weights are random, with no zero bias and no unit norm scale, so that a swapped or transposed tensor
shows. The mapping between the two parameter trees is written here again, apart from
``webssl_jax/weights``, so that the two check each other. A fresh ViTMAE of transformers 5 has
position tables of zeros: the tests fill them with its own builder.
"""

import functools

import jax
import numpy as np
import pytest
import torch
from ml_collections import ConfigDict
from transformers import ViTConfig, ViTMAEConfig, ViTMAEForPreTraining, ViTModel
from transformers.models.vit_mae.modeling_vit_mae import build_2d_sinusoidal_position_embedding

from webssl_jax import methods, params
from webssl_jax.methods.base import Variables
from webssl_jax.model import Model
from webssl_jax.models import pixels, position

# Largest difference over largest value of a tensor, float32 on both sides. Measured over both cases
# with and without norm_pix_loss: loss 4e-7, prediction 6e-7, worst gradient of the 44 parameters
# 1.0e-6.
TOLERANCE = 1e-5

# The second has an odd grid, another head size in encoder and decoder, and a ratio whose count is
# truncated.
CASES = {
    "even": dict(
        size=32,
        patch=8,
        width=32,
        depth=2,
        heads=2,
        mlp=128,
        d_width=24,
        d_depth=1,
        d_heads=3,
        ratio=0.75,
    ),
    "odd": dict(
        size=20,
        patch=4,
        width=48,
        depth=3,
        heads=3,
        mlp=80,
        d_width=40,
        d_depth=2,
        d_heads=5,
        ratio=0.65,
    ),
}


def randomise(module):
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if "position" in name or "pos_embed" in name:
                continue
            noise = torch.randn_like(p)
            if p.ndim == 1:
                p.copy_(0.3 * noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
            else:
                p.copy_(noise * (0.5 if "token" in name else p[0].numel() ** -0.5))
    return module.eval()


def hf_table(width, side):
    """The table transformers computes, in the released weights' order (its comment: halves
    swapped)."""
    table = build_2d_sinusoidal_position_embedding(side, side, width, cls_token=True)
    return torch.cat([table[:, width // 2 :], table[:, : width // 2]], dim=1)[None]


def kernel(x):
    return np.asarray(x).T


def blocks(tensors, prefix, depth):
    """{our path: stacked array} of a list of transformer layers."""
    names = {
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "attn/q": "attention.q_proj",
        "attn/k": "attention.k_proj",
        "attn/v": "attention.v_proj",
        "attn/out": "attention.o_proj",
        "mlp/fc1": "mlp.fc1",
        "mlp/fc2": "mlp.fc2",
    }
    out = {}
    for ours, theirs in names.items():
        weights = [np.asarray(tensors[f"{prefix}.{i}.{theirs}.weight"]) for i in range(depth)]
        biases = [np.asarray(tensors[f"{prefix}.{i}.{theirs}.bias"]) for i in range(depth)]
        if ours.startswith("norm"):
            out[f"{ours}/scale"] = np.stack(weights)
        else:
            out[f"{ours}/kernel"] = np.stack([kernel(w) for w in weights])
        out[f"{ours}/bias"] = np.stack(biases)
    return {f"blocks/{path}": x for path, x in out.items()}


def encoder_tree(t, prefix, depth):
    flat = blocks(t, f"{prefix}layers", depth)
    patch_embed = f"{prefix}embeddings.patch_embeddings.projection"
    flat["patch_embed/kernel"] = np.asarray(t[f"{patch_embed}.weight"]).transpose(2, 3, 1, 0)
    flat["patch_embed/bias"] = np.asarray(t[f"{patch_embed}.bias"])
    flat["cls_token"] = np.asarray(t[f"{prefix}embeddings.cls_token"])
    flat["norm/scale"] = np.asarray(t[f"{prefix}layernorm.weight"])
    flat["norm/bias"] = np.asarray(t[f"{prefix}layernorm.bias"])
    return flat


def decoder_tree(t, depth):
    flat = blocks(t, "decoder.decoder_layers", depth)
    flat["mask_token"] = np.asarray(t["decoder.mask_token"])
    for ours, theirs in {"embed": "decoder_embed", "pred": "decoder_pred"}.items():
        flat[f"{ours}/kernel"] = kernel(t[f"decoder.{theirs}.weight"])
        flat[f"{ours}/bias"] = np.asarray(t[f"decoder.{theirs}.bias"])
    flat["norm/scale"] = np.asarray(t["decoder.decoder_norm.weight"])
    flat["norm/bias"] = np.asarray(t["decoder.decoder_norm.bias"])
    return flat


def mae_tree(t, case):
    flat = {f"encoder/{path}": x for path, x in encoder_tree(t, "vit.", case["depth"]).items()}
    return params.unflatten(
        flat | {f"decoder/{path}": x for path, x in decoder_tree(t, case["d_depth"]).items()}
    )


@functools.cache
def run_both(name, norm_pix_loss):
    """(theirs, ours): dicts of loss, prediction, mask and a gradient tree in our layout."""
    case = CASES[name]
    config = ViTMAEConfig(
        hidden_size=case["width"],
        num_hidden_layers=case["depth"],
        num_attention_heads=case["heads"],
        intermediate_size=case["mlp"],
        image_size=case["size"],
        patch_size=case["patch"],
        layer_norm_eps=1e-6,
        decoder_hidden_size=case["d_width"],
        decoder_num_hidden_layers=case["d_depth"],
        decoder_num_attention_heads=case["d_heads"],
        decoder_intermediate_size=4 * case["d_width"],
        mask_ratio=case["ratio"],
        norm_pix_loss=norm_pix_loss,
    )
    theirs = randomise(ViTMAEForPreTraining(config))
    side = case["size"] // case["patch"]
    theirs.vit.embeddings.position_embeddings.data = hf_table(case["width"], side)
    theirs.decoder.decoder_pos_embed.data = hf_table(case["d_width"], side)

    ours = methods.create(
        ConfigDict(
            {
                "model": {
                    "width": case["width"],
                    "depth": case["depth"],
                    "heads": case["heads"],
                    "patch_size": case["patch"],
                    "mlp_hidden": case["mlp"],
                },
                "method": {
                    "name": "mae",
                    "mask_ratio": case["ratio"],
                    "norm_pix_loss": norm_pix_loss,
                    "view": {"image_size": case["size"]},
                    "decoder": {
                        "width": case["d_width"],
                        "depth": case["d_depth"],
                        "heads": case["d_heads"],
                    },
                },
            }
        )
    )

    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (5, case["size"], case["size"], 3), np.uint8)
    noise = rng.random((5, side * side), np.float32)
    values = np.array(pixels.normalise(images, ours.mean, ours.std)).transpose(0, 3, 1, 2)
    out = theirs(torch.tensor(values), noise=torch.tensor(noise))
    out.loss.backward()
    gradients = {
        k: p.grad if p.grad is not None else torch.zeros_like(p)
        for k, p in theirs.named_parameters()
    }

    batch = {"image": images, "noise": noise}
    tree = mae_tree({k: v.detach() for k, v in theirs.state_dict().items()}, case)
    made = ours.init(jax.random.key(0), ours.batch_spec(1)).params
    assert jax.tree.map(np.shape, tree) == jax.tree.map(np.shape, made)
    made = Model.of(ours, Variables(tree, {}, {})).reconstruct(images, noise)
    loss, gradient = jax.jit(
        jax.value_and_grad(lambda p: ours.loss(p, {}, {}, batch, jax.random.key(0), {}).loss)
    )(tree)
    return (
        dict(
            loss=out.loss.item(),
            prediction=out.logits.detach().numpy(),
            mask=out.mask.numpy(),
            gradient=mae_tree(gradients, case),
        ),
        dict(loss=loss, prediction=made.prediction, mask=made.mask, gradient=gradient),
    )


def relative(ours, theirs):
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


@pytest.mark.parametrize(("name", "norm_pix_loss"), [("even", False), ("odd", True)])
def test_loss_prediction_and_mask_equal_those_of_transformers(name, norm_pix_loss):
    theirs, ours = run_both(name, norm_pix_loss)
    np.testing.assert_array_equal(ours["mask"], theirs["mask"])
    assert relative(ours["loss"], theirs["loss"]) < TOLERANCE
    assert relative(ours["prediction"], theirs["prediction"]) < TOLERANCE


@pytest.mark.parametrize(("name", "norm_pix_loss"), [("even", False), ("odd", True)])
def test_every_gradient_equals_that_of_transformers(name, norm_pix_loss):
    theirs, ours = run_both(name, norm_pix_loss)
    expected, got = params.flatten(theirs["gradient"]), params.flatten(ours["gradient"])
    assert set(expected) == set(got)
    largest = max(np.abs(x).max() for x in expected.values())
    for path, gradient in expected.items():
        if path.endswith("attn/k/bias"):
            # Adding one vector to all keys moves all scores of a query alike: the true gradient is
            # 0. Measured 4e-9.
            assert np.abs(got[path]).max() < 1e-6 * largest
        else:
            assert relative(got[path], gradient) < TOLERANCE, path


@pytest.mark.parametrize(("width", "side"), [(24, 4), (64, 7), (1024, 16)])
def test_the_position_table_equals_that_of_transformers(width, side):
    theirs = hf_table(width, side)[0].numpy()
    assert not theirs[0].any()
    np.testing.assert_allclose(position.sincos_2d(width, (side, side)), theirs[1:], atol=1e-6)


@pytest.mark.parametrize("shape", [(32, 32), (48, 48), (40, 24)])
def test_the_encoder_without_masking_equals_vit_at_its_own_and_other_resolutions(shape):
    theirs = randomise(
        ViTModel(
            ViTConfig(
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=128,
                image_size=32,
                patch_size=8,
                layer_norm_eps=1e-6,
            ),
            add_pooling_layer=False,
        )
    )
    theirs.embeddings.position_embeddings.data = hf_table(32, 4)
    ours = methods.create(
        ConfigDict(
            {"model": {"size": "micro"}, "method": {"name": "mae", "view": {"image_size": 32}}}
        )
    )
    tree = params.unflatten(
        encoder_tree({k: v.detach() for k, v in theirs.state_dict().items()}, "", 2)
    )
    images = np.random.default_rng(0).integers(0, 256, (3, *shape, 3), np.uint8)
    values = torch.tensor(
        np.array(pixels.normalise(images, ours.mean, ours.std)).transpose(0, 3, 1, 2)
    )
    with torch.no_grad():
        expected = theirs(values, interpolate_pos_encoding=True).last_hidden_state.numpy()
    got = Model.of(ours, Variables({"encoder": tree}, {}, {})).features(images)
    assert relative(got.cls, expected[:, 0]) < TOLERANCE
    assert relative(np.asarray(got.patches).reshape(3, -1, 32), expected[:, 1:]) < TOLERANCE
