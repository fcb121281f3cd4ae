"""The block of Web-DINO (SwiGLU, LayerScale, registers, mask token, learned positions) against
transformers.

Other resolutions are compared without registers only: ``Dinov2WithRegistersModel`` resizes its
positions with antialias = True (another kernel, a = -0.5), as DINOv2's released register models do
and Web-DINO does not.
"""

import jax
import numpy as np
import pytest
import torch
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
)

from webssl_jax import params
from webssl_jax.models import sizes
from webssl_jax.models.vit import ViT

TOLERANCE = 1e-5  # of outputs of unit variance, float32 on both sides. Measured: 2.5e-6.


def make(registers):
    torch.manual_seed(0)
    shape = dict(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        use_swiglu_ffn=True,
        layer_norm_eps=1e-6,
    )
    if registers:
        model = Dinov2WithRegistersModel(
            Dinov2WithRegistersConfig(num_register_tokens=registers, **shape)
        )
    else:
        model = Dinov2Model(Dinov2Config(**shape))
    with torch.no_grad():
        for name, p in model.named_parameters():
            one = 1.0 if "norm" in name and name.endswith("weight") or "lambda" in name else 0.0
            flat = p.ndim < 2 or "token" in name or "position" in name
            p.copy_(one + torch.randn_like(p) * (0.3 if flat else p[0].numel() ** -0.5))
    return model.eval()


def our_tree(model):
    t = {name: np.asarray(x) for name, x in model.state_dict().items()}
    embeddings = "embeddings."
    flat = {
        "cls_token": t[embeddings + "cls_token"],
        "mask_token": t[embeddings + "mask_token"],
        "pos_embed": t[embeddings + "position_embeddings"],
        "patch_embed/kernel": t[embeddings + "patch_embeddings.projection.weight"].transpose(
            2, 3, 1, 0
        ),
        "patch_embed/bias": t[embeddings + "patch_embeddings.projection.bias"],
        "norm/scale": t["layernorm.weight"],
        "norm/bias": t["layernorm.bias"],
    }
    if embeddings + "register_tokens" in t:
        flat["register_tokens"] = t[embeddings + "register_tokens"]
    linear = {
        "attn/q": "attention.q_proj",
        "attn/k": "attention.k_proj",
        "attn/v": "attention.v_proj",
        "attn/out": "attention.o_proj",
        "mlp/w1": "mlp.gate_proj",
        "mlp/w2": "mlp.up_proj",
        "mlp/w3": "mlp.down_proj",
    }

    def stack(name):
        return np.stack([t[f"encoder.layer.{i}.{name}"] for i in range(2)])

    for ours, name in linear.items():
        flat[f"blocks/{ours}/kernel"] = stack(f"{name}.weight").transpose(0, 2, 1)
        flat[f"blocks/{ours}/bias"] = stack(f"{name}.bias")
    for i in "12":
        flat[f"blocks/norm{i}/scale"] = stack(f"norm{i}.weight")
        flat[f"blocks/norm{i}/bias"] = stack(f"norm{i}.bias")
        flat[f"blocks/layer_scale{i}/gamma"] = stack(f"layer_scale{i}.lambda1")
    return params.unflatten(flat)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("registers", "shape"), [(4, (32, 32)), (0, (32, 32)), (0, (48, 24))])
def test_all_tokens_equal_those_of_dinov2(registers, shape, masked):
    config, theirs = (
        sizes.web_dino("micro", num_registers=registers, position_resize="plain"),
        make(registers),
    )
    rng = np.random.default_rng(0)
    images = rng.standard_normal((3, *shape, 3), np.float32)
    mask = rng.random((3, shape[0] * shape[1] // 64)) < 0.4 if masked else None
    with torch.no_grad():
        expected = theirs(
            torch.tensor(images.transpose(0, 3, 1, 2).copy()),
            bool_masked_pos=None if mask is None else torch.tensor(mask),
        ).last_hidden_state.numpy()
    tree = our_tree(theirs)
    made = jax.eval_shape(ViT(config).init, jax.random.key(0), images)["params"]
    assert jax.tree.map(np.shape, tree) == jax.tree.map(np.shape, made)
    got = jax.jit(lambda p, x: ViT(config).apply({"params": p}, x, mask=mask))(tree, images)
    ours = np.concatenate([got.cls[:, None], got.registers, got.patches], axis=1)
    np.testing.assert_allclose(ours, expected, atol=TOLERANCE, rtol=0)
