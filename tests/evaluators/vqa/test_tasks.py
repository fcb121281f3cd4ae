"""The rules of the 16 benchmarks on nasty answers, as Cambrian's own scripts judged them."""

import csv
import io
import json
import pathlib
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from webssl_jax.errors import UserError
from webssl_jax.evaluators.vqa import tasks
from webssl_jax.evaluators.vqa.rows import read_questions
from webssl_jax.evaluators.vqa.submissions import Submits
from webssl_jax.evaluators.vqa.task import Answer, Items, Question, read_answers, write_answers
from webssl_jax.evaluators.vqa.tasks.docvqa import DocVQA
from webssl_jax.evaluators.vqa.tasks.mmbench import MMBench
from webssl_jax.evaluators.vqa.tasks.mme import MME
from webssl_jax.evaluators.vqa.tasks.ocrbench import OCRBench

GOLDEN = json.loads(
    (pathlib.Path(__file__).parents[1] / "golden/l_vqa_scores.json").read_text("utf-8")
)
NAMES = {
    **{"ade": "cv_bench_2d", "coco": "cv_bench_2d", "omni": "cv_bench_3d"},
    "mmbench_en": "mmbench",
}


def answer(place, row):
    """A row of the golden file as we keep answers."""
    truth = row.get("gt_answer", row.get("answers"))
    extra = {"truths" if isinstance(truth, list) else "truth": truth, "pair": place // 2}
    extra["options"] = row.get("options", row.get("text_options"))
    extra |= {"option": row.get("text_answer"), "rotation_of": row.get("source_id")}
    extra |= {key: row[key] for key in ("category", "type", "source") if key in row}
    return Answer(str(place), "?", row.get("answer", row.get("prediction")), extra)


def golden(name):
    return [answer(place, row) for place, row in enumerate(GOLDEN["benchmarks"][name]["rows"])]


@pytest.mark.parametrize("name", [n for n, b in GOLDEN["benchmarks"].items() if "cambrian" in b])
def test_each_answer_is_judged_as_the_original_does(name):
    answers, expected = golden(name), GOLDEN["benchmarks"][name]["cambrian"]
    if name == "mathvista":  # a type that its data do not have; the original cuts there
        answers, expected = answers[:-1], expected[:-1]
    score = tasks.task(NAMES.get(name, name)).score(answers)
    assert list(score.verdicts.values()) == pytest.approx(expected, abs=1e-6)
    assert score.metrics[score.headline] == pytest.approx(100 * sum(expected) / len(expected))


def test_mme_adds_the_share_of_whole_pairs_to_the_share_of_right_answers():
    whole, answers = GOLDEN["benchmarks"]["mme"]["whole"], golden("mme")
    score = MME("perception").score(answers)
    assert score.metrics[score.headline] == pytest.approx(whole["Perception"])
    assert score.metrics["total"] == pytest.approx(whole["total_score"])
    assert score.metrics["accuracy"] == pytest.approx(whole["accuracy"])
    for kind in ("existence", "count"):
        assert score.metrics[f"score/{kind}"] == pytest.approx(whole[kind]["score"])
    mixed = [
        Answer(str(n), "?", "yes", {"truth": "Yes", "category": c, "pair": n // 2})
        for n, c in enumerate(["OCR", "OCR", "code_reasoning", "code_reasoning"])
    ]
    headlines = {reading: MME(reading).score(mixed) for reading in ("total", "perception")}
    assert {name: score.items.headline() for name, score in headlines.items()} == {
        "total": 400,
        "perception": 200,
    }


def test_mmvp_counts_pairs_and_mmbench_whole_rotations():
    score = tasks.task("mmvp").score(golden("mmvp"))
    assert score.metrics["pair_accuracy"] == GOLDEN["benchmarks"]["mmvp"]["whole"]["accuracy"]
    whole = GOLDEN["benchmarks"]["mmbench_en"]["whole"]
    score = tasks.task("mmbench").score(golden("mmbench_en"))
    assert score.headline == "circular_accuracy"
    assert score.metrics["circular_accuracy"] == pytest.approx(100 * whole["circular_accuracy"])
    assert score.metrics["accuracy"] == pytest.approx(100 * whole["accuracy"])
    assert len(score.items.values) == whole["circular_count"]


@pytest.mark.parametrize("name", [*GOLDEN["benchmarks"]])
def test_the_items_of_a_score_make_its_headline(name):
    score = tasks.task(NAMES.get(name, name)).score(golden(name))
    assert score.items.headline() == pytest.approx(score.metrics[score.headline], rel=1e-6)


def test_2d_is_the_mean_of_two_accuracies():
    def said(place, word, source):
        extra = {"truth": "(A)", "options": [], "category": "Count", "source": source}
        return Answer(str(place), "?", word, extra)

    answers = [said(0, "A", "ADE20K"), said(1, "A", "COCO"), said(2, "B", "COCO")]
    assert tasks.task("cv_bench_2d").score(answers).metrics["accuracy"] == 75


def test_ocrbench_may_ask_for_the_whole_answer():
    extra = {"truths": ["45"], "category": "Doc-oriented VQA"}
    loose, exact = (
        OCRBench(whole).score([Answer("0", "?", "it is 45", extra)]) for whole in (False, True)
    )
    assert (loose.metrics["accuracy"], exact.metrics["accuracy"]) == (100, 0)


@pytest.mark.parametrize("name", [*GOLDEN["prompts"]])
def test_a_question_is_put_in_the_words_of_the_original(name):
    golden = GOLDEN["prompts"][name]
    row = {"image": None, "answer": "A", "types": {"structural": "query"}, "type": "human"}
    row |= {"grade": "grade1", "answers": ["x"], "image_1": {"bytes": b"1"}, "id": "dev_Art_1"}
    row |= {"question_type_id": 1} | golden["row"]
    if name == "scienceqa":
        row |= {"answer": 1, "image": {"bytes": b"1"}}
    if name == "seed":
        row["image"] = [{"bytes": b"1"}]
    if name == "mmvp":
        row |= {"Question": row["question"], "Options": row["options"], "Correct Answer": "(a)"}
    (question,) = tasks.task(name).questions(0, row)
    assert question.text == golden["text"]
    assert question.max_new_tokens == golden["max_new_tokens"]


def png(colour):
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(stream, "PNG")
    return {"bytes": stream.getvalue(), "path": None}


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


RED, BLUE = png("red"), png("blue")
# A row of each data set with the columns it was published with, and the truth that is kept.
ROWS = {
    "mme": (dict(image=RED, question="Is it? Yes or no.", answer="Yes", category="OCR"), "Yes"),
    "scienceqa": (
        dict(image=RED, question="Q", choices=["x", "y"], answer=1, hint="", grade="grade2"),
        "B",
    ),
    "mathvista": (
        dict(
            decoded_image=RED,
            query="Q",
            question_type="multi_choice",
            choices=["x", "y", "y"],
            answer="y",
            metadata={"category": "vqa"},
        ),
        "C",
    ),
    "ai2d": (dict(image=RED, question="Q", options=["x", "y"], answer="1"), "1"),
    "chartqa": (dict(image=RED, question="Q", answer="3", type="human"), "3"),
    "ocrbench": (
        dict(image=RED, question="Q", answer=["x"], question_type="Regular Text Recognition"),
        ["x"],
    ),
    "textvqa": (dict(image=RED, question="Q", answers=["x"] * 10, ocr_tokens=[]), ["x"] * 10),
    "docvqa": (dict(image=RED, question="Q", answers=["x"], questionId="7"), ["x"]),
    "realworldqa": (dict(image=RED, question="Q", answer="A"), "A"),
    "cv_bench_3d": (
        dict(image=RED, prompt="Q", choices=["x"], answer="(A)", task="Depth", source="Omni3D"),
        "(A)",
    ),
}


@pytest.mark.parametrize("name", [*ROWS])
def test_published_rows_become_questions(name, tmp_path):
    row, truth = ROWS[name]
    task = tasks.task(name)
    write(tmp_path / task.source.files.replace("*", "0"), [row | {"of_no_use": 1}])
    (question,) = read_questions(task, tmp_path)
    assert question.image == RED["bytes"]
    assert question.extra.get("truth", question.extra.get("truths")) == truth
    json.dumps(question.extra)
    right = truth[0] if isinstance(truth, list) else truth.strip("()")
    assert task.judge(question.answered(right)) == 1


def test_gqa_finds_its_images_in_another_table(tmp_path):
    task = tasks.task("gqa")
    row = {"question": "Q", "answer": "left", "types": {"structural": "query"}}
    rows = [row | {"imageId": "n2"}, row | {"imageId": "n1"}]
    write(tmp_path / task.source.files.replace("*", "0"), rows)
    images = [{"id": "n1", "image": RED}, {"id": "n2", "image": BLUE}]
    write(tmp_path / task.source.tables.replace("*", "0"), images)
    assert [q.image for q in read_questions(task, tmp_path)] == [BLUE["bytes"], RED["bytes"]]
    write(tmp_path / task.source.tables.replace("*", "0"), images[:1])
    with pytest.raises(UserError, match="image n2 is in none of the image files"):
        list(read_questions(task, tmp_path))


def test_mmvp_reads_its_csv_and_numbered_images(tmp_path):
    (tmp_path / "MMVP Images").mkdir()
    for number, image in ((1, RED), (2, BLUE)):
        (tmp_path / f"MMVP Images/{number}.jpg").write_bytes(image["bytes"])
    path = tmp_path / "Questions.csv"
    path.write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match="Questions.csv: cannot be read .* download it again"):
        list(read_questions(tasks.task("mmvp"), tmp_path))
    with open(path, "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["lndex", "Question", "Options", "Correct Answer"])  # as it is published
        rows.writerow([1, "Is it, or not?", "(a) Open (b) Closed", "(a)"])
        rows.writerow([2, "Is it, or not?", "(a) Open (b) Closed", "(b)"])
    questions = list(read_questions(tasks.task("mmvp"), tmp_path))
    assert [q.image for q in questions] == [RED["bytes"], BLUE["bytes"]]
    assert questions[0].extra == {"truth": "(a)", "options": ["Open", "Closed"], "pair": 0}


MMBENCH = {
    **{"index": 3, "question": "Q", "hint": "nan", "A": "x", "B": "=1+1", "C": "nan", "D": "nan"},
    **{"category": "c", "l2-category": "l", "source": "s", "answer": "B", "image": RED},
}


def test_rotations_of_mmbench_are_told_by_pixels_not_by_files(tmp_path):
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(stream, "BMP")
    rows = [MMBENCH, MMBENCH | {"index": 1000003, "image": {"bytes": stream.getvalue()}}]
    rows.append(MMBENCH | {"index": 2000003, "image": BLUE})
    write(tmp_path / "data/dev-0.parquet", rows)
    same, turned, other = read_questions(MMBench(), tmp_path)
    assert same.text == "Q Options:\nA. x\nB. =1+1\n" + same.text.splitlines()[-1]
    with pytest.raises(UserError, match="mmbench, row 7: no image can be read"):
        MMBench().questions(7, MMBENCH | {"image": {"bytes": b"GIF89a"}})
    assert same.extra["rotation_of"] == turned.extra["rotation_of"] != other.extra["rotation_of"]


def test_a_seed_row_of_several_images_is_skipped():
    row = {"image": [RED, RED], "question": "Q", "answer": "A", "question_type_id": 10}
    assert tasks.task("seed").questions(0, row) == []


def test_test_answers_are_handed_in_as_the_servers_take_them():
    (asked,) = MMBench("test").questions(0, MMBENCH | {"answer": "nan"})
    file = MMBench("test").submission([asked.answered("B")])
    with zipfile.ZipFile(io.BytesIO(file.content)) as book:
        strings = book.read("xl/sharedStrings.xml").decode()
        sheet = book.read("xl/worksheets/sheet1.xml").decode()
    for word in ("index", "question", "A", "B", "C", "D", "prediction", "=1+1"):
        assert f">{word}</t>" in strings
    assert "nan" not in strings and "<f>" not in sheet and "<v>3</v>" in sheet

    row = {"image": None, "question": "Q", "questionId": "17", "answers": None}
    (asked,) = DocVQA("test").questions(0, row)
    file = DocVQA("test").submission([asked.answered("july 4")])
    assert json.loads(file.content) == [{"questionId": 17, "answer": "july 4"}]
    with pytest.raises(UserError, match="only the server has the truth"):
        DocVQA("test").score([asked.answered("july 4")])
    assert isinstance(tasks.task("docvqa_test"), Submits)
    assert not isinstance(tasks.task("gqa"), Submits)


def test_half_a_pair_is_not_judged():
    with pytest.raises(UserError, match="pair 3 has 1 answers and needs two"):
        MME().score(golden("mme")[:-1])


@pytest.mark.parametrize("lost", ["truth", "pair", "category"])
def test_an_answer_kept_without_what_its_rule_needs_is_said(lost):
    answers = golden("mme")
    del answers[2].extra[lost]
    with pytest.raises(UserError, match=f"mme: an answer has no '{lost}' beside it"):
        MME().score(answers)


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("gqa", {"truth": None}),
        ("textvqa", {"truths": []}),
        ("cv_bench_3d", {"truth": "A", "options": []}),
    ],
)
def test_an_answer_beside_which_no_truth_can_be_read_is_named(name, extra):
    with pytest.raises(UserError, match=f"{name}: question 7 cannot be judged.*ask the model"):
        tasks.task(name).score([Answer("7", "Q", "left", extra)])


def test_a_reading_of_mme_without_a_question_has_no_score():
    extra = {"truth": "Yes", "category": "code_reasoning", "pair": 0}
    with pytest.raises(UserError, match="mme: no answer is to a question of perception"):
        MME("perception").score([Answer(str(n), "?", "yes", extra) for n in range(2)])


def test_answers_come_back_from_their_file_in_the_order_of_questions(tmp_path):
    odd = Answer("1", "a\u2028b", "line\nbreak \x85 \u00e9", {"truths": ["x"], "pair": 0})
    path = tmp_path / "answers.jsonl"
    write_answers(path, [Question("12", "Q", b"1", {}).answered(""), Answer("2", "", "", {}), odd])
    assert read_answers(path) == [odd, Answer("2", "", "", {}), Answer("12", "Q", "", {})]
    path.write_text(odd.line() * 2, "utf-8")
    with pytest.raises(UserError, match="line 2: question 1 was answered before"):
        read_answers(path)
    line = odd.line()
    numbered = json.dumps({"key": 1, "text": "", "answer": "", "extra": {}})
    bare = json.dumps({"key": "1", "text": "", "answer": "", "extra": None})
    for damaged in (line[:-20], line.replace('"line', '5,"line'), numbered, bare, "[" * 99999):
        path.write_text(damaged, "utf-8")
        with pytest.raises(UserError, match="line 1: not an answer"):
            read_answers(path)


# What stands in a table in place of what was published.
OTHERS = {"no picture": {"image": RED | {"bytes": None}}, "text for a list": {"options": "xy"}}


@pytest.mark.parametrize("trouble", ["no file", "a part", "no column", "damaged", *OTHERS])
def test_files_that_are_not_the_published_ones_are_named(trouble, tmp_path):
    path = tmp_path / "data/test-0.parquet"
    if trouble == "a part":  # of a download that was stopped
        write(tmp_path / "data/test-00001-of-00003-ab.parquet", [ROWS["ai2d"][0]])
    elif trouble in OTHERS:
        write(path, [ROWS["ai2d"][0] | OTHERS[trouble]])
    elif trouble == "no column":
        write(path, [{"image": RED, "question": "Q"}])
    elif trouble == "damaged":
        path.parent.mkdir()
        path.write_bytes(b"PAR1")
    expected = {
        "no file": "hf download lmms-lab/ai2d",
        "a part": "has 1 files data/test-.*, of which 3 belong together; download it",
        "no picture": "row 0 in .* not as it was published .its image is not in the file",
        "text for a list": "row 0 in .* not as it was published .a list of texts is wanted",
        "no column": "has no column answer, options",
        "damaged": "cannot be read",
    }[trouble]
    with pytest.raises(UserError, match=expected):
        list(read_questions(tasks.task("ai2d"), tmp_path))


def test_items_weigh_groups_not_questions():
    items = Items(np.array([1, 0, 0, 1.0]), np.array([0, 1, 1, 1]), np.array([50, 50.0]))
    assert items.headline() == pytest.approx(50 + 50 / 3)
