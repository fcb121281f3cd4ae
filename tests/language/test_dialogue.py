"""Conversations as tokens, beside vectors made with Cambrian-1's own code."""

import dataclasses
import json

import numpy as np
import pytest

from tests.methods.small_vqa import GOLDEN, tokenizer_folder
from webssl_jax.data.turns import IMAGE, DialogueError, take_turns
from webssl_jax.errors import UserError
from webssl_jax.language.dialogue import (
    CAMBRIAN_SYSTEM,
    CELL,
    HIDDEN_CELL,
    PADDING,
    Dialogue,
    Encoded,
    seen_cells,
)

ONE = np.ones(1, bool)
CONVERSATIONS = {
    "one_turn": ("<image>\nWhat is it?", "A cat."),
    "two_turns": ("<image>\nWhat?", "A cat.", "And?", "A dog."),
    "text_only": ("Say hi", "hi"),
    "unicode": ("<image>\nWas ist das? ä中", "猫"),
}


def turns(*texts):
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN / "m_connector.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tokenizer_folder(tmp_path_factory.mktemp("words")))


@pytest.fixture(scope="module")
def cambrian(folder):
    return Dialogue(tokenizer=folder, template="cambrian", system=CAMBRIAN_SYSTEM)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_tokens_and_labels_are_cambrians(cambrian, golden, name):
    texts = CONVERSATIONS[name]
    messages = cambrian.messages(turns(*texts), image=True)
    encoded = cambrian.encode(messages, ONE if IMAGE in texts[0] else None)
    np.testing.assert_array_equal(encoded.tokens, golden[f"text/plain/{name}/input_ids"])
    np.testing.assert_array_equal(encoded.labels, golden[f"text/plain/{name}/labels"])


def test_a_prompt_is_cambrians_with_the_line_break_of_training(cambrian, golden):
    text = json.loads((GOLDEN / "m_connector.json").read_text())["scalars"]["eval_prompt"]
    messages = cambrian.messages(turns("<image>\nWhat is it?", "-"), image=True)
    assert cambrian.speaker.render(messages[:-1]) == text
    wanted = golden["eval_prompt/plain/tokenizer_image_token_llama3"]
    np.testing.assert_array_equal(cambrian.prompt("What is it?", ONE), wanted)


@pytest.mark.parametrize("size", ["640x480", "480x640", "500x500"])
def test_the_cells_of_padding_are_hidden_and_not_counted(golden, size):
    seen = seen_cells(*map(int, size.split("x")), (24, 25))
    np.testing.assert_array_equal(seen, golden[f"grid/{size}/mask24x25"].reshape(-1))
    np.testing.assert_array_equal(np.cumsum(seen) - 1, golden[f"grid/{size}/position_ids"])


def test_a_template_of_the_models_own_is_learned_from_answer_to_end(folder):
    dialogue = Dialogue(tokenizer=folder, system="Be brief.")
    messages = dialogue.messages(turns("Red <image> or blue?", "Red.", "Sure?", "Yes"), image=True)
    encoded = dialogue.encode(messages, np.array([True, False]))
    speaker = dialogue.speaker
    assert speaker.inner.decode(encoded.tokens[encoded.answer]) == "Red.Yes"
    ends = [speaker.inner.token_to_id("<|eot_id|>")]
    assert list(encoded.tokens[encoded.answer]).count(*ends) == 2
    (start,) = np.flatnonzero(encoded.tokens == CELL)
    assert encoded.tokens[start + 1] == HIDDEN_CELL
    said = speaker.inner.decode(np.delete(encoded.tokens, [start, start + 1]))
    assert "user\n\n\nRed  or blue?assistant\n\nRed." in said
    prompt = dialogue.prompt("Red  or blue?", np.array([True, False]))
    assert prompt == list(encoded.tokens[: len(prompt)])
    assert "systemBe brief." in said.replace("\n", "")


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (("a",), "take turns"),
        (("a", "b", "c"), "take turns"),
        ((), "take turns"),
        (("a", "b", "<image> c", "d"), "an image in a later turn"),
        (("a", "b <image>"), "an image in a later turn"),
        (("<image> a", ""), "no answer to learn"),
    ],
)
def test_what_cannot_be_learned_says_why(cambrian, said, why):
    with pytest.raises(DialogueError, match=why):
        cambrian.encode(cambrian.messages(turns(*said), image=True), ONE)


def test_an_image_that_is_not_there_is_refused_and_a_first_answer_passed_over():
    with pytest.raises(DialogueError, match="none is there"):
        take_turns(turns("<image> a", "b"), image=False)
    late = [{"from": "gpt", "value": "x"}, *turns("a <image><image>", "b")]
    assert take_turns(late, image=True)[0] == {"role": "user", "content": "<image>\na"}


def test_what_is_too_long_is_cut_and_counted_and_the_rest_is_padding():
    encoded = Encoded(np.arange(5, dtype=np.int32), np.array([0, 0, 1, 1, 1], bool))
    short, cut = encoded.fitted(4)
    assert cut == 1 and list(short.labels) == [-100, -100, 2, 3]
    long, cut = encoded.fitted(7)
    assert cut == 0 and list(long.tokens[5:]) == [PADDING] * 2 and not long.answer[5:].any()


def test_a_template_that_rewrites_what_was_said_is_refused(folder, monkeypatch):
    counts = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    speaker = dataclasses.replace(Dialogue(tokenizer=folder).speaker, chat_template=counts)
    monkeypatch.setattr(Dialogue, "speaker", speaker)
    dialogue = Dialogue(tokenizer=folder)
    with pytest.raises(UserError, match="rewrites earlier turns"):
        dialogue.encode(dialogue.messages(turns("a", "b"), image=True), None)
