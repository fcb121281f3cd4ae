"""The package easy-vqa as records; no package is fetched."""

import json
import pathlib

import numpy as np
import pytest

from tests.data.conversions import read_shards
from tests.data.image_shards import encode_image, smooth_image
from webssl_jax.config import UserError
from webssl_jax.corpus import easy_vqa
from webssl_jax.data import annotations
from webssl_jax.tools import easy_vqa as tool

ASKED = [
    ("is there a circle?", "yes"),
    ("what shape is it?", "circle"),
    ("what is the color of the circle?", "red"),
    ("is it red?", "yes"),
    ("what color is the shape?", "red"),
]


def test_no_answer_of_a_conversation_is_known_from_those_before_it(tmp_path, monkeypatch):
    image = encode_image(smooth_image(np.random.default_rng(0), 64, 64), "PNG")
    questions = json.dumps([[q, a, i] for i in range(3) for q, a in ASKED])
    tree = {f"easy_vqa/data/{split}/questions.json": questions for split in easy_vqa.SPLITS}
    for split in easy_vqa.SPLITS:
        tree |= {f"easy_vqa/data/{split}/images/{i}.png": image for i in range(3)}
    monkeypatch.setattr(easy_vqa, "download", lambda packages, cache, done: None)
    monkeypatch.setattr(easy_vqa, "read", lambda archive, wanted: tree)
    monkeypatch.setattr(easy_vqa.Package, "archive", lambda self, cache: pathlib.Path("x.whl"))
    assert easy_vqa.make(tmp_path) == {"train": 3, "test": 3}
    for record in read_shards(tmp_path, "train").values():
        turns = [turn["value"] for turn in annotations.conversations(record)]
        assert turns[0].startswith("<image>\n") and "<image>" not in "".join(turns[1:])
        assert sorted(turns[1::2]) == ["circle", "red"] and turns[3] not in turns[0]
    (first, *_) = read_shards(tmp_path, "test").values()
    asked = annotations.questions(first)
    assert [(one["question"], one["answers"]) for one in asked] == [(q, [a]) for q, a in ASKED]


def test_the_tool_says_what_makes_the_encoder(tmp_path):
    with pytest.raises(UserError, match=r"no such folder; tools/reference.py makes it"):
        tool.main(["--encoder", str(tmp_path / "x"), "--output", str(tmp_path / "y")])
