"""A model is asked: answers are kept, go on after a kill, and are the same on eight devices."""

import dataclasses
import io
import json

import jax
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from ml_collections import ConfigDict
from PIL import Image

from tests.methods.small_vqa import fresh, make, tokenizer_folder
from webssl_jax.config import ConfigError, UserError
from webssl_jax.data import annotations, records
from webssl_jax.evaluators import suite
from webssl_jax.evaluators.vqa import ask, evaluation
from webssl_jax.evaluators.vqa.task import Question, read_answers
from webssl_jax.model import Model, Origin
from webssl_jax.sharding import mesh as meshes
from webssl_jax.sharding import rules
from webssl_jax.weights.networks import Networks

NEW = 3


def picture(seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (24, 40, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    method = make(tokenizer_folder(tmp_path_factory.mktemp("words")))
    params = fresh(method)
    # large enough that answers differ from image to image
    params["language"] = jax.tree.map(lambda x: x * 4, params["language"])
    params["connector"] = jax.tree.map(lambda x: x * 10, params["connector"])
    return Model(Networks.of(method), params, Origin("small"))


QUESTIONS = [
    Question(f"q{i}", "What is it?" + "?" * (i % 3), picture(i // 2) if i < 5 else None, {}, NEW)
    for i in range(7)
]


@pytest.fixture(scope="module")
def answers(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("answers") / "a.jsonl"
    return ask.ask(model, QUESTIONS, path, batch=4), path


def test_a_run_that_was_killed_asks_only_the_rest(model, answers, tmp_path, monkeypatch):
    found, whole = answers
    path = tmp_path / "a.jsonl"
    data = whole.read_bytes()
    path.write_bytes(b"".join(data.splitlines(True)[:5])[:-5])  # in the fifth line
    asked = []
    once = ask.Answerer._answer
    monkeypatch.setattr(
        ask.Answerer,
        "_answer",
        lambda self, part, images: asked.extend(q.key for q in part) or once(self, part, images),
    )
    assert ask.ask(model, QUESTIONS, path, batch=4) == found
    # shorter prompts went first
    assert asked == ["q4", "q2", "q5"] and path.read_bytes() == data
    assert ask.ask(model, QUESTIONS[1:], path, batch=4) == found[1:]  # of fewer questions too
    other = dataclasses.replace(QUESTIONS[1], text="Who?")
    with pytest.raises(UserError, match="its answer q1 is to another question"):
        ask.ask(model, [other], path, batch=4)


def test_eight_devices_and_other_batches_give_the_same_answers(model, answers, tmp_path):
    found, path = answers
    assert [answer.key for answer in found] == [question.key for question in QUESTIONS]
    lines = map(json.loads, path.open())
    assert {x["key"]: x["answer"] for x in lines} == {a.key: a.answer for a in found}
    assert len({answer.answer for answer in found}) > 2
    mesh = meshes.create(ConfigDict({"replica": 2, "fsdp": 4, "tensor": 1}), jax.devices()[:8])
    params = jax.device_put(model.params, rules.shardings(model.params, mesh))
    cut = Model(model.networks, params, model.origin)
    assert ask.ask(cut, QUESTIONS, tmp_path / "a.jsonl", batch=8) == found


def test_an_answer_ends_at_its_own_limit_whatever_is_asked_beside_it(model):
    asked = [dataclasses.replace(QUESTIONS[0], max_new_tokens=n) for n in (1, NEW)]
    ((part, (short, long)),) = ask.Answerer(model, 4)(asked, [QUESTIONS[0].image] * 2)
    assert part == asked and len(short) < len(long) and long.startswith(short)


def test_blind_and_shuffled_models_see_no_image_and_anothers(model, monkeypatch, tmp_path):
    monkeypatch.setattr(
        ask.Answerer,
        "_answer",
        lambda self, part, images: (
            seen.update(zip((q.key for q in part), images)) or [""] * len(part)
        ),
    )
    seen = {}
    ask.ask(model, QUESTIONS, tmp_path / "b.jsonl", 4, ask.BLIND)
    assert seen == dict.fromkeys((q.key for q in QUESTIONS), None)
    seen.clear()
    monkeypatch.setattr(ask, "CHUNK", 4)  # q4 is in one without another image
    ask.ask(model, QUESTIONS, tmp_path / "s.jsonl", 4, ask.SHUFFLED)
    own = {question.key: question.image for question in QUESTIONS}
    assert seen["q5"] is seen["q6"] is None
    assert all(seen[f"q{i}"] not in (None, own[f"q{i}"]) for i in range(5))
    assert set(seen.values()) <= set(own.values())


def test_a_row_has_the_model_beside_the_blind_one_item_by_item(model, tmp_path, monkeypatch):
    folder = tmp_path / "records"
    folder.mkdir()
    writer = ArrayRecordWriter(str(folder / "a.arrayrecord"), records.WRITER_OPTIONS)
    asked = [("what colour?", ["Red"]), ("is it red?", ["yes"])]
    for i in range(3):
        found = [{"question": q, "answers": a} for q, a in asked]
        notes = {"questions": annotations.encode_json(found)}
        record = records.Record(picture(i), (), "same", 40, 24, "s", annotations=notes)
        writer.write(records.encode(record))
    writer.close()
    says = {
        "what colour?": iter(["red.", "blue", "red"]),
        "is it red?": iter([" Yes", "yes", "no"]),
    }
    monkeypatch.setattr(
        ask.Answerer,
        "_answer",
        lambda self, part, images: [
            next(says[q.text]) if image else "Red" for q, image in zip(part, images)
        ],
    )
    row = {"kind": "vqa", "task": "shards", "data": f"{folder}/*", "baselines": True}
    monkeypatch.setattr(ask, "exchanged", lambda chunk, before: [None] * len(chunk))
    one = suite.Suite({"own": row}, tmp_path / "eval" / ".cache").run(model, tmp_path / "eval")
    outcome = one["own"]
    assert outcome.metrics["accuracy"] == pytest.approx(100 * 4 / 6)
    assert outcome.metrics["accuracy/open"] == pytest.approx(100 * 2 / 3)
    assert outcome.baselines["blind"].metrics["accuracy"] == pytest.approx(50)
    assert list(outcome.items["accuracy"]) == [100, 100, 0, 100, 100, 0]
    kept = list((tmp_path / "eval" / "answers").rglob("*.jsonl"))
    assert [len(read_answers(path)) for path in kept] == [6, 6, 6]  # although keys were the same


def test_the_first_questions_are_whole_pairs_and_have_the_error_of_their_items(tmp_path):
    """MME's headline is a sum over categories: the spread of all its items together is not its."""
    rows = [{"image": None, "question": "?", "answer": "Yes", "category": "OCR"}] * 6
    table = pyarrow.Table.from_pylist(
        rows,
        pyarrow.schema(
            [("image", pyarrow.struct([("bytes", pyarrow.binary())]))]
            + [(x, pyarrow.string()) for x in ("question", "answer", "category")]
        ),
    )
    (tmp_path / "data").mkdir()
    pyarrow.parquet.write_table(table[:0], tmp_path / "data" / "test-0.parquet")
    with pytest.raises(UserError, match="has no question of mme; download it again"):
        evaluation.VQA(evaluation.VQAOptions("mme", str(tmp_path)))
    pyarrow.parquet.write_table(table, tmp_path / "data" / "test-0.parquet")
    row = evaluation.VQA(evaluation.VQAOptions("mme", str(tmp_path), max_questions=3))
    asked = list(row._questions())
    assert [question.key for question in asked] == ["0", "1", "2", "3"]
    for question in asked[2:]:
        question.extra["category"] = "count"
    answers = [
        question.answered(word) for question, word in zip(asked, ("yes", "no", "yes", "yes"))
    ]
    outcome = row._outcome(answers)
    assert "answers to 4 of 2,374 questions" in outcome.meaning
    assert outcome.metrics["total"] == 50 + 200 and outcome.se("total") == 0  # of one item each


def test_a_benchmark_of_rotations_is_asked_whole_or_refused(tmp_path, monkeypatch):
    rotation = Question("0", "?", None, {"rotation_of": "a"})
    monkeypatch.setattr(evaluation, "read_questions", lambda task, folder: iter([rotation]))
    evaluation.VQA(evaluation.VQAOptions("mmbench", str(tmp_path)))
    with pytest.raises(UserError, match="rotations, which lie apart; ask all"):
        evaluation.VQA(evaluation.VQAOptions("mmbench", str(tmp_path), max_questions=5))


def test_a_model_that_does_not_speak_and_a_benchmark_that_is_not_there_are_refused(model):
    with pytest.raises(ConfigError, match="no such benchmark; did you mean 'mme'"):
        suite.check({"x": {"kind": "vqa", "task": "mmee", "data": "d"}})
    with pytest.raises(ConfigError, match="has no language model; leave this row"):
        row = {"x": {"kind": "vqa", "task": "shards", "data": "d"}}
        suite.check_needs(row, Networks(model.encoder), "it")
