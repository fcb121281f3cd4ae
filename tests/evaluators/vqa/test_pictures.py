"""What pictures of answers show: frames by verdict, questions picked by chance, every model."""

import io

import numpy as np
import pytest
from PIL import Image

from webssl_jax.evaluators.vqa import pictures
from webssl_jax.evaluators.vqa.averages import published
from webssl_jax.evaluators.vqa.task import Question
from webssl_jax.evaluators.vqa.tasks import task
from webssl_jax.visuals import answers, benchmarks
from webssl_jax.visuals.axes import COLOURS


def count(picture, colour):
    return int((picture == np.array(colour)).all(axis=-1).sum())


def test_a_frame_has_the_colour_of_the_verdict():
    image = np.zeros((32, 48, 3), np.uint8)
    for verdict, colour in ((1, answers.RIGHT), (0, answers.WRONG), (0.6, answers.PARTLY)):
        picture = answers.sheet([answers.Shown(image, "Q", "", "yes", verdict)], "Sheet")
        frames = {x: count(picture, x) for x in (answers.RIGHT, answers.WRONG, answers.PARTLY)}
        assert max(frames, key=frames.get) == colour and frames[colour] > 1500
    with pytest.raises(ValueError, match="no question to draw"):
        answers.sheet([], "Sheet")


def test_a_sheet_shows_questions_that_chance_picked_with_their_truths():
    stream = io.BytesIO()
    Image.new("RGB", (40, 30), (1, 2, 250)).save(stream, "PNG")
    questions = [
        Question(str(n), "What?\nSay it.", stream.getvalue(), {"truth": "left"}) for n in range(9)
    ]
    said = [question.answered("left" if int(question.key) % 2 else "up") for question in questions]
    score = task("gqa").score(said)
    keys = pictures.picked([question.key for question in questions], 4)
    assert keys == sorted(keys) and len(set(keys)) == 4
    chosen = [question for question in questions if question.key in keys]
    picture = pictures.answer_sheet(task("gqa"), chosen, said, score)
    right = sum(int(key) % 2 for key in keys)
    assert count(picture, (1, 2, 250)) == 4 * 160 * 120  # four images, enlarged by a whole factor
    assert (count(picture, answers.RIGHT) > 1500 * right) == bool(right)


def test_a_radar_and_bars_have_each_models_colour():
    rows = {row.model: row.scores for row in published() if row.model.startswith("SigLIP")}
    picture = pictures.radar(rows)
    drawn = [tuple(bytes.fromhex(COLOURS[place][1:])) for place in range(3)]
    assert [count(picture, colour) > 500 for colour in drawn] == [True, True, False]
    found = {"one": {"general": (50.0, 49.0, 51.0)}, "two": {}}
    picture = benchmarks.bars(found, {"general": "General", "average": "Mean"}, "Bars")
    assert [count(picture, colour) > 500 for colour in drawn] == [True, False, False]
