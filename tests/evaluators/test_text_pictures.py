"""Pictures of images and texts: what each finds, what is marked, and what is passed over."""

import jax
import numpy as np
import pytest

from tests.data.image_shards import ListSource, encode_image
from tests.evaluators.small_models import small_clip, small_mae
from webssl_jax.config import UserError
from webssl_jax.data import records
from webssl_jax.data.views import Preprocess
from webssl_jax.evaluators import text_pictures
from webssl_jax.evaluators.pictures import Images, ModelPictures, available, choose
from webssl_jax.evaluators.text_pictures import Pairs, TextPictures
from webssl_jax.model import Model
from webssl_jax.visuals import pairs

# Image i has texts 2 i and 2 i + 1; text 0 belongs to image 5 too.
LINKS = np.array([[i, 2 * i + j] for i in range(6) for j in (0, 1)] + [[5, 0]], np.int32)
PAIRS = Pairs(
    np.arange(6, dtype=np.uint8)[:, None, None, None] * np.ones((16, 16, 3), np.uint8),
    tuple(f"text {i}" for i in range(12)),
    LINKS,
)


def unit(degrees):
    angle = np.radians(np.asarray(degrees, float))
    return np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)


class Towers:
    """A model, and its text tower: the images lie 10 degrees apart; a text lies 1 beside its image,
    and text 11 far away. ``looked``: calls of the image tower."""

    mesh, rounded_batch = None, Model.rounded_batch

    def __init__(self, angles=None, times=1.0):
        self.text, self.looked, self._times = self, [], times
        self._angles = angles or [*(10 * (i // 2) + 1 + i % 2 for i in range(11)), 180]

    def embed_images(self, images):
        self.looked.append(len(images))
        return unit(images[:, 0, 0, 0] * 10.0)

    def __call__(self, texts):
        assert tuple(texts) == PAIRS.texts
        return unit(self._angles) * self._times


@pytest.fixture
def drawn(monkeypatch):
    """What the sheets are asked to draw."""
    asked = {}
    for name in ("similarity_sheet", "texts_sheet", "images_sheet"):
        monkeypatch.setattr(pairs, name, lambda *args, name=name: asked.update({name: args}))
    made = TextPictures(PAIRS, text_pictures.NAMES, shown=3)
    assert list(made.draw(Towers(), "run, step 7")) == list(text_pictures.NAMES)
    return asked


def test_the_matrix_has_shown_images_with_their_first_texts(drawn):
    images, texts, cosines, own, title = drawn["similarity_sheet"]
    assert images[:, 0, 0, 0].tolist() == [0, 2, 4] and texts == ["text 0", "text 4", "text 8"]
    np.testing.assert_allclose(cosines[1], np.cos(np.radians([21, 1, 19])), atol=1e-6)
    assert own.tolist() == np.eye(3).tolist() and title.endswith("step 7")


def test_images_find_texts_and_a_missed_one_has_its_place(drawn):
    _, found, missed, *_ = drawn["texts_sheet"]
    assert [text for text, *_ in found[1]][:3] == ["text 4", "text 5", "text 3"]
    assert [own for *_, own in found[1]] == [True, True, False, False, False]
    assert missed == [None] * 3
    far = Towers([180, 170, *range(10)])
    own = Pairs(PAIRS.images[:1], PAIRS.texts, np.array([[0, 0], [0, 1]]))
    assert list(TextPictures(own, ("image_to_text",)).draw(far, "it")) == ["image_to_text"]
    ((text, cosine, place),) = drawn["texts_sheet"][2]
    assert (text, place) == ("text 1", 11) and cosine == pytest.approx(np.cos(np.radians(170)))


def test_texts_find_images(drawn):
    texts, found, _, words = drawn["images_sheet"]
    assert texts[0] == "text 0"
    assert [int(image[0, 0, 0]) for image, *_ in found[0]] == [0, 1, 2, 3, 4]
    assert [own for *_, own in found[0]] == [True, False, False, False, False]
    assert "6 images and 12 texts" in words and "3 of 3" in words


def test_only_the_first_process_draws_and_a_network_that_diverged_is_not_drawn(monkeypatch, caplog):
    made = TextPictures(PAIRS, text_pictures.NAMES)
    assert made.draw(Towers(times=np.nan), "it") == {} and "NaN or infinity" in caplog.text
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    model = Towers()
    assert made.draw(model, "it") == {} and model.looked == [16]  # but all must look


def test_a_model_with_texts_has_them_and_others_have_not():
    deaf = available(small_mae().networks)
    with pytest.raises(UserError, match="no picture 'similarity' of these weights"):
        choose("similarity", deaf, "config.pictures.kinds")
    images = Images(PAIRS.images, [None] * 6, [""] * 6)
    made = ModelPictures(images, ("similarity",), 4, pairs=PAIRS)
    assert list(made.draw(small_clip())) == ["similarity"]
    assert made.draw(small_mae()) == {}


def test_records_without_captions_leave_these_pictures_out_and_say_so(caplog):
    item = records.Record(encode_image(PAIRS.images[0]), (), "key", 16, 16, "")
    source, view = ListSource((records.encode(item),)), Preprocess(16, 16)
    with caplog.at_level("INFO"):
        assert text_pictures.read_pictured(source, view, ("pca", "similarity"), 8) is None
    assert "no captioned image in 1 records" in caplog.text
    caplog.clear()
    assert text_pictures.read_pictured(source, view, ("pca",), 8) is None and not caplog.text
