"""A CLIP that was trained here, exported, in the stock pipeline of transformers: offline, the right
caption first, the scores those of our own code."""

import functools
import importlib.util
import io
import json
import math
import pathlib
import re

import jax
import numpy as np
import optax
import pytest
import torch
import transformers
from ml_collections import ConfigDict
from PIL import Image

from webssl_jax import methods, publish
from webssl_jax.data import records
from webssl_jax.data.sources import ArrayRecordSource
from webssl_jax.data.tokens import Tokenizer, clean
from webssl_jax.methods.base import Variables
from webssl_jax.model import Model
from webssl_jax.runs import Run
from webssl_jax.weights import load, safetensors_io

_spec = importlib.util.spec_from_file_location(
    "export_tool", pathlib.Path(__file__).parents[2] / "tools" / "export.py"
)
export = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(export)

SIDE, PAIRS, STEPS = 32, 8, 40
TOLERANCE = 0.02  # of a probability: the two resize images to within a grey level of each other
QUICK = {"xla_backend_optimization_level": 0}  # compiled as it stands: it runs a few times
DATA_GOLDEN = pathlib.Path(__file__).parents[1] / "data" / "golden"
# What the cleaned text of a string may hold where theirs has other ids: other names of the special
# tokens, a letter that ignoring case makes an s, letters younger than one library's Unicode tables.
APART = re.compile("(start|end)_?of_?text|'ſ|[\u1f17\u0c5c]")


def make_config():
    return ConfigDict(
        {
            "name": "clip_test",
            "total_steps": STEPS,
            "global_batch": PAIRS,
            "model": {"size": "micro", "image_size": SIDE},
            "method": {"name": "clip", "view": {"image_size": SIDE}, "text": {"width": 32}},
            "data": {"train": "corpus:train"},
            "optim": {
                "lr": 1e-2,
                "warmup_steps": 0,
                "cooldown_steps": 0,
                "lr_scaling": "none",
                "lr_batch": 2,
            },
        }
    )


def whole_margin(image):
    """Whether both sides crop the same pixels: half a pixel is rounded to even here, down there."""
    long = int(SIDE * max(image.size) / min(image.size))
    return (long - SIDE) % 2 == 0


@pytest.fixture(scope="module")
def pairs():
    """[(image as it lies in the corpus, its caption)], captions all different."""
    source, found = ArrayRecordSource("corpus:test"), {}
    for i in range(len(source)):
        record = records.decode(source[i])
        if record.captions and whole_margin(Image.open(io.BytesIO(record.image))):
            found.setdefault(record.captions[0], record.image)
        if len(found) == PAIRS:
            return [(image, caption) for caption, image in found.items()]
    raise AssertionError("too few captioned images in the corpus")


@pytest.fixture(scope="module")
def run(pairs, tmp_path_factory):
    """A tiny CLIP that has learned those pairs by heart."""
    config = make_config()
    method = methods.create(config)
    view = method.preprocess
    batch = {
        "image": np.stack([view(image) for image, _ in pairs]),
        "tokens": Tokenizer(method.text.context)([caption for _, caption in pairs]),
    }
    rng = jax.random.key(0)
    params = jax.jit(lambda: method.init(rng, method.batch_spec(PAIRS)).params)()
    optimiser = optax.adam(2e-3)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def step(params, state):
        loss, gradients = jax.value_and_grad(lambda p: method.loss(p, {}, {}, batch, rng, {}).loss)(
            params
        )
        updates, state = optimiser.update(gradients, state)
        return optax.apply_updates(params, updates), state, loss

    state = optimiser.init(params)
    for _ in range(STEPS):
        params, state, loss = step(params, state)
    assert loss < 0.3 < math.log(PAIRS)
    workdir = tmp_path_factory.mktemp("run")
    params = jax.tree.map(np.asarray, params)
    return Run(str(workdir), config, STEPS, method, Variables(params, {}, {}))


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory):
    return publish.export_run(run, "hf-clip", tmp_path_factory.mktemp("out") / "clip")


def test_the_stock_pipeline_ranks_as_we_do_and_the_right_caption_first(run, pairs, folder):
    model = Model.of(run.method, run.variables)
    captions = [caption for _, caption in pairs]
    images = np.stack([model.preprocess(image) for image, _ in pairs])
    seen, read = model.text.embed_images(images), model.text(captions)
    scale, bias = model.text.scale_and_bias
    assert bias == 0
    ours = np.asarray(jax.nn.softmax(scale * seen @ read.T, axis=1))

    classify = transformers.pipeline("zero-shot-image-classification", model=str(folder))
    for (image, caption), expected in zip(pairs, ours):
        opened = Image.open(io.BytesIO(image)).convert("RGB")
        found = classify(opened, candidate_labels=captions, hypothesis_template="{}")
        assert found[0]["label"] == caption
        scores = {row["label"]: row["score"] for row in found}
        np.testing.assert_allclose([scores[c] for c in captions], expected, atol=TOLERANCE)


def test_of_the_same_pixels_the_scores_are_the_same_to_float_tolerance(run, pairs, folder):
    model = transformers.CLIPModel.from_pretrained(folder)
    comparisons = export._compare_towers(Model.of(run.method, run.variables), model)
    assert [c.what for c in comparisons] == ["image embeddings", "text embeddings", "logits"]
    assert max(c.relative for c in comparisons) < 5e-6


def ids_of(row):
    return row[: np.flatnonzero(row)[-1] + 1].tolist()


@pytest.mark.parametrize("name", ["AutoTokenizer", "CLIPTokenizer", "PreTrainedTokenizerFast"])
def test_the_exported_tokenizer_is_ours_on_awkward_strings_once_they_are_cleaned(folder, name):
    theirs = getattr(transformers, name).from_pretrained(folder)
    texts = json.loads((DATA_GOLDEN / "clip_tokens.json").read_text())["texts"]
    texts += [
        e["text"] for e in json.loads((DATA_GOLDEN / "d_tokenizer.json").read_text())["strings"]
    ]
    texts = [text for text in texts if not APART.search(clean(text))]
    assert len(texts) > 450 and theirs.model_max_length == 77
    wrong = [
        text
        for text, row in zip(texts, Tokenizer(77)(texts))
        if theirs(clean(text), truncation=True)["input_ids"] != ids_of(row)
    ]
    assert not wrong
    plain = [t for t in texts if clean(t) == " ".join(t.split()).lower() and "Σ" not in t]
    assert len(plain) > 200
    for text, row in zip(plain, Tokenizer(77)(plain)):
        assert theirs(text, truncation=True)["input_ids"] == ids_of(row), text


def test_texts_are_padded_with_what_does_not_change_them(run, folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.CLIPModel.from_pretrained(folder)
    texts = ["a ship", "a painting of a very old ship at sea"]
    with torch.no_grad():
        theirs = model.get_text_features(**tokenizer(texts, padding=True, return_tensors="pt"))
    ours = Model.of(run.method, run.variables).text(texts)
    theirs = theirs.pooler_output / theirs.pooler_output.norm(dim=1, keepdim=True)
    np.testing.assert_allclose(ours, theirs, atol=2e-6)


@pytest.mark.parametrize("family", ["hf-clip", "hf-clip-vision"])
def test_the_card_says_how_to_use_the_folder_and_that_way_works(
    run, pairs, tmp_path, family, monkeypatch
):
    folder = publish.export_run(run, family, tmp_path / "out")
    card = (folder / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    scope = {"image": Image.open(io.BytesIO(pairs[0][0])).convert("RGB")}
    monkeypatch.chdir(tmp_path)
    exec(code, scope)
    if family == "hf-clip":
        assert sum(row["score"] for row in scope["scores"]) == pytest.approx(1)
        assert "pipeline_tag: zero-shot-image-classification" in card and "whose files are" in card
    else:
        model = Model.of(run.method, run.variables)
        ours = model.features(model.preprocess(pairs[0][0])[None]).cls
        np.testing.assert_allclose(scope["cls"].detach(), ours, atol=0.05)  # a grey level
    assert "trained on images with captions" in card


def test_the_tool_verifies_what_it_writes_and_reads_it_again(run, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(export.runs, "load_run", lambda workdir, step=None: run)
    for family in ("hf-clip-vision", "open-clip-pth"):
        output = tmp_path / (f"{family}.pt" if family.endswith("pth") else family)
        argv = ["--workdir", "W", "--format", family, "--output", str(output), "--verify"]
        assert export.main(argv) == 0
        assert "verified with" in capsys.readouterr().out
    folder = tmp_path / "converted"
    argv = ["--weights", str(output), "--format", "hf-clip", "--output", str(folder), "--verify"]
    assert export.main(argv) == 0
    assert "verified with transformers" in capsys.readouterr().out


@pytest.mark.parametrize("family", ["hf-clip", "hf-clip-vision"])
def test_what_transformers_saves_itself_is_read_bit_for_bit(run, tmp_path, family):
    folder = publish.export_run(run, family, tmp_path / "out")
    model = getattr(transformers, load.FAMILIES[family].opens).from_pretrained(folder)
    model.save_pretrained(tmp_path / "theirs")
    back = load.load(tmp_path / "theirs")
    assert back.family == family and not back.assumed
    expected = run.variables.params
    jax.tree.map(
        np.testing.assert_array_equal, back.params, {name: expected[name] for name in back.params}
    )
    bare = {name: x.numpy() for name, x in model.state_dict().items()}  # its modules' own names
    specs = [safetensors_io.Spec(name, x.shape) for name, x in bare.items()]
    safetensors_io.write_file(tmp_path / "bare.safetensors", specs, bare.items())
    assert load.best_family(load.open_files(tmp_path / "bare.safetensors")).name == family
