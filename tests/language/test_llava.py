"""Folders for transformers' LlavaForConditionalGeneration: what it computes of them is what our
model computes; what it cannot compute is refused."""

import dataclasses
import types

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from tests.methods.small_vqa import fresh, make, tokenizer_folder
from webssl_jax.data.dialogues import see
from webssl_jax.language import answers, decoder, llava
from webssl_jax.language.dialogue import CELL
from webssl_jax.methods.base import Variables
from webssl_jax.models import pixels
from webssl_jax.tools import export
from webssl_jax.weights.networks import Networks
from webssl_jax.weights.stored import WeightsError

QUESTION = "What is it?"
PLAIN = {"connector": {"grid": 4, "norm": False}}


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return tokenizer_folder(tmp_path_factory.mktemp("words"))


def small(words, size="web_dino_micro", unpad=False, **method):
    fields = {"dialogue": {"tokenizer": str(words), "system": "Be brief.", "unpad": unpad}}
    return make(words, size=size, **fields, **(PLAIN | method))


def picture(width, height):
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(values)


# with a vocabulary of 265 there is no id left for <image>
@pytest.mark.parametrize(
    ("size", "block", "vocabulary"),
    [
        ("web_dino_micro", -1, 272),
        ("clip_micro", -2, 265),
        pytest.param("siglip_micro", -1, 265, marks=pytest.mark.slow),
    ],
)
def test_transformers_reads_a_prompt_as_our_model_does(words, tmp_path, size, block, vocabulary):
    language = dict(width=32, depth=2, heads=4, kv_heads=2, mlp_hidden=48, context=1024)
    method = small(
        words,
        size,
        connector=PLAIN["connector"] | {"block": block},
        language=language | {"vocabulary": vocabulary, "tied_head": block == -2},
    )
    networks, params = Networks.of(method), fresh(method)
    folder = llava.write_folder(tmp_path / "llava", networks, params)
    theirs, said = transformers.LlavaForConditionalGeneration.from_pretrained(
        folder, output_loading_info=True
    )
    assert not said["missing_keys"] and not said["unexpected_keys"]

    image = picture(32, 32)
    tokens = np.array([method.dialogue.prompt(QUESTION, np.ones(16, bool))])
    seen = np.asarray(see(image, 32, method.mean))[None]
    images = pixels.normalise(seen, method.mean, method.std)
    cells = answers.image_cells(method, params, images)
    x = answers.place(params["language"], jnp.asarray(tokens), cells)
    wanted = decoder.apply(method.language, params["language"], embeddings=x).logits

    image_id = theirs.config.image_token_index
    ids = torch.tensor(np.where(tokens == CELL, image_id, tokens)).long()
    values = torch.tensor(np.array(images).transpose(0, 3, 1, 2))
    with torch.no_grad():
        found = theirs(input_ids=ids, pixel_values=values).logits[..., :vocabulary]
    np.testing.assert_allclose(found, wanted, atol=1e-4 * float(np.abs(wanted).max()))
    assert np.abs(np.asarray(wanted)[0, -1] - np.asarray(wanted)[0, 0]).max() > 1e-2

    if size == "web_dino_micro":  # its processor, told as the README says
        processor = transformers.AutoProcessor.from_pretrained(folder)
        code = (folder / "README.md").read_text().split("messages = ")[1].split("\ntext")[0]
        messages = eval(code, {"question": {"role": "user", "content": f"<image>\n{QUESTION}"}})
        text = processor.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        made = processor(
            text=text, images=picture(32, 32), return_tensors="pt", add_special_tokens=False
        )
        assert made["input_ids"].tolist() == ids.tolist()
        np.testing.assert_allclose(made["pixel_values"], values, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"connector": {"grid": 3, "norm": False}}, "resizes no patches: grid = 3 for 4 x 4"),
        ({"connector": {"grid": 4}}, "reads before the final norm: norm = True"),
        (
            {"connector": {"grid": 4, "newline": True, "norm": False}, "unpad": True},
            "has no newlines: newline = True, and hides no padding",
        ),
    ],
)
def test_what_transformers_cannot_compute_is_refused_in_a_line(words, tmp_path, fields, why):
    method = small(words, **fields)
    with pytest.raises(WeightsError, match=why) as refused:
        llava.write_folder(tmp_path / "llava", Networks.of(method), {})
    assert "\n" not in str(refused.value) and not list(tmp_path.iterdir())


def test_an_encoder_that_transformers_llava_does_not_know_is_refused(words, tmp_path):
    method = small(words)
    method = dataclasses.replace(
        method, encoder=dataclasses.replace(method.encoder, num_registers=2)
    )
    with pytest.raises(WeightsError, match="none of its image towers computes this encoder"):
        llava.write_folder(tmp_path / "llava", Networks.of(method), fresh(method))


def test_the_command_writes_a_run_and_refuses_what_it_does_not_do(
    words, tmp_path, monkeypatch, capsys
):
    method = small(words)
    run = types.SimpleNamespace(method=method, step=7, variables=Variables(fresh(method), {}, {}))
    monkeypatch.setattr(export.runs, "load_run", lambda workdir, step: run)
    command = ["--workdir", "RUN", "--format", "hf-llava", "--output", str(tmp_path / "llava")]
    assert export.main(command) == 0 and "step 7" in capsys.readouterr().out
    assert (tmp_path / "llava" / "model.safetensors").exists()
    with pytest.raises(WeightsError, match="is not empty; name a new folder"):
        export.main(command)
    with pytest.raises(SystemExit):
        export.main([*command, "--verify"])
    assert "--verify: not of hf-llava" in capsys.readouterr().err
