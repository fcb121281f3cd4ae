"""What the network is fed at step 0 is told from what its batch holds."""

import numpy as np
import pytest
from ml_collections import ConfigDict

from tests.data.image_shards import ListSource
from tests.evaluators.small_models import coloured, items_of
from tests.weights import samples
from webssl_jax import methods
from webssl_jax.data.captioned import CaptionedView
from webssl_jax.data.pipeline import TrainLoader
from webssl_jax.data.records import Record
from webssl_jax.data.tokens import Tokenizer
from webssl_jax.data.views import RandomResizedCropView
from webssl_jax.evaluators import fed

VIEW = CaptionedView(RandomResizedCropView(16), context=6)


def test_the_caption_is_the_one_that_was_drawn_and_what_is_cut_off_is_counted():
    record = Record(b"", ("a dog", "one two three four five six"), "k", 1, 1, "s")
    for text, pieces, cut in (
        ("a dog", ("a", "dog"), 0),
        ("one two three four five six", ("one", "two", "three", "four"), 2),
    ):
        ids = Tokenizer(6)([text])[0]
        assert fed._text(record, ids, VIEW) == (text, pieces, cut)
    bare = Record(b"", (), "k", 1, 1, "s")
    assert fed._text(bare, Tokenizer(6)([""])[0], VIEW) == ("", (), 0)
    assert fed._text(record, np.zeros(6, np.int32) + 5, VIEW).caption == ""


@pytest.mark.parametrize("name", ["clip", "mae"])
def test_pairs_are_shown_with_their_captions_and_images_alone_without(name, monkeypatch):
    method = samples.make_method()
    if name == "clip":
        words = {"name": "clip", "text": {"depth": 1}, "view": {"image_size": 16}}
        method = methods.create(ConfigDict({"model": {"size": "micro"}, "method": words}))
    texts = [f"the {i}th" for i in range(6)]
    source = ListSource(tuple(items_of(coloured(6)[0], captions=texts)))
    sheets = []
    for sheet in ("fed_sheet", "crop_sheet"):
        draw = getattr(fed, sheet)

        def noted(*given, sheet=sheet, draw=draw):
            sheets.append((sheet, *given))
            return draw(*given)

        monkeypatch.setattr(fed, sheet, noted)
    with TrainLoader(source, method.train_view(), global_batch=4, seed=0, threads=1) as loader:
        batch = loader.batch_at(0)
        picture = fed.picture(source, batch, method)
    assert picture.dtype == np.uint8 and picture.shape[2] == 3
    ((sheet, _, crops, *rest),) = sheets
    if name == "mae":
        assert sheet == "crop_sheet" and crops.keys() == {"crop"}
    else:
        assert sheet == "fed_sheet" and (crops == batch["image"]).all()
        assert [text.caption for text in rest[0]] == [texts[i] for i in batch["record"]]
