"""The command that scores kept answers: table, differences, files for servers, sheets."""

import csv
import json

import numpy as np
import pytest
from PIL import Image

from webssl_jax.errors import UserError
from webssl_jax.evaluators.vqa.task import Answer, write_answers
from webssl_jax.tools import score_vqa


def write(folder, **hits):
    """Answers of a model: {benchmark: whether each question is right}."""
    folder.mkdir()
    for task, right in hits.items():
        extra = {"truth": "(a)", "options": ["x", "y"], "category": "c"}
        if task == "gqa":
            extra["truth"] = "left"
        said = [
            Answer(str(n), "Q", "wrong" if not hit else "left" if task == "gqa" else "A", x)
            for n, hit in enumerate(right)
            for x in (extra | {"pair": n // 2},)
        ]
        write_answers(folder / f"{task}.jsonl", said)


def benchmark(folder):
    """MMVP as it is downloaded."""
    (folder / "mmvp/MMVP Images").mkdir(parents=True)
    with open(folder / "mmvp/Questions.csv", "w", newline="", encoding="utf-8") as file:
        rows = [(n, "Q", "(a) x (b) y", "(a)") for n in range(1, 5)]
        csv.writer(file).writerows([("Index", "Question", "Options", "Correct Answer"), *rows])
    for number in range(1, 5):
        pixels = np.full((8, 8, 3), 10 * number, np.uint8)
        Image.fromarray(pixels).save(folder / f"mmvp/MMVP Images/{number}.jpg")


def test_kept_answers_are_scored_beside_each_other_and_the_paper(tmp_path, capsys, monkeypatch):
    write(tmp_path / "a", mmvp=[1, 1, 1, 0], gqa=[1] * 6 + [0] * 4)
    write(tmp_path / "b", mmvp=[1, 1, 1, 1], gqa=[1] * 9 + [0])
    asked = Answer("0", "Q", "july", {"truths": None, "question_id": 5})
    write_answers(tmp_path / "b/docvqa_test.jsonl", [asked])
    benchmark(tmp_path / "data")
    flags = ["--output", tmp_path / "out", "--benchmarks", tmp_path / "data"]
    models = [f"A={tmp_path / 'a'}", f"B={tmp_path / 'b'}"]
    assert score_vqa.main([*map(str, [*models, *flags, "--beside", "siglip2"])]) == 0
    out = capsys.readouterr().out
    assert "is not there: no sheet of gqa" in out
    lines = {line[:6].strip(): line for line in out.splitlines()}
    assert lines["MMVP"].split()[1::3][:2] == ["50.00", "100.00"]
    assert "44.00" in lines["MMVP"] and "49.33" in lines["MMVP"]  # SigLIP2 in Table 14
    assert lines["GQA"].split()[1] == "60.00" and "+30.00" in lines["GQA"]
    assert "A: GQA has answers to 10 of 12,578, MMVP has answers to 4 of 300 questions." in out
    found = json.loads((tmp_path / "out/scores.json").read_text())
    assert found["models"]["B"]["questions"] == {"gqa": 10, "mmvp": 4}
    assert found["differences"]["B - A"]["mmvp"]["value"] == 50
    handed = json.loads((tmp_path / "out/B_docvqa.json").read_text())
    assert handed == [{"questionId": 5, "answer": "july"}]
    made = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"radar.png", "bars.png", "A_mmvp.png"} <= made
    monkeypatch.setattr(score_vqa, "_write", lambda *unused: None)  # it was drawn
    (tmp_path / "data/mmvp/MMVP Images/2.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match="question 1: its image cannot be decoded"):
        score_vqa.main([models[0], *map(str, flags)])
    lines = (tmp_path / "a/mmvp.jsonl").read_text().replace('"key": "', '"key": "other ')
    (tmp_path / "a/mmvp.jsonl").write_text(lines)
    assert score_vqa.main([models[0], *map(str, flags)]) == 0
    assert "has none of these questions: no sheet of mmvp" in capsys.readouterr().out


def test_what_cannot_be_scored_is_said_in_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    write(tmp_path / "a", gqa=[1, 0])
    for flags, message in (
        ([f"A={tmp_path / 'empty'}"], "has no answers"),
        (["A"], "write NAME=ANSWERS"),
        ([f"A/B={tmp_path / 'a'}"], "a name without /"),
        ([f"A={tmp_path / 'a'}", "--output", str(tmp_path / "a/gqa.jsonl")], "no folder can be"),
        ([f"A={tmp_path / 'a'}", f"A={tmp_path / 'a'}"], "the same name"),
        ([f"A={tmp_path / 'a'}", "--beside", "GPT"], "no such encoder in the paper"),
        ([f"A={tmp_path / 'a'}", "--benchmarks", "x"], "give --output DIR too"),
    ):
        with pytest.raises(UserError, match=message):
            score_vqa.main(flags)
