"""Visual instruction tuning: images, connector, placement and loss beside Cambrian-1's code and
transformers; what is trained; what a run begins with."""

import dataclasses
import functools
import io
import logging
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from ml_collections import ConfigDict
from PIL import Image

from tests.methods import small_vqa
from tests.methods.small_vqa import GOLDEN, VOCABULARY, fresh, make, tokenizer_folder
from webssl_jax import config as configs
from webssl_jax import params as params_lib
from webssl_jax import train_state
from webssl_jax.colours import IMAGENET_MEAN
from webssl_jax.config import ConfigError
from webssl_jax.data import annotations
from webssl_jax.data.dialogues import see, square
from webssl_jax.data.records import Record, RecordError
from webssl_jax.language import answers, decoder, load
from webssl_jax.language.dialogue import CELL, HIDDEN_CELL, PADDING
from webssl_jax.model import Model
from webssl_jax.models import connector as connectors
from webssl_jax.models.connector import ConnectorConfig
from webssl_jax.optim.guard import Guard
from webssl_jax.optim.optimizer import Optimizer
from webssl_jax.sharding import mesh as meshes
from webssl_jax.train_step import jit_train_step, make_train_step, run_schedules, verdict
from webssl_jax.weights.init_from import from_weights
from webssl_jax.weights.networks import Networks
from webssl_jax.weights.stored import WeightsError


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN / "m_connector.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return tokenizer_folder(tmp_path_factory.mktemp("words"))


@pytest.fixture(scope="module")
def method(words):
    return make(words)


@pytest.fixture(scope="module")
def params(method):
    return fresh(method)


def picture(seed=0, width=40, height=24):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def record(*said, seed=0):
    file = io.BytesIO()
    Image.fromarray(picture(seed)).save(file, "PNG")
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(said)]
    found = {"conversations": annotations.encode_json(turns)}
    return Record(file.getvalue(), (), "a", 40, 24, "s", annotations=found)


def batch(method, *conversations):
    view = method.train_view()
    rows = [view(record(*said, seed=i), None) for i, said in enumerate(conversations)]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


TALK = (("<image>\nWhat?", "A cat."), ("Say hi", "hi"))


@functools.partial(jax.jit, static_argnums=0)
def learn(method, params, data):
    """(loss, report), gradient."""

    def loss(tree):
        out = method.loss(tree, {}, {}, data, jax.random.key(0), {})
        return out.loss, out.report

    return jax.value_and_grad(loss, has_aux=True)(params)


def loss_of(method, params, data):
    (loss, report), _ = learn(method, params, data)
    return float(loss), report


# ------------------------------------------------------------------------- beside Cambrian-1's code


@pytest.mark.parametrize("name", ["wide", "square"])
def test_images_are_padded_with_the_mean_and_resized_as_cambrian_does(golden, name):
    image = Image.fromarray(golden[f"square/{name}/in"])
    padded = np.asarray(square(image, IMAGENET_MEAN))
    np.testing.assert_array_equal(padded, golden[f"square/{name}/padded"])
    np.testing.assert_array_equal(see(image, 28, IMAGENET_MEAN), golden[f"square/{name}/resized28"])


@pytest.mark.parametrize("side", [16, 27])
def test_any_grid_is_resized_to_24_by_24_as_cambrian_does(golden, side):
    tokens = golden[f"resize/{side}/in"].reshape(1, side, side, 3)
    resized = connectors.resize(tokens, 24).reshape(1, 576, 3)
    np.testing.assert_allclose(resized, golden[f"resize/{side}/out"], rtol=2e-4, atol=2e-5)


def test_the_connector_is_cambrians_and_ends_each_row_with_a_newline(golden):
    layers = {
        f"fc{i}": {
            "kernel": golden[f"projector/sd/{place}.weight"].T,
            "bias": golden[f"projector/sd/{place}.bias"],
        }
        for i, place in ((1, 0), (2, 2))
    }
    patches = np.repeat(golden["projector/x"][:, None], 5, axis=1)  # 5 rows of 5
    newline = np.full(32, 7.0, np.float32)
    config = ConnectorConfig(outputs=32, grid=5, newline=True)
    made = connectors.connect(config, layers | {"newline": newline}, patches)
    made = np.asarray(made).reshape(2, 5, 6, 32)
    np.testing.assert_allclose(made[:, 3, :5], golden["projector/y"], rtol=2e-4, atol=2e-5)
    assert (made[:, :, 5] == 7).all()


# -------------------------------------------------------------------------------------------- loss


def test_the_loss_and_the_connectors_gradient_are_those_of_transformers(method, params, tmp_path):
    """Rows of different lengths, an image with hidden cells, and a text without one."""
    data = batch(method, *TALK)
    assert (data["tokens"] == HIDDEN_CELL).any() and (data["tokens"] == PADDING).any()
    (out, _), grads = learn(method, params, data)
    grads = grads["connector"]

    load.write_folder(tmp_path / "llama", method.language, params["language"])
    llama = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "llama").eval()
    see_image = jax.jit(answers.image_cells, static_argnums=0)
    seen = see_image(method, params, _normalised(method, data["image"]))
    cells = torch.tensor(np.asarray(seen), requires_grad=True)
    total, targets = torch.zeros(()), 0
    for row in range(len(data["tokens"])):
        tokens = data["tokens"][row]
        x = llama.get_input_embeddings()(torch.tensor(np.maximum(tokens, 0)).long())
        of_image = torch.tensor((tokens == CELL) | (tokens == HIDDEN_CELL))
        x = x.clone()
        x[of_image] = cells[row][: int(of_image.sum())]
        real = (tokens >= 0) | (tokens == CELL)  # what is not is cut out altogether
        labels = torch.tensor(np.where(data["answer"][row], tokens, -100)[real]).long()
        logits = llama(inputs_embeds=x[torch.tensor(real)][None]).logits[0]
        total = total + torch.nn.functional.cross_entropy(
            logits[:-1], labels[1:], reduction="sum", ignore_index=-100
        )
        targets += int((labels[1:] != -100).sum())
    loss = total / targets
    assert float(out) == pytest.approx(loss.item(), rel=1e-5)
    loss.backward()
    fc2 = params["connector"]["fc2"]["bias"]
    whole = cells.grad.numpy().reshape(2, 3, 4, -1)  # the newline's column apart
    np.testing.assert_allclose(grads["fc2"]["bias"], whole[:, :, :3].sum((0, 1, 2)), atol=1e-6)
    np.testing.assert_allclose(grads["newline"], whole[:, :, 3].sum((0, 1)), atol=1e-6)
    assert np.abs(whole).max() > 1e-5 and fc2.shape == grads["fc2"]["bias"].shape


def _normalised(method, images):
    return (jnp.asarray(images, jnp.float32) / 255 - np.array(method.mean)) / np.array(method.std)


def test_logits_in_blocks_are_those_of_all_at_once(method):
    rng = np.random.default_rng(0)
    last = rng.normal(size=(2, 11, 32)).astype(np.float32)
    labels, counts = rng.integers(0, VOCABULARY, (2, 11)), rng.random((2, 11)) < 0.5
    language = {"lm_head": {"kernel": rng.normal(size=(32, VOCABULARY)).astype(np.float32)}}
    labels[0] = (last[0] @ language["lm_head"]["kernel"]).argmax(-1)  # of all those, right
    logits = last @ language["lm_head"]["kernel"]
    each = (
        np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, labels[..., None], -1)[..., 0]
    )
    hits = (logits.argmax(-1) == labels)[counts].mean()
    for block in (0, 4):
        loss, share = answers.answer_loss(method.language, language, last, labels, counts, block)
        assert float(loss) == pytest.approx(each[counts].mean(), rel=1e-5)
        assert float(share) == pytest.approx(hits)


def test_a_block_of_tokens_that_do_not_count_is_not_computed(method):
    """Its logits would be NaN, and the head's gradient too."""
    rng = np.random.default_rng(0)
    last = np.full((2, 12, 32), np.nan, np.float32)
    counts = np.zeros((2, 12), bool)
    counts[0, [2, 9]] = counts[1, 11] = True  # with others of the first text in one block of eight
    last[0, :6] = rng.normal(size=(6, 32))
    last[0, 9], last[1, 11] = rng.normal(size=(2, 32))
    kernel = jnp.asarray(rng.normal(size=(32, VOCABULARY)), jnp.float32)

    def loss(kernel, last, block):
        language, labels = {"lm_head": {"kernel": kernel}}, np.ones((2, 12), int)
        return answers.answer_loss(method.language, language, last, labels, counts, block)[0]

    found, grad = jax.value_and_grad(loss)(kernel, last, 4)
    wanted, whole = jax.value_and_grad(loss)(kernel, np.nan_to_num(last), 0)
    np.testing.assert_allclose(grad, whole, atol=1e-6)
    assert float(found) == pytest.approx(float(wanted), rel=1e-6)


def test_the_heads_gradient_is_summed_over_devices_once_and_not_for_each_block(method):
    def loss(kernel):
        language, labels = {"lm_head": {"kernel": kernel}}, jnp.ones((4, 12), int)
        last, counts = jnp.ones((4, 12, 32)), labels > 0
        return answers.answer_loss(method.language, language, last, labels, counts, 4)[0]

    mesh = meshes.create(ConfigDict(dict(replica=2, fsdp=2, tensor=1)), jax.devices()[:4])
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        text = str(jax.make_jaxpr(jax.grad(loss))(jnp.ones((32, VOCABULARY))))
    *before, backward = text.split("shard_map[")
    assert backward.count("psum[") == 1 and "scan[" not in backward
    assert "scan[" in before[0] and not any("psum[" in part for part in before)


def test_what_stands_behind_an_answer_or_is_no_answer_does_not_count(method, params):
    data = batch(method, *TALK)
    before, _ = loss_of(method, params, data)
    other = {name: x.copy() for name, x in data.items()}
    other["tokens"][other["tokens"] == PADDING] = PADDING - 5
    other["image"][1] = 255  # no token stands for it
    assert loss_of(method, params, other)[0] == before
    other["image"][0] = 255
    assert loss_of(method, params, other)[0] != before


def test_a_conversation_that_is_too_long_is_cut_and_counted(words, method, params):
    cut = batch(make(words, length=40), ("<image>\nWhat?", "A cat and a dog."), TALK[1])["cut"]
    assert list(cut > 0) == [True, False]
    _, report = loss_of(method, params, batch(method, *TALK) | {"cut": cut})
    assert float(report["cut_texts"]) == 0.5


def test_a_record_without_an_answer_is_damaged(method):
    with pytest.raises(RecordError, match="no answer to learn"):
        method.train_view()(record("<image>\nWhat?", ""), None)


# ------------------------------------------------------------------------------- what is trained


def test_frozen_networks_have_neither_moments_nor_a_backward_pass(words, method, params):
    optim = ConfigDict(
        dict(b1=0.9, b2=0.999, eps=1e-8, clip="none", clip_norm=1.0, moment_dtype="float32")
        | dict(frozen=(), lr_multipliers=())
    )
    for trained in (("connector",), ("connector", "language")):
        tables = make(words, trained=trained).tables()
        moments = jax.eval_shape(Optimizer.from_config(optim, tables).init, params)
        counted = sum(params_lib.count(params[name]) for name in trained)
        assert sum(x.size for x in jax.tree.leaves(moments)) == 2 * counted + 1  # and a step
    _, grads = learn(method, params, batch(method, *TALK))
    learns = {name for name, tree in grads.items() if any(map(np.any, jax.tree.leaves(tree)))}
    assert learns == {"connector"}


@pytest.mark.slow
def test_steps_are_the_same_on_eight_devices_and_the_encoder_stays(words):
    method = make(words, trained=("connector", "language"))
    overrides = ["global_batch=8", "total_steps=4", "optim.warmup_steps=0"]
    config = configs.load("vqa:stage=2", overrides)
    data = batch(method, *TALK * 4)
    losses = []
    for shape in ((1, 1, 1), (2, 2, 2)):
        axes = ConfigDict(dict(zip(meshes.AXES, shape)))
        mesh = meshes.create(axes, jax.devices()[: math.prod(shape)])
        optimizer = Optimizer.from_config(config.optim, method.tables())
        template = train_state.abstract(method, optimizer, 0, 8, mesh)
        state = first = train_state.create(method, optimizer, 0, 8, mesh)
        made = make_train_step(method, optimizer, Guard(), run_schedules(config, method), mesh)
        step = jit_train_step(made, template, mesh, donate=False)
        for _ in range(2):
            state, metrics, _ = step(state, meshes.to_global(data, mesh), verdict(0, mesh))
            losses += [float(metrics[x]) for x in ("train/loss", "optim/grad_norm")]
        same = jax.tree.map(np.array_equal, first.params, state.params)
        assert all(jax.tree.leaves(same["encoder"]))
        assert not any(jax.tree.leaves(same["language"]["blocks"]))
    assert losses[4:] == pytest.approx(losses[:4], rel=1e-5) and losses[2] < losses[0]


def test_a_run_begins_with_an_encoder_and_a_language_model(method, params, tmp_path, caplog):
    other = fresh(method, seed=1)
    Model(Networks.of(method), other).save(tmp_path / "encoder", "hf-dinov2")  # of all three
    load.write_folder(tmp_path / "llama", method.language, other["language"])
    with caplog.at_level(logging.INFO):
        found = from_weights(
            f"{tmp_path}/encoder,{tmp_path}/llama", method, {"params": params, "teacher": {}}
        )["params"]
    for name, tree in (("encoder", other), ("language", other), ("connector", params)):
        jax.tree.map(np.testing.assert_array_equal, found[name], tree[name])
    assert "took the language" in caplog.text and "fresh: connector" in caplog.text
    wider = dataclasses.replace(
        method, language=dataclasses.replace(method.language, rope_theta=5.0)
    )
    with pytest.raises(WeightsError, match=r"rope_theta = 10000.0, not 5.0"):
        from_weights(f"{tmp_path}/llama", wider, {"params": params, "teacher": {}})


@pytest.mark.parametrize(
    ("method", "why"),
    [
        ({"trained": ("encoder",)}, "trained = .*must be some of connector, language"),
        ({"length": 12}, "length = 12: must be more than the 12 cells"),
        ({"connector": {"outputs": 16}}, "connector.outputs = 16 must be the width"),
        ({"connector": {"block": -9}}, "connector.block = -9: the encoder has 2"),
        ({"connector": {"block": 1}}, "block = 1 is counted from the last, which is -1"),
        ({"language": {"size": "gpt"}}, "no decoder 'gpt'"),
        ({"dialogue": {"tokenizer": "x", "template": "y"}}, "template = 'y' is not one of own"),
    ],
)
def test_a_config_that_cannot_be_says_why(words, method, why):
    with pytest.raises(ConfigError, match=why):
        make(words, **method)


def test_another_models_tokenizer_is_refused_before_training(words):
    small = {"language": small_vqa.DECODER | {"vocabulary": 64}}
    with pytest.raises(WeightsError, match="the weights know 64"):
        make(words, **small).train_view()
    assert VOCABULARY > 264 and decoder.template(make(words).language)
