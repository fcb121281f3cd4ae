"""CLIP's towers and their weights against those who wrote the formats: transformers' ``CLIPModel``
and open_clip's ``CLIP``.

golden/clip_tower.npz was made with open_clip (MIT) on a CPU in float32: a tiny CLIP of quick-GELU
towers, its state dict of random numbers as ``sd/NAME``, and what it makes of images and tokens.
``OPEN_CLIP_INIT`` are standard deviations right after its initialisation.

Tolerances are relative, of Euclidean norms, float32 on both sides: the same sums in another order.
"""

import dataclasses
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from webssl_jax import params
from webssl_jax.models import clip_sizes
from webssl_jax.models.clip import CLIPVision
from webssl_jax.models.text import TextTower
from webssl_jax.weights import clip, tables

GOLDEN = np.load(pathlib.Path(__file__).parent / "golden" / "clip_tower.npz")
TOLERANCE = 5e-6
QUICK = {"xla_backend_optimization_level": 0}  # compiled as it stands: it runs once
SMALL = dict(context=16, vocabulary=512, dtype="float32", remat="none")
TOWERS = {
    "quick-gelu": (clip_sizes.vision("micro", image_size=24), clip_sizes.text("micro", **SMALL)),
    # widths, depths, heads and hidden widths that differ between towers, and a square of 9 patches
    "gelu": (
        clip_sizes.vision("micro", depth=3, mlp="gelu", mlp_hidden=57, image_size=24),
        clip_sizes.text(
            "micro", **SMALL, width=24, heads=3, mlp="gelu", norm_eps=1e-4, embedding=20
        ),
    ),
}
OPEN_CLIP = (
    clip_sizes.vision("micro", width=64, heads=4, patch_size=14, image_size=56),
    clip_sizes.text("micro", **SMALL, width=48, heads=4, embedding=32),
)
OPEN_CLIP_INIT = {
    "text/projection/kernel": 0.1491,
    "encoder/pos_embed": 0.1250,
    "projection/kernel": 0.1236,
    "encoder/patch_embed/kernel": 0.02376,
    "encoder/blocks/attn/q/kernel": 0.0882,
    "encoder/blocks/attn/out/kernel": 0.0724,
    "encoder/blocks/mlp/fc1/kernel": 0.0719,
    "encoder/blocks/mlp/fc2/kernel": 0.0361,
    "text/blocks/attn/v/kernel": 0.1433,
    "text/blocks/attn/out/kernel": 0.0730,
    "text/blocks/mlp/fc1/kernel": 0.1019,
    "text/blocks/mlp/fc2/kernel": 0.0718,
    "text/token_embed": 0.0200,
}


class InMemory:
    """An array with the manners of a tensor in a file."""

    def __init__(self, array):
        self.array, self.shape, self.dtype = array, array.shape, array.dtype

    def read(self, part=0, parts=1):
        return self.array if parts == 1 else np.split(self.array, parts)[part]


def init(encoder, text):
    """Fresh parameters, as the method has them."""
    rng, side = jax.random.key(0), encoder.image_size
    image = jnp.zeros((1, side, side, 3))
    vision = CLIPVision(encoder, text.embedding).init(rng, image)["params"]
    words = TextTower(text).init(rng, jnp.zeros((1, text.context), int))["params"]
    return vision | {"text": words, "logit_scale": jnp.float32(2.5)}


def random_params(towers):
    """None zero or one, so that a tensor in a wrong place shows."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        x = rng.standard_normal(leaf.shape, np.float32)
        scale = (leaf.shape[-2] if path.endswith("kernel") else 25) ** -0.5
        return (1.0 if path.endswith("/scale") else 0.0) + scale * x

    return params.map_with_path(draw, jax.eval_shape(lambda: init(*towers)))


def embeddings(towers, tree, images, tokens):
    """(image, text) of normalised images (B, H, W, 3) and ids (B, T)."""
    encoder, text = towers
    own = {name: tree[name] for name in ("encoder", "projection")}

    def run(own, words, images, tokens):
        seen = CLIPVision(encoder, text.embedding).apply({"params": own}, images)
        return seen, TextTower(text).apply({"params": words}, tokens)

    return jax.jit(run, compiler_options=QUICK)(own, tree["text"], images, tokens)


def off(ours, theirs):
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def texts(count, text, seed=0):
    """Ids as a tokenizer gives them: start, some words, end, zeros."""
    rng = np.random.default_rng(seed)
    tokens = np.zeros((count, text.context), np.int32)
    for row in tokens:
        end = rng.integers(1, text.context)
        row[:end] = rng.integers(1, text.vocabulary - 2, end)
        row[0], row[end] = text.vocabulary - 2, text.vocabulary - 1
    return tokens


def imported(table, tensors, template):
    found = {name: InMemory(np.asarray(x)) for name, x in tensors.items()}
    return tables.read_all(table.family, tables.open_(found, table, template))


def assert_same(got, wanted):
    got, wanted = params.flatten(got), params.flatten(wanted)
    assert set(got) == set(wanted)
    for path, value in got.items():
        np.testing.assert_array_equal(value, wanted[path], err_msg=path)


@pytest.mark.parametrize("name", TOWERS)
def test_transformers_computes_what_we_compute_from_our_weights_and_config(name):
    encoder, text = towers = TOWERS[name]
    tree, table = random_params(towers), clip.hf_table(encoder, text)
    exported = dict(tables.export(tree, table))
    assert_same(imported(table, exported, tree), tree)

    config = clip.hf_config(types.SimpleNamespace(encoder=encoder, text=text))
    model = transformers.CLIPModel(transformers.CLIPConfig(**config)).eval()
    model.load_state_dict({k: torch.tensor(x) for k, x in exported.items()}, strict=True)
    images = np.random.default_rng(1).standard_normal((5, 24, 24, 3), np.float32)
    tokens = texts(5, text)
    with torch.no_grad():
        pixels = torch.tensor(images.transpose(0, 3, 1, 2).copy())
        ids = torch.tensor(tokens, dtype=torch.long)
        theirs = model(input_ids=ids, pixel_values=pixels)
        raw = model.get_image_features(pixels), model.get_text_features(ids)
    ours = embeddings(towers, tree, images, tokens)
    unit_theirs = (theirs.image_embeds, theirs.text_embeds)
    for mine, features, normalised in zip(ours, raw, unit_theirs):
        assert off(mine, features.pooler_output.numpy()) < TOLERANCE
        assert off(unit(np.asarray(mine)), normalised.numpy()) < TOLERANCE


def test_open_clip_computes_what_we_compute_from_its_weights():
    encoder, text = OPEN_CLIP
    theirs = {name[3:]: GOLDEN[name] for name in GOLDEN.files if name.startswith("sd/")}
    table = clip.open_clip_table(encoder, text)
    tree = imported(table, theirs, jax.eval_shape(lambda: init(*OPEN_CLIP)))
    images = GOLDEN["image_nchw"].transpose(0, 2, 3, 1)
    image, words = embeddings(OPEN_CLIP, tree, images, GOLDEN["tokens"])
    assert off(image, GOLDEN["image_features"]) < TOLERANCE
    assert off(words, GOLDEN["text_features"]) < TOLERANCE
    assert off(unit(np.asarray(image)), GOLDEN["image_features_norm"]) < TOLERANCE
    assert off(unit(np.asarray(words)), GOLDEN["text_features_norm"]) < TOLERANCE

    back = dict(tables.export(tree, table))
    assert set(back) == set(theirs)
    for name, x in theirs.items():
        np.testing.assert_array_equal(back[name], x, err_msg=name)


def test_files_of_openai_of_wrappers_and_of_open_clips_other_class_are_read_too():
    encoder, text = OPEN_CLIP
    tree, table = random_params(OPEN_CLIP), clip.open_clip_table(encoder, text)
    plain = dict(tables.export(tree, table))
    openai = plain | {"context_length": np.float32(16), "input_resolution": np.float32(56)}
    wrapped = {f"module.{name}": x for name, x in plain.items()}
    words = ("transformer.", "token_embedding", "positional", "ln_final", "text_projection")
    custom = {f"text.{k}" if k.startswith(words) else k: x for k, x in plain.items()}
    for tensors in (openai, wrapped, custom):
        assert_same(imported(table, tensors, tree), tree)


def test_sigmoid_bias_travels_with_open_clip_and_is_refused_by_transformers():
    encoder, text = OPEN_CLIP
    tree = random_params(OPEN_CLIP) | {"logit_bias": np.float32(-10)}
    table = clip.open_clip_table(encoder, text, bias=True)
    assert_same(imported(table, dict(tables.export(tree, table)), tree), tree)
    with pytest.raises(tables.WeightsError, match="no place for our parameter.* logit_bias"):
        tables.layout(clip.hf_table(encoder, text), tree)


@pytest.mark.parametrize(
    ("image", "words", "says"),
    [
        ({}, {"causal": False}, "has no causal = False"),
        ({}, {"pooling": "last"}, "has no pooling = 'last'"),
        ({"mlp": "swiglu"}, {}, "has no mlp = 'swiglu'"),
        ({"mlp": "gelu"}, {}, "one activation serves both towers, not gelu and quick_gelu"),
        ({"norm_eps": 1e-6}, {}, "norm_eps = 1e-05 built in, a tower has 1e-06"),
    ],
)
def test_towers_that_open_clip_would_compute_otherwise_are_refused(image, words, says):
    encoder, text = (dataclasses.replace(c, **x) for c, x in zip(OPEN_CLIP, (image, words)))
    with pytest.raises(tables.WeightsError) as error:
        clip.open_clip_table(encoder, text)
    assert says in str(error.value)


def test_initial_values_are_spread_as_open_clips():
    flat = params.flatten(jax.jit(lambda: init(*OPEN_CLIP), compiler_options=QUICK)())
    for path, std in OPEN_CLIP_INIT.items():
        # some 1,000 numbers: two draws of one distribution differ by 2 % or so
        assert np.std(flat[path]) == pytest.approx(std, rel=0.08), path
    for path in ("text/blocks/mlp/fc1/bias", "encoder/blocks/mlp/fc2/bias"):
        inputs = {"text": 48, "encoder": 4 * 64}[path.split("/")[0]]
        assert np.abs(flat[path]).max() == pytest.approx(inputs**-0.5, rel=0.1), path
    for path in ("text/blocks/attn/q/bias", "encoder/blocks/attn/out/bias"):
        assert not np.any(flat[path]), path
    assert np.std(flat["text/pos_embed"]) == pytest.approx(0.01, rel=0.08)
    assert np.std(flat["encoder/cls_token"]) == pytest.approx(64**-0.5, rel=0.3)
