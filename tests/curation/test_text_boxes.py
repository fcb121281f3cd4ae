"""The text detector: its figures on known maps, and the real one on rendered words."""

import io

import numpy as np
import pytest
from PIL import Image, ImageDraw

from tests.data.image_shards import make_record, smooth_image
from webssl_jax.config import UserError
from webssl_jax.curation.scorers import make
from webssl_jax.curation.scorers.text_boxes import TextBoxes, measure
from webssl_jax.visuals import drawing


def record(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return make_record(file.getvalue(), 0)


def test_boxes_and_lines_are_counted_as_they_lie():
    map_ = np.zeros((100, 200), np.float32)
    for top, left in ((10, 10), (12, 60), (40, 10), (80, 100)):  # two side by side
        map_[top : top + 8, left : left + 30] = 0.9
    map_[60:62, 150:190] = 0.9  # too flat for a letter
    map_[20:30, 150:180] = 0.4  # text by its pixels, none by its mean
    found = measure(map_)
    assert (found["boxes"], found["lines"]) == (4, 3)
    assert found["text_area"] == pytest.approx((4 * 240 + 80 + 300) / 20_000)
    assert found["text_height"] == pytest.approx(0.08)
    assert measure(np.zeros((32, 32), np.float32)) == {
        "text_area": 0.0,
        "boxes": 0,
        "lines": 0,
        "text_height": 0.0,
    }


def test_the_real_detector_finds_rendered_words_and_none_in_a_blur():
    page = Image.new("RGB", (400, 300), "white")
    font = drawing.font(21)
    for i, words in enumerate(("the quick brown fox", "jumps over", "a lazy dog")):
        ImageDraw.Draw(page).text((20, 30 + 80 * i), words, fill="black", font=font)
    blur = Image.fromarray(smooth_image(np.random.default_rng(0), 400, 300))
    text, none = TextBoxes()([record(page), record(blur)])
    assert text["lines"] == 3 and 3 <= text["boxes"] <= 9 and 0.02 < text["text_area"] < 0.2
    assert none["boxes"] == 0 and none["text_area"] < 0.005


def test_a_graph_that_is_none_is_named(tmp_path):
    (tmp_path / "x.onnx").write_bytes(b"no graph")
    scorer = make(f"text_boxes:model={tmp_path}/x.onnx")
    with pytest.raises(UserError, match=r"text_boxes:model=.*x\.onnx: cannot be read"):
        scorer([record(Image.new("RGB", (64, 64)))])
