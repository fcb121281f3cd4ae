"""Rotary positions: tables of transformers, their augmentation, and what it changes."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.weights.samples import make_params
from webssl_jax.models import clip, mae
from webssl_jax.models.blocks import Placed, block_stack
from webssl_jax.models.decoder import MAEDecoder
from webssl_jax.models.rope import Rope, grid_coordinates, rotate
from webssl_jax.models.sizes import ViTConfig
from webssl_jax.models.text import TextConfig
from webssl_jax.models.vit import ViT
from webssl_jax.weights.networks import Networks

GOLDEN = np.load(pathlib.Path(__file__).parent / "golden" / "hf_dinov3_rope.npz")
TINY = ViTConfig(
    width=16, depth=2, heads=2, patch_size=4, image_size=16, position="rope", num_registers=1,
    mlp_hidden=16,
)  # fmt: skip


@pytest.mark.parametrize("grid", [(4, 4), (14, 14), (7, 16), (1, 5)])
def test_tables_are_those_of_transformers(grid):
    rotation = Rope(16).rotation(grid_coordinates(grid))
    for name, table in rotation._asdict().items():
        np.testing.assert_allclose(table, GOLDEN[f"{grid[0]}x{grid[1]}/{name}"], atol=2e-6)


def test_shift_jitter_and_rescale_are_those_of_transformers():
    drawn = GOLDEN["augmented_7x16/drawn_log_or_shift"].astype(np.float32)
    rotation = Rope(16).rotation(grid_coordinates((7, 16)), drawn, prefix=2)
    for name, table in rotation._asdict().items():
        np.testing.assert_allclose(table[2:], GOLDEN[f"augmented_7x16/{name}"], atol=2e-6)
    assert (rotation.cos[:2] == 1).all() and (rotation.sin[:2] == 0).all()


def test_draws_lie_in_their_ranges_and_differ_between_blocks_and_sizes():
    drawn = np.asarray(Rope(16, rescale=2.0, shift=0.25).draw(jax.random.key(0), 50, 4))
    assert np.abs(drawn[..., :2]).max() <= 0.25 and (drawn[..., 2:4] == 0).all()
    rescale = np.exp(drawn[..., 4])
    assert 0.5 <= rescale.min() < 0.55 and 1.9 < rescale.max() <= 2.0
    assert len(np.unique(rescale)) == 200


def test_products_of_rotated_tokens_depend_on_their_distance_alone():
    q, k = np.random.default_rng(0).standard_normal((2, 1, 9, 16), np.float32)
    q, k = q[:, :1].repeat(9, axis=1), k[:, :1].repeat(9, axis=1)
    rotation = Rope(8).rotation(grid_coordinates((3, 3)))
    q, k = (rotate(jnp.asarray(x), rotation, heads=2)[0] for x in (q, k))
    products = np.asarray(q @ k.T)
    np.testing.assert_allclose(products[0, 4], products[4, 8], rtol=1e-5)  # one down, one right
    np.testing.assert_allclose(products[0, 1], products[7, 8], rtol=1e-5)
    assert abs(products[0, 1] - products[0, 3]) > 1e-3  # rows are not columns


def test_a_rotation_by_product_is_the_same_bit_by_bit_and_so_is_its_gradient():
    x, d = np.random.default_rng(1).standard_normal((2, 2, 10, 32), np.float32)
    x, d = jnp.asarray(x, jnp.bfloat16), jnp.asarray(d, jnp.bfloat16)
    rotation = Rope(8).rotation(grid_coordinates((3, 3)), prefix=1)

    def both(together):
        y, back = jax.vjp(lambda x: rotate(x, rotation, 4, together), x)
        return np.asarray(y, np.float32), np.asarray(back(d)[0], np.float32)

    for got, expected in zip(both(together=2), both(together=0)):
        np.testing.assert_array_equal(got, expected)


def test_saved_queries_and_keys_are_not_rotated_again_in_the_backward_pass():
    def negations(remat):  # one a rotation, and others
        stack = block_stack(dataclasses.replace(TINY, remat=remat), train=True, placed=True)

        def loss(params):
            places, slots = Placed(grid_coordinates((4, 4))), np.zeros(TINY.depth, int)
            tokens = (jnp.zeros((1, 17, 16)), None)
            return stack.apply({"params": params}, tokens, slots, None, places)[0][0].sum()

        program = jax.make_jaxpr(jax.grad(loss))(draw(TINY)["params"]["blocks"])
        return str(program).count("= neg ")

    assert negations("full") - negations("named") == 2


def draw(config):
    """Parameters, drawn without compiling the initialisers."""
    return {"params": make_params(Networks(config))["encoder"]}


IMAGES = np.random.default_rng(0).standard_normal((2, 16, 16, 3)).astype(np.float32)


def test_training_moves_positions_and_evaluation_does_not():
    moved, tree = dataclasses.replace(TINY, rope_rescale=2.0), draw(TINY)
    plain = ViT(TINY).apply(tree, IMAGES).patches
    np.testing.assert_array_equal(ViT(moved).apply(tree, IMAGES).patches, plain)

    @jax.jit
    def trained(key):
        return ViT(moved).apply(tree, IMAGES, train=True, rngs={"rope": key}).patches

    one, other = (trained(jax.random.key(seed)) for seed in (0, 1))
    assert np.abs(one - plain).max() > 1e-4 and np.abs(one - other).max() > 1e-4


def test_kept_patches_stand_where_they_stood_and_absent_ones_are_not_seen():
    """Six patches of each image, and the same with four more to fill up."""
    mean = dataclasses.replace(TINY, pooling="mean")
    tree, apply = draw(mean), jax.jit(ViT(mean).apply)
    keep = np.array([[3, 1, 9, 15, 4, 8, 0, 0, 0, 0], [5, 2, 7, 6, 10, 11, 1, 1, 1, 1]])
    present = np.tile(np.arange(10) < 6, (2, 1))
    cut = apply(tree, IMAGES, keep=keep[:, :6])
    padded = apply(tree, IMAGES, keep=keep, present=present)
    np.testing.assert_allclose(padded.patches[:, :6], cut.patches, atol=1e-5)
    for out in (cut, padded):
        np.testing.assert_allclose(out.cls, cut.patches.mean(axis=1), atol=1e-5)
    whole = apply(tree, IMAGES, keep=np.tile(np.arange(16), (2, 1)))
    shuffled = apply(tree, IMAGES, keep=np.tile(np.arange(16)[::-1], (2, 1)))
    np.testing.assert_allclose(shuffled.patches[:, ::-1], whole.patches, atol=1e-5)


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(heads=8), "heads of 2 channels: rope needs a multiple of 4"),
        (dict(rope_rescale=0.5), "rope_rescale = 0.5 must be at least 1"),
        (dict(norm="batch"), "norm = 'batch' is not one of layer, rms"),
    ],
)
def test_a_config_that_cannot_be_is_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(TINY, **fields)


def test_masked_autoencoders_and_contrasts_may_move_positions_too():
    moved = dataclasses.replace(TINY, rope_rescale=2.0)
    decoder = dataclasses.replace(TINY, position="sincos", num_registers=0)
    images = jnp.zeros((2, 16, 16, 3))

    def reconstruct(rng):
        tree = {"encoder": ViT(moved).init(rng, images)["params"]}
        state = jnp.zeros((2, 16), int), (4, 4)
        cls, patches = jnp.zeros((2, 16)), jnp.zeros((2, 4, 16))
        tree["decoder"] = MAEDecoder(decoder).init(rng, cls, patches, *state)["params"]
        return mae.reconstruct(moved, decoder, tree, images, jnp.zeros((2, 16)), 0.75, rng)

    text = TextConfig(width=16, depth=1, heads=2, embedding=8, context=4, vocabulary=16)

    def embed(rng):
        tree = clip.init_towers(moved, text, rng, images, 1.0, None)
        return clip.embed_images(moved, text, tree, images, rng)

    assert jax.eval_shape(reconstruct, jax.random.key(0)).prediction.shape == (2, 16, 48)
    assert jax.eval_shape(embed, jax.random.key(0)).shape == (2, 8)
