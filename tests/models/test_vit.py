"""The encoder: tokens, masks, layers, remat, precision, stochastic depth, initial values."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from webssl_jax import params as paths
from webssl_jax.models import sizes
from webssl_jax.models.blocks import stochastic_depth, subset_size
from webssl_jax.models.init_schemes import INIT_SCHEMES, InitScheme
from webssl_jax.models.layers import PatchEmbed, patchify, unpatchify
from webssl_jax.models.vit import ViT

DINO = sizes.web_dino("micro", depth=3, layer_scale=0.5, num_registers=2)
MAE = sizes.web_mae("micro")


def images(batch=2, height=32, width=32, seed=0):
    return np.random.default_rng(seed).standard_normal((batch, height, width, 3), np.float32)


@functools.cache
def init(config):
    """Random parameters, none zero or one, drawn without compiling the initialisers."""
    shapes = jax.eval_shape(ViT(config).init, jax.random.key(0), images(1))["params"]
    rng = np.random.default_rng(0)

    def draw(path, shape):
        x = rng.standard_normal(shape.shape, np.float32)
        if path.endswith("kernel"):
            return x / math.sqrt(192 if "patch" in path else shape.shape[-2])
        return 0.1 * x + (1.0 if path.endswith(("scale", "gamma")) else 0.0)

    return paths.map_with_path(draw, shapes)


@functools.partial(jax.jit, static_argnums=(0,), static_argnames=("train", "layers"))
def apply(config, tree, *args, **kwargs):
    return ViT(config).apply({"params": tree}, *args, **kwargs)


def init_values(config):
    return paths.flatten(jax.jit(ViT(config).init)(jax.random.key(0), images())["params"])


def test_the_parameter_tree_has_the_names_and_shapes_of_the_contract():
    tree = init(sizes.web_dino("micro", num_registers=4))
    shapes = {path: x.shape for path, x in paths.flatten(tree).items()}
    d, layers, hidden = 32, 2, 88
    expected = {
        "patch_embed/kernel": (8, 8, 3, d),
        "patch_embed/bias": (d,),
        "cls_token": (1, 1, d),
        "register_tokens": (1, 4, d),
        "mask_token": (1, d),
        "pos_embed": (1, 17, d),
        "norm/scale": (d,),
        "norm/bias": (d,),
    }
    for i in "12":
        expected |= {
            f"blocks/norm{i}/scale": (layers, d),
            f"blocks/norm{i}/bias": (layers, d),
            f"blocks/layer_scale{i}/gamma": (layers, d),
        }
    for name in "qkv", "out":
        for part in name if name == "qkv" else [name]:
            expected |= {
                f"blocks/attn/{part}/kernel": (layers, d, d),
                f"blocks/attn/{part}/bias": (layers, d),
            }
    for name, (n_in, n_out) in {"w1": (d, hidden), "w2": (d, hidden), "w3": (hidden, d)}.items():
        expected |= {
            f"blocks/mlp/{name}/kernel": (layers, n_in, n_out),
            f"blocks/mlp/{name}/bias": (layers, n_out),
        }
    assert shapes == expected
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(tree))


def test_sincos_positions_and_absent_extras_are_no_parameters():
    flat = paths.flatten(init(MAE))
    assert not [
        p for p in flat if "pos_embed" in p or "mask" in p or "register" in p or "gamma" in p
    ]
    assert flat["blocks/mlp/fc1/kernel"].shape == (2, 32, 128)


def test_patch_embedding_is_a_strided_convolution():
    tree = init(MAE)
    conv = (
        jax.lax.conv_general_dilated(
            images(),
            tree["patch_embed"]["kernel"],
            (8, 8),
            "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        + tree["patch_embed"]["bias"]
    )
    ours = PatchEmbed(MAE).apply({"params": tree["patch_embed"]}, patchify(images(), 8))
    np.testing.assert_allclose(ours, conv.reshape(ours.shape), atol=1e-5)


def test_patches_are_row_major_with_channels_last_and_come_back():
    x = images(2, 16, 24)
    patches = patchify(x, 8)
    np.testing.assert_array_equal(patches[1, 4], x[1, 8:16, 8:16].reshape(-1))
    np.testing.assert_array_equal(unpatchify(patches, 8, (2, 3)), x)


def test_keeping_all_patches_in_any_order_only_reorders_the_output():
    tree = init(DINO)
    order = np.stack([np.random.default_rng(i).permutation(16) for i in range(2)])
    whole, shuffled = apply(DINO, tree, images()), apply(DINO, tree, images(), keep=order)
    np.testing.assert_allclose(shuffled.cls, whole.cls, atol=2e-5)
    np.testing.assert_allclose(
        shuffled.patches,
        np.take_along_axis(np.asarray(whole.patches), order[..., None], 1),
        atol=2e-5,
    )


def test_hidden_patches_do_not_reach_the_kept_ones():
    tree, keep = init(MAE), np.array([[3, 1, 8], [0, 15, 2]])
    changed = np.array(patchify(images(), 8))
    for b in range(2):
        changed[b, np.setdiff1d(np.arange(16), keep[b])] = 7.0
    changed = unpatchify(changed, 8, (4, 4))
    a, b = (apply(MAE, tree, x, keep=keep) for x in (images(), changed))
    assert a.patches.shape == (2, 3, 32)
    np.testing.assert_array_equal(a.patches, b.patches)
    np.testing.assert_array_equal(a.cls, b.cls)


def test_a_masked_patch_is_replaced_before_its_position():
    tree, mask = init(DINO), np.zeros((2, 16), bool)
    mask[0, [2, 5]] = mask[1, 7] = True
    changed = np.array(patchify(images(), 8))
    changed[mask] = -3.0
    a = apply(DINO, tree, images(), mask=mask)
    b = apply(DINO, tree, unpatchify(changed, 8, (4, 4)), mask=mask)
    np.testing.assert_array_equal(a.patches, b.patches)  # what is under the mask is not seen
    assert np.abs(a.patches[0, 2] - a.patches[0, 5]).max() > 0.01  # but its place is
    assert np.abs(a.cls - apply(DINO, tree, images()).cls).max() > 1e-3


def test_a_mask_without_a_mask_token_is_refused():
    with pytest.raises(ValueError, match="mask_token = True"):
        apply(MAE, init(MAE), images(), mask=np.ones((2, 16), bool))


@pytest.mark.parametrize("config", [DINO, MAE], ids=["learned", "sincos"])
def test_one_tree_serves_images_of_other_and_oblong_sizes(config):
    out = apply(config, init(config), images(2, 40, 64))
    assert out.patches.shape == (2, 40, 32) and out.cls.shape == (2, 32)
    assert out.registers.shape == (2, config.num_registers, 32)
    assert out.x_prenorm.shape == (2, 1 + config.num_registers + 40, 32)


def test_an_image_that_does_not_divide_into_patches_is_refused():
    with pytest.raises(ValueError, match="36x32 pixels does not divide into patches of 8"):
        apply(MAE, init(MAE), images(1, 36, 32))


@pytest.mark.parametrize("block", [0, 1, -2])
def test_features_of_a_block_equal_those_of_a_model_cut_off_there(block):
    tree = init(DINO)
    depth = block % DINO.depth + 1
    cut = dict(tree, blocks=jax.tree.map(lambda x: x[:depth], tree["blocks"]))
    short = apply(dataclasses.replace(DINO, depth=depth), cut, images())
    out = apply(DINO, tree, images(), layers=(block, 2))
    np.testing.assert_allclose(out.layers[block][0], short.cls, atol=1e-5)
    np.testing.assert_allclose(out.layers[block][1], short.patches, atol=1e-5)
    np.testing.assert_array_equal(out.layers[2][1], out.patches)
    assert set(out.layers) == {block, 2}


def test_a_layer_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="layer 3 .* blocks 0 to 2"):
        apply(DINO, init(DINO), images(), layers=(3,))


def test_remat_changes_no_gradient():
    config = dataclasses.replace(DINO, drop_path=0.5)
    tree = init(config)

    def grads(c):
        def loss(t):
            out = apply(c, t, images(4), train=True, rngs={"drop_path": jax.random.key(1)})
            return jnp.square(out.patches).mean() + (out.cls * out.registers[:, 0]).mean()

        return jax.jit(jax.grad(loss))(tree)

    expected = paths.flatten(grads(config))
    for remat in set(sizes.REMATS) - {"none"}:
        for path, b in paths.flatten(grads(dataclasses.replace(config, remat=remat))).items():
            a = np.asarray(expected[path])
            np.testing.assert_allclose(
                b, a, atol=1e-6 + 1e-5 * np.abs(a).max(), err_msg=f"{remat} {path}"
            )


def test_each_remat_policy_stores_what_it_says():
    def stored(remat):
        config = dataclasses.replace(DINO, remat=remat)
        tree = init(config)
        residuals = jax.eval_shape(
            lambda: jax.vjp(lambda t: ViT(config).apply({"params": t}, images(4)), tree)[1]
        )
        return sum(x.size for x in jax.tree.leaves(residuals))

    floats = {remat: stored(remat) for remat in sizes.REMATS}
    assert floats["full"] < floats["named"] < floats["none"]
    assert floats["full"] < floats["dots"] < floats["none"]


@pytest.mark.parametrize("config", [DINO, MAE], ids=["dino", "mae"])
def test_bfloat16_computation_stays_near_float32_and_returns_float32(config):
    tree = init(config)
    exact = apply(config, tree, images())
    rough = apply(dataclasses.replace(config, dtype="bfloat16"), tree, images())
    assert rough.x_prenorm.dtype == jnp.bfloat16
    assert rough.cls.dtype == rough.patches.dtype == jnp.float32
    # Outputs have unit variance and bfloat16 has 8 bits. Measured: rms 0.010, largest 0.04.
    error = np.asarray(rough.patches - exact.patches)
    assert np.sqrt(np.square(error).mean()) < 0.02
    assert np.abs(error).max() < 0.1


# Stochastic depth.


def test_the_subset_size_is_the_truncated_share_and_never_zero():
    assert [
        subset_size(12, 0.4),
        subset_size(24, 0.4),
        subset_size(7, 0.3),
        subset_size(1, 0.9),
    ] == [7, 14, 4, 1]


@pytest.mark.parametrize(("group", "per_group"), [(12, 7), (6, 3)])
def test_exactly_the_stated_number_of_images_takes_the_branch_scaled(group, per_group):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((12, 3, 4), np.float32))
    seen = []

    def branch(y):
        seen.append(y.shape)
        return 2 * y + 1

    y = stochastic_depth(x, branch, 0.4, jax.random.key(0), group)
    assert seen == [(per_group * 12 // group, 3, 4)]
    took = np.asarray(jnp.any(y != x, axis=(1, 2)))
    assert took.reshape(-1, group).sum(axis=1).tolist() == [per_group] * (12 // group)
    np.testing.assert_allclose(y[took], (x + (2 * x + 1) * group / per_group)[took], rtol=1e-5)


def test_stochastic_depth_keeps_the_expectation_of_the_branch():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((8, 1, 2), np.float32))
    draw = jax.vmap(lambda key: stochastic_depth(x, jnp.sin, 0.4, key, 8))
    mean = draw(jax.random.split(jax.random.key(0), 20_000)).mean(axis=0)
    # Standard error of the mean: |branch| * sqrt(p (1 - p)) / p / sqrt(20000) < 0.008.
    np.testing.assert_allclose(mean, x + jnp.sin(x), atol=0.035)


def test_the_two_branches_and_the_blocks_draw_independently():
    config = dataclasses.replace(MAE, depth=2, drop_path=0.5)
    tree = jax.tree.map(jnp.zeros_like, init(config))
    tree["norm"]["scale"] += 1
    # Each branch writes only its bias, 1, 10, 100 or 1000 doubled by the scale n/s, so a digit
    # tells who took part.
    tree["blocks"]["attn"]["out"]["bias"] += jnp.array([[1.0], [100.0]])
    tree["blocks"]["mlp"]["fc2"]["bias"] += jnp.array([[10.0], [1000.0]])

    def run(key):
        return apply(config, tree, jnp.zeros((64, 32, 32, 3)), train=True, rngs={"drop_path": key})

    total = np.asarray(run(jax.random.key(0)).x_prenorm[:, 0, 0]).round().astype(int) // 2
    digits = np.stack([total // 10**i % 10 for i in range(4)])
    assert digits.sum(axis=1).tolist() == [32] * 4
    for i in range(4):
        for j in range(i):
            # 16 expected; 32 or 0 would be the same draw
            assert 4 <= (digits[i] * digits[j]).sum() <= 28


def test_without_training_or_rate_no_randomness_is_asked_for():
    config = dataclasses.replace(MAE, drop_path=0.5)
    tree = init(config)
    np.testing.assert_array_equal(
        apply(config, tree, images()).cls, apply(MAE, tree, images(), train=True).cls
    )


def test_a_batch_that_the_group_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="batch of 8 images .* groups of 3"):
        stochastic_depth(jnp.zeros((8, 1, 1)), jnp.sin, 0.5, jax.random.key(0), 3)


# Initial values.


def test_mae_initial_values_are_the_originals():
    config = sizes.web_mae("micro", width=256, heads=4)
    flat = init_values(config)

    def limit(path):
        x = np.asarray(flat[path])
        assert x.std() == pytest.approx(np.abs(x).max() / math.sqrt(3), rel=0.03)  # uniform
        return np.abs(x).max()

    assert limit("blocks/attn/q/kernel") == pytest.approx(math.sqrt(6 / (256 + 3 * 256)), rel=0.01)
    assert limit("blocks/attn/out/kernel") == pytest.approx(math.sqrt(6 / (256 + 256)), rel=0.01)
    assert limit("blocks/mlp/fc1/kernel") == pytest.approx(math.sqrt(6 / (256 + 1024)), rel=0.01)
    assert limit("patch_embed/kernel") == pytest.approx(math.sqrt(6 / (192 + 256)), rel=0.01)
    assert np.abs(flat["patch_embed/bias"]).max() == pytest.approx(1 / math.sqrt(192), rel=0.05)
    assert np.std(flat["cls_token"]) == pytest.approx(0.02, rel=0.2)
    assert not np.array_equal(*flat["blocks/attn/q/kernel"])  # blocks differ


def test_dinov2_initial_values_are_the_originals():
    config = sizes.web_dino("micro", width=256, heads=4, num_registers=2)
    flat = init_values(config)
    for path in (
        "blocks/attn/k/kernel",
        "blocks/mlp/w1/kernel",
        "blocks/mlp/w3/kernel",
        "pos_embed",
    ):
        assert np.std(flat[path]) == pytest.approx(0.02, rel=0.03), path
    for path in ("cls_token", "register_tokens"):
        assert 0 < np.abs(flat[path]).max() < 1e-5
    assert not np.any(flat["mask_token"])
    assert np.abs(flat["patch_embed/kernel"]).max() == pytest.approx(1 / math.sqrt(192), rel=0.01)
    np.testing.assert_array_equal(flat["blocks/layer_scale2/gamma"], np.float32(1e-5))
    for path in (p for p in flat if p.endswith("bias") and "patch" not in p):
        assert not np.any(flat[path])


class OnesScheme(InitScheme):
    def kernel(self, layer, fused):
        return jax.nn.initializers.constant(fused if layer == "q" else 1.0)


def test_a_new_init_scheme_is_one_class_and_one_row_of_the_table(monkeypatch):
    monkeypatch.setitem(INIT_SCHEMES, "ones", OnesScheme)
    flat = init_values(sizes.web_mae("micro", init="ones"))
    assert np.all(flat["blocks/attn/q/kernel"] == 3) and np.all(flat["blocks/mlp/fc1/kernel"] == 1)
    assert not np.any(flat["blocks/mlp/fc1/bias"])
    with pytest.raises(ValueError, match="init = 'twos' is not one of mae, dinov2, .*, ones$"):
        sizes.web_mae("micro", init="twos")
