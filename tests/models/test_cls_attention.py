"""The attention shown in pictures is the attention that the last block computes."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from webssl_jax import params as paths
from webssl_jax.models import sizes
from webssl_jax.models.attention import Attention, cls_attention
from webssl_jax.models.features import Want, compute_features
from webssl_jax.models.layers import layer_norm
from webssl_jax.models.vit import ViT

DINO = sizes.web_dino("micro", depth=3, layer_scale=0.5, num_registers=2)
MAE = sizes.web_mae("micro", qkv_bias=False, depth=1)
IMAGES = np.random.default_rng(0).standard_normal((2, 32, 48, 3), np.float32)


@functools.cache
def init(config):
    shapes = jax.eval_shape(ViT(config).init, jax.random.key(0), IMAGES)["params"]
    rng = np.random.default_rng(0)

    def draw(path, shape):
        x = rng.standard_normal(shape.shape, np.float32)
        return x * 2 / math.sqrt(shape.shape[-2]) if path.endswith("kernel") else 1 + 0.3 * x

    return paths.map_with_path(draw, shapes)


@pytest.mark.parametrize("config", (DINO, MAE))
def test_values_mixed_by_the_weights_are_what_the_block_makes_of_its_cls_token(config):
    c, tree = config, init(config)
    seen = jax.jit(lambda x: ViT(c).apply({"params": tree}, x, inside=True))(IMAGES)
    block = jax.tree.map(lambda stacked: stacked[-1], tree["blocks"])
    weights = cls_attention(c, block, seen.last_block_input)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
    assert weights.max() > 2 / weights.shape[-1]  # far from even

    x = layer_norm(c, None).apply({"params": block["norm1"]}, seen.last_block_input)
    values = x @ block["attn"]["v"]["kernel"] + block["attn"]["v"].get("bias", 0.0)
    values = values.reshape(*x.shape[:2], c.heads, c.head_dim)
    mixed = jnp.einsum("bht,bthd->bhd", weights, values).reshape(len(x), c.width)
    ours = mixed @ block["attn"]["out"]["kernel"] + block["attn"]["out"]["bias"]
    theirs = Attention(c).apply({"params": block["attn"]}, x)[:, 0]
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_registers_and_cls_are_left_out_of_the_map_and_norms_are_told_apart():
    tree, want = init(DINO), Want(diagnostics=True)
    seen = jax.jit(lambda x: compute_features(DINO, tree, x, want))(IMAGES).diagnostics
    raw = jax.jit(lambda x: ViT(DINO).apply({"params": tree}, x, inside=True))(IMAGES)
    block = jax.tree.map(lambda stacked: stacked[-1], tree["blocks"])
    weights = cls_attention(DINO, block, raw.last_block_input)
    attention = seen.attention.reshape(2, DINO.heads, -1)
    np.testing.assert_allclose(attention, weights[:, :, 3:], rtol=1e-5, atol=1e-7)
    norms = np.linalg.norm(raw.x_prenorm, axis=-1)
    np.testing.assert_allclose(seen.cls_norm, norms[:, 0], rtol=1e-5)
    np.testing.assert_allclose(seen.register_norms, norms[:, 1:3], rtol=1e-5)
    np.testing.assert_allclose(seen.patch_norms.reshape(2, -1), norms[:, 3:], rtol=1e-5)
    assert seen.patch_norms.shape == (2, 4, 6)


def test_nothing_is_computed_unless_asked_for():
    tree = init(MAE)
    shapes = jax.eval_shape(lambda x: compute_features(MAE, tree, x, Want()), IMAGES)
    assert shapes.diagnostics is None
