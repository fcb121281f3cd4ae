"""Conversations of LLaVA and Cambrian-1 become records; what cannot be learned from is counted."""

import json
import tarfile

import numpy as np
import pytest

from tests.data.conversions import counts, read_shards, run_engine
from tests.data.image_shards import encode_image, smooth_image
from webssl_jax.config import UserError
from webssl_jax.data import annotations
from webssl_jax.data.converter import items
from webssl_jax.data.converter.conversations_reader import (
    BLANK,
    ConversationsReader,
    list_conversations,
)
from webssl_jax.data.converter.stats import table
from webssl_jax.data.decode import open_image

RULES = items.Rules(keep_duplicates=True)


def turns(*texts):
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


GOOD = [
    {"id": "7", "image": "a/x.jpg", "conversations": turns("<image>\nWhat?", "A cät.")},
    {"id": "8", "conversations": turns("Say hi", "hi", "Again", "hi"), "image": ""},
    {"image": float("nan"), "conversations": [{"from": "gpt", "value": "-"}, *turns("1", "2")]},
]
BAD = {
    "image: unreadable": {"image": "a/gone.jpg", "conversations": turns("<image>", "b")},
    "image: outside of the folder": {"image": "../x.jpg", "conversations": turns("<image>", "b")},
    "several images": {"image": ["a", "b"], "conversations": turns("<image>", "b")},
    "questions and answers that do not take turns": {"conversations": turns("a", "b", "c")},
    "an image is named and none is there": {"conversations": turns("<image> a", "b")},
    "no answer to learn": {"conversations": turns("a", "")},
    "no list of conversations": {"conversations": "a"},
    "a turn without from and value": {"conversations": [{"from": "human"}, {"from": "gpt"}]},
}
HALF = "\ud83d"  # of a character, as JSON escapes it where a text was cut


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images/a").mkdir(parents=True)
    for i, name in enumerate(("x", "y")):
        pixels = smooth_image(np.random.default_rng(i), 48, 40)
        (tmp_path / f"images/a/{name}.jpg").write_bytes(encode_image(pixels, "JPEG"))
    return tmp_path


def convert(folder, file, images, **options):
    root, images, units = list_conversations([str(file)], str(images))
    reader = ConversationsReader(str(root), "test", images, **options)
    stats = run_engine(folder / "out", reader, units, RULES)
    return read_shards(folder / "out"), stats


def write_lines(path, values):
    path.write_text("\n".join(map(json.dumps, values)) + "\n\n")
    return path


def test_json_lines_become_records_and_what_is_dropped_is_counted(folder):
    lines = write_lines(folder / "mix.jsonl", [*GOOD, *BAD.values()])
    with open(lines, "a") as file:
        file.write('{"conversations": [')  # cut off
    found, stats = convert(folder, lines, folder / "images")
    assert list(found) == [f"mix.jsonl:{i}" for i in range(3)]
    first, text, late = found.values()
    assert first.image == (folder / "images/a/x.jpg").read_bytes()
    assert annotations.conversations(first) == GOOD[0]["conversations"]
    assert annotations.metadata(first) == {"id": "7", "image": "a/x.jpg"}
    assert text.image == late.image == BLANK and (text.width, text.height) == (32, 32)
    assert len(annotations.conversations(late)) == 3
    assert stats["turns"] == {"<= 2": 1, "<= 4": 2}  # late has 3, text 4
    assert stats["conversation_words"] == {"<= 20": 3}
    assert "turns        <= 2: 1   <= 4: 2" in table({"split": "a", "shards": 1} | stats)
    assert counts(stats["dropped"]) == dict.fromkeys(BAD, 1) | {"no JSON": 1}


def test_a_list_in_one_json_gives_what_its_lines_give(folder):
    values = [one | {"é": "ü" * i} for i, one in enumerate(GOOD[:2])] * 40
    lines, _ = convert(folder / "a", write_lines(folder / "mix.jsonl", values), folder / "images")
    text = json.dumps(values, indent=1, ensure_ascii=False)
    (folder / "mix.json").write_text(text, "utf-8-sig")  # with a byte order mark
    listed, _ = convert(folder / "b", folder / "mix.json", folder / "images")
    assert len(listed) == 80  # more than a unit
    for a, b in zip(lines.values(), listed.values()):
        assert a.annotations == b.annotations and a.image == b.image


def test_images_may_lie_in_tars(folder):
    with tarfile.open(folder / "one.tar", "w") as tar:
        tar.add(folder / "images/a/y.jpg", "./a/y.jpg")
    talk = turns("<image>\nWhat?", "A dog.")
    values = [{"image": "a/y.jpg", "conversations": talk}, {"image": "a/x", "conversations": talk}]
    lines = write_lines(folder / "mix.jsonl", values)
    found, stats = convert(folder, lines, folder / "*.tar", metadata=False)
    (record,) = found.values()
    assert record.image == (folder / "images/a/y.jpg").read_bytes()
    assert list(record.annotations) == ["conversations"]
    assert counts(stats["dropped"]) == {"image: in none of the tars": 1}


def test_half_a_character_costs_no_conversation_and_null_is_no_word(folder):
    values = [
        {"id": HALF, "conversations": turns("Say it" + HALF, " 猫 ")},
        {"image": f"{HALF}.jpg", "conversations": turns("<image>", "b")},
        {"conversations": turns("Say it", None)},
        {"conversations": turns("How many?", 3)},
    ]
    found, stats = convert(folder, write_lines(folder / "m.jsonl", values), folder / "images")
    (record,) = found.values()
    assert annotations.conversations(record) == turns("Say it\ufffd", " 猫 ")
    assert counts(stats["notes"])["conversation not UTF-8, mended"] == 1
    assert counts(stats["dropped"]) == {"image: unreadable": 1, "a turn without from and value": 2}


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("a.json", "{}", "holds no JSON list"),
        ("a.json", '[{"conversations": []}, {]', "its JSON is damaged"),
        ("a.json", "[" * 99999, "its JSON is damaged"),
        ("a.jsonl", "", "no conversation in"),
    ],
)
def test_what_is_no_set_of_conversations_says_why(folder, name, text, why):
    (folder / name).write_text(text)
    with pytest.raises(UserError, match=why):
        list_conversations([str(folder / name)], str(folder / "images"))


def test_images_that_are_nowhere_are_told_before_any_work(folder):
    lines = write_lines(folder / "mix.jsonl", GOOD)
    with pytest.raises(UserError, match="no such folder; or give a pattern of .tar"):
        list_conversations([str(lines)], str(folder / "elsewhere"))
    (folder / "bad.tar").write_bytes(b"no tar")
    with pytest.raises(UserError, match="no plain tar"):
        list_conversations([str(lines)], str(folder / "bad.tar"))


def test_the_white_image_decodes():
    assert (open_image(BLANK).width, open_image(BLANK).height) == (32, 32)
