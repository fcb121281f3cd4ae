"""The text tower, and what CLIP adds to the ViT. (Against the originals:
``parity/test_clip_towers.py``.)"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from webssl_jax import params as paths
from webssl_jax.models import clip_sizes
from webssl_jax.models.clip import CLIPVision
from webssl_jax.models.layers import quick_gelu
from webssl_jax.models.text import TextTower
from webssl_jax.models.vit import ViT

END = 63
TEXT = clip_sizes.text("micro", context=10, vocabulary=END + 1)
TOKENS = np.array([[62, 5, 6, 7, END, 0, 0, 0, 0, 0], [62, 9, END, 0, 0, 0, 0, 0, 0, 0]])


@functools.cache
def init(config):
    return draw_params(TextTower(config), TOKENS)


def draw_params(tower, inputs):
    """Random parameters, none zero or one, drawn without compiling the initialisers."""
    shapes = jax.eval_shape(tower.init, jax.random.key(0), inputs)["params"]
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        x = rng.standard_normal(leaf.shape, np.float32)
        return x * leaf.shape[-2] ** -0.5 if path.endswith("kernel") else 1 + 0.3 * x

    return paths.map_with_path(draw, shapes)


@functools.partial(jax.jit, static_argnums=(0,))
def embed(config, tokens):
    return TextTower(config).apply({"params": init(config)}, tokens)


def changed(row, place, value):
    tokens = TOKENS.copy()
    tokens[row, place] = value
    return tokens


def test_a_text_is_what_its_end_token_saw_and_nothing_after():
    out = embed(TEXT, TOKENS)
    assert out.shape == (2, 16) and out.dtype == jnp.float32
    after = changed(0, 6, 40)  # behind the end
    np.testing.assert_allclose(embed(TEXT, after), out, rtol=1e-5, atol=1e-6)
    twice = changed(0, 7, END)  # the first end counts
    np.testing.assert_allclose(embed(TEXT, twice), out, rtol=1e-5, atol=1e-6)
    before = embed(TEXT, changed(0, 1, 8))
    assert np.abs(before[0] - out[0]).max() > 0.01
    np.testing.assert_allclose(before[1], out[1], rtol=1e-5, atol=1e-6)


def test_a_shorter_array_of_the_same_texts_embeds_alike():
    np.testing.assert_allclose(
        embed(TEXT, TOKENS[:, :5]), embed(TEXT, TOKENS), rtol=1e-5, atol=1e-6
    )


def test_a_tower_that_sees_both_ways_takes_the_last_place_which_sees_all():
    both = dataclasses.replace(TEXT, causal=False, pooling="last", projection_bias=True)
    out = embed(both, TOKENS)
    for place in range(10):
        assert np.abs(embed(both, changed(0, place, 33))[0] - out[0]).max() > 1e-3, place
    assert set(paths.flatten(init(both))) - set(paths.flatten(init(TEXT))) == {"projection/bias"}


@pytest.mark.parametrize("pooling, count", [("eot", 11), ("last", 9)])
def test_texts_that_do_not_fit_the_context_are_refused(pooling, count):
    config = dataclasses.replace(TEXT, pooling=pooling)
    with pytest.raises(ValueError, match=f"texts of {count} tokens for a context of 10"):
        jax.eval_shape(TextTower(config).init, jax.random.key(0), np.zeros((1, count), int))


def test_an_id_outside_the_vocabulary_is_not_passed_over_in_silence():
    assert np.isnan(embed(TEXT, changed(0, 1, END + 1))[0]).all()


def test_the_tower_of_images_is_a_vit_and_a_projection():
    config = clip_sizes.vision("micro")
    images = np.random.default_rng(0).standard_normal((2, 32, 32, 3), np.float32)
    tower = CLIPVision(config, 16)
    tree = draw_params(tower, images)
    assert set(tree) == {"encoder", "projection"}
    # what CLIP's ViT has less and more than others
    assert set(tree["encoder"]["patch_embed"]) == {"kernel"}
    assert set(tree["encoder"]["pre_norm"]) == {"scale", "bias"}

    def both(tree, images):
        cls = ViT(config).apply({"params": tree["encoder"]}, images).cls
        return cls, tower.apply({"params": tree}, images)

    cls, out = jax.jit(both)(tree, images)
    np.testing.assert_allclose(out, cls @ tree["projection"]["kernel"], rtol=1e-4, atol=1e-5)


def test_quick_gelu_is_its_formula_with_the_gradient_of_its_formula():
    def plain(x):
        return x * jax.nn.sigmoid(1.702 * x)

    x = jnp.linspace(-6, 6, 41)

    def value_and_slope(f):
        return f(x), jax.grad(lambda x: f(x).sum())(x)

    ours, theirs = jax.jit(lambda: [value_and_slope(f) for f in (quick_gelu, plain)])()
    for a, b in zip(ours, theirs):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert quick_gelu(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
