"""SigLIP's towers, their weights both ways and the exported folder, against transformers'
``SiglipModel`` and its stock pipeline.

Tolerances are relative, of Euclidean norms, float32 on both sides: the same sums in another order.
"""

import dataclasses
import functools
import importlib.util
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from tests.models.test_clip_sizes import SIGLIP_COUNTS
from webssl_jax import colours, params
from webssl_jax.data.tokens import END, Tokenizer
from webssl_jax.data.views import Preprocess
from webssl_jax.methods.base import Variables
from webssl_jax.methods.clip.method import CLIP, View
from webssl_jax.model import Model
from webssl_jax.models import clip_sizes
from webssl_jax.models.clip import CLIPVision
from webssl_jax.models.features import Want
from webssl_jax.models.text import TextTower
from webssl_jax.weights import export as weights_export
from webssl_jax.weights import load, siglip
from webssl_jax.weights.networks import Networks, template_of
from webssl_jax.weights.tables import WeightsError

_spec = importlib.util.spec_from_file_location(
    "export_tool", pathlib.Path(__file__).parents[2] / "tools" / "export.py"
)
export = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(export)

TOLERANCE = 5e-6
QUICK = {"xla_backend_optimization_level": 0}  # compiled as it stands: it runs once
COLOURS = dict(mean=colours.SIGLIP_MEAN, std=colours.SIGLIP_STD)
FAMILIES = ("hf-siglip", "hf-siglip-vision")
LABELS = ["a ship!", "a cat", "a painting of many words, among them a ship"]


def make(image=None, **text):
    """Both towers, small. The text tower differs where it can."""
    encoder = clip_sizes.vision("siglip_micro", **image or {})
    words = clip_sizes.text("siglip_micro", **text)
    view = View(image_size=encoder.image_size)
    return CLIP(encoder, words, contrast="sigmoid", view=view, **COLOURS)


def random_params(method):
    """None zero or one, so that a tensor in a wrong place shows."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        if path.startswith("logit"):
            return np.float32({"logit_scale": 2.3, "logit_bias": -1.3}[path])
        x = 0.15 * rng.standard_normal(leaf.shape, np.float32)
        return x + 1 if path.endswith("scale") else x

    return params.map_with_path(draw, template_of(Networks.of(method)))


@pytest.fixture(scope="module")
def method():
    return make()


@pytest.fixture(scope="module")
def weights(method):
    return random_params(method)


@pytest.fixture(scope="module")
def folders(method, weights, tmp_path_factory):
    root = tmp_path_factory.mktemp("siglip")
    rest = ("float32", 2**40, lambda: "card")
    return {f: weights_export.write(weights, method, f, root / f, *rest) for f in FAMILIES}


@pytest.mark.parametrize("size", SIGLIP_COUNTS)
def test_each_size_has_the_parameters_of_transformers(size):
    towers = clip_sizes.vision(size), clip_sizes.text(size, vocabulary=32_000)
    config = siglip.hf_config(types.SimpleNamespace(encoder=towers[0], text=towers[1]))
    with torch.device("meta"):
        theirs = transformers.SiglipModel(transformers.SiglipConfig(**config))
    vision = sum(p.numel() for p in theirs.vision_model.parameters())
    assert (vision, sum(p.numel() for p in theirs.parameters())) == SIGLIP_COUNTS[size]


def test_towers_and_logits_are_those_of_transformers(method, weights, folders):
    networks = Networks.of(method)
    compared = export.verify(
        networks, weights, "hf-siglip", folders["hf-siglip"], "float32", transformers
    )
    assert [c.what for c in compared] == ["image embeddings", "text embeddings", "logits"]
    assert max(c.relative for c in compared) < TOLERANCE


def test_towers_of_googles_ids_and_of_other_shapes_are_those_of_transformers(tmp_path):
    """Ids below 32,000, another head of texts, and positions of a grid of 9."""
    method = make({"image_size": 24, "depth": 3, "mlp_hidden": 57}, vocabulary=96, context=12)
    tree = random_params(method)
    folder = weights_export.write(
        tree, method, "hf-siglip", tmp_path / "out", "float32", 2**40, lambda: "card"
    )
    names = sorted(path.name for path in folder.iterdir())
    assert "tokenizer.json" not in names and "preprocessor_config.json" in names
    loaded = load.load(folder)
    assert loaded.networks.text.vocabulary == 96 and not loaded.assumed
    compared = export.verify(
        Networks.of(method), tree, "hf-siglip", folder, "float32", transformers
    )
    assert max(c.relative for c in compared) < TOLERANCE


def test_the_image_tower_alone_gives_their_tokens_at_any_size(method, weights, folders):
    folder = folders["hf-siglip-vision"]
    compared = export.verify(
        Networks.of(method), weights, "hf-siglip-vision", folder, "float32", transformers
    )
    assert [c.what for c in compared] == ["features at 32x32", "features at 40x56"]
    assert max(c.relative for c in compared) < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_written_or_saved_by_transformers_is_read_bit_by_bit(
    method, weights, folders, tmp_path, family
):
    theirs = getattr(transformers, load.FAMILIES[family].opens).from_pretrained(folders[family])
    theirs.save_pretrained(tmp_path)
    # Its model alone says nothing of images, so they are made as SigLIP's own code does.
    for path, resize in ((folders[family], 32), (tmp_path, None)):
        loaded = load.load(path)
        assert loaded.family == family and not loaded.assumed and not loaded.left
        assert dataclasses.replace(loaded.networks.encoder, mlp_hidden=None) == method.encoder
        if family == "hf-siglip":
            assert dataclasses.replace(loaded.networks.text, mlp_hidden=None) == method.text
            assert loaded.networks.contrast == "sigmoid"
        assert loaded.networks.preprocess == Preprocess(32, resize, **COLOURS)
        wanted = {name: weights[name] for name in loaded.params}
        jax.tree.map(np.testing.assert_array_equal, loaded.params, wanted)


def test_the_cards_own_code_scores_as_we_do_at_any_context(tmp_path, monkeypatch):
    """The stock pipeline fills texts up to 64 tokens, where this model has 16."""
    method = make({}, context=16)
    tree = random_params(method)
    model = Model(Networks.of(method), tree)
    folder = model.save(tmp_path / "small", "hf-siglip")
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    pixels_ = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    scope = {"image": Image.fromarray(pixels_)}
    monkeypatch.chdir(tmp_path)
    exec(code, scope)
    seen, read = model.text.embed_images(pixels_[None]), model.text(scope["labels"])
    scale, bias = model.text.scale_and_bias
    ours = np.asarray(seen) @ read.T * scale + bias
    np.testing.assert_allclose(scope["logits"].detach().numpy(), ours, atol=0.02)  # a grey level


def test_the_stock_pipeline_scores_as_we_do(method, weights, folders):
    classify = transformers.pipeline(
        "zero-shot-image-classification", model=str(folders["hf-siglip"])
    )
    pixels_ = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    found = classify(Image.fromarray(pixels_), candidate_labels=LABELS, hypothesis_template="{}")
    scores = {row["label"]: row["score"] for row in found}
    tokens = Tokenizer(64, method.padding)(LABELS)
    towers = Model.of(method, Variables(weights, {}, {})).text
    image, texts = towers.embed_images(pixels_[None]), towers.embed(tokens)
    logits = np.exp(weights["logit_scale"]) * (image @ texts.T)[0] + weights["logit_bias"]
    expected = jax.nn.sigmoid(logits)
    np.testing.assert_allclose([scores[label] for label in LABELS], expected, atol=1e-5)


def test_texts_are_filled_up_with_the_end_there_and_here(method, folders):
    theirs = transformers.AutoTokenizer.from_pretrained(folders["hf-siglip"])
    padded = theirs(LABELS, padding="max_length", max_length=64)
    assert set(padded) == {"input_ids"}  # no mask: padding is read, as in training
    ours = Tokenizer(64, method.padding)(LABELS)
    assert method.padding == END and padded["input_ids"] == ours.tolist()


@pytest.mark.parametrize(
    "family, change, says",
    [
        ("hf-siglip", lambda m: ("encoder", {"mlp": "gelu"}), "has no mlp = 'gelu'"),
        ("hf-siglip", lambda m: ("text", {"causal": True}), "has no causal = True"),
        ("hf-siglip", lambda m: ("text", {"pooling": "eot"}), "has no pooling = 'eot'"),
        ("hf-clip", lambda m: ("encoder", {}), "has no mlp = 'gelu_tanh'"),
        ("open-clip", lambda m: ("encoder", {}), "has no mlp = 'gelu_tanh'"),
        ("hf-vit", lambda m: ("encoder", {}), "its networks have pooling: cls, this model has map"),
    ],
)
def test_towers_that_a_library_would_compute_otherwise_are_refused(
    method, weights, tmp_path, family, change, says
):
    tower, fields = change(method)
    other = {tower: dataclasses.replace(getattr(method, tower), **fields)}
    networks = dataclasses.replace(Networks.of(method), **other)
    with pytest.raises(WeightsError, match=says):
        weights_export.write(
            weights, networks, family, tmp_path / "o", "float32", 2**40, lambda: "card"
        )
    assert not (tmp_path / "o").exists()


def test_initial_values_are_spread_as_big_visions(method):
    flat = params.flatten(jax.jit(lambda: init(method), compiler_options=QUICK)())
    width, patch = 32, 8 * 8 * 3
    for path, std in {
        "encoder/patch_embed/kernel": patch**-0.5,
        "encoder/pos_embed": width**-0.5,
        "encoder/blocks/attn/q/kernel": (2 / (2 * width)) ** 0.5,  # xavier
        "encoder/blocks/mlp/fc1/kernel": (2 / (5 * width)) ** 0.5,
        "encoder/pool/attn/v/kernel": (2 / (2 * width)) ** 0.5,
        "encoder/pool/mlp/fc2/kernel": (2 / (5 * width)) ** 0.5,
        "text/token_embed": width**-0.5,
        "text/pos_embed": width**-0.5,
        "text/blocks/attn/out/kernel": (2 / (2 * width)) ** 0.5,
        "text/projection/kernel": width**-0.5,
    }.items():
        assert np.std(flat[path]) == pytest.approx(std, rel=0.1), path
    assert 0 < np.abs(flat["encoder/blocks/mlp/fc1/bias"]).max() < 1e-5
    for path in ("encoder/patch_embed/bias", "text/blocks/attn/q/bias", "text/projection/bias"):
        assert not flat[path].any(), path
    assert np.exp(flat["logit_scale"]) == pytest.approx(10) and flat["logit_bias"] == -10


def init(method):
    return method.init(jax.random.key(0), method.batch_spec(1)).params


def test_the_method_trains_all_of_both_towers(method, weights):
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (4, 32, 32, 3)).astype(np.uint8),
        "tokens": Tokenizer(64, method.padding)([*LABELS, ""]),
    }

    def loss(tree):
        out = method.loss(tree, {}, {}, batch, jax.random.key(0), {})
        return out.loss, out.report

    step = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=QUICK)
    (value, report), gradients = step(weights)
    assert np.isfinite(value) and report["empty_texts"] == 0.25
    still = [path for path, g in params.flatten(gradients).items() if not np.any(g)]
    assert not [p for p in still if not p.endswith("k/bias")]  # which softmax does not see
    assert "projection" not in weights and method.train_flops() > 0


def test_pictures_see_where_the_probe_looks(method, weights):
    images = np.random.default_rng(0).integers(0, 256, (2, 24, 40, 3)).astype(np.uint8)
    want = Want(blocks=(0, -1), diagnostics=True)
    seen = Model.of(method, Variables(weights, {}, {})).features(images, want)
    inside = seen.diagnostics
    assert seen.cls.shape == (2, 32) and seen.patches.shape == (2, 3, 5, 32)
    np.testing.assert_allclose(inside.attention.sum(axis=(2, 3)), 1, rtol=1e-5)
    np.testing.assert_allclose(inside.cls_norm, np.linalg.norm(seen.cls, axis=1), rtol=1e-5)
    np.testing.assert_allclose(seen.blocks[-1][0], seen.cls, rtol=1e-5)
    # The weights are those that the pooling mixes by: of one value alone it makes that value.
    pool = weights["encoder"]["pool"]
    tokens = seen.patches.reshape(2, 15, 32)
    values = tokens @ pool["attn"]["v"]["kernel"] + pool["attn"]["v"]["bias"]
    weight = inside.attention.reshape(2, 2, 15)
    mixed = jnp.einsum("bht,bthd->bhd", weight, values.reshape(2, 15, 2, 16)).reshape(2, 32)
    found = mixed @ pool["attn"]["out"]["kernel"] + pool["attn"]["out"]["bias"]
    norm = (found - found.mean(1, keepdims=True)) / found.std(1, keepdims=True)
    hidden = norm * pool["norm"]["scale"] + pool["norm"]["bias"]
    hidden = hidden @ pool["mlp"]["fc1"]["kernel"] + pool["mlp"]["fc1"]["bias"]
    hidden = jax.nn.gelu(hidden, approximate=True) @ pool["mlp"]["fc2"]["kernel"]
    np.testing.assert_allclose(found + hidden + pool["mlp"]["fc2"]["bias"], seen.cls, atol=2e-4)


def test_embeddings_of_images_are_what_is_pooled(method, weights):
    images = np.random.default_rng(0).standard_normal((2, 32, 32, 3), np.float32)
    tower = {"params": {"encoder": weights["encoder"]}}
    apply = functools.partial(CLIPVision(method.encoder, 32).apply, tower)
    out = jax.jit(apply, compiler_options=QUICK)(images)
    assert out.shape == (2, 32) and out.dtype == jnp.float32
    with pytest.raises(ValueError, match="text.embedding = 16: pooling = 'map' has no projection"):
        make(embedding=16)
    texts = TextTower(method.text).apply({"params": weights["text"]}, np.full((1, 64), END))
    assert texts.shape == (1, 32)
