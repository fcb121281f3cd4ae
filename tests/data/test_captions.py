"""Image-text pairs: one caption a visit, drawn by the visit's generator; records without one."""

import collections
import dataclasses
import logging
import pickle

import numpy as np
import pytest

from tests.data.image_shards import ListSource, encode_image, make_record, smooth_image
from webssl_jax.data import records
from webssl_jax.data.captioned import CaptionedView
from webssl_jax.data.pipeline import TrainLoader
from webssl_jax.data.tokens import Tokenizer
from webssl_jax.data.views import RandomResizedCropView

CAPTIONS = ("a dog", "Ein Hund läuft", "犬 &amp; 猫")
CROP = RandomResizedCropView(16, scale=(0.9, 1.0), flip=0.0)


def record(captions=CAPTIONS, number=0):
    image = encode_image(smooth_image(np.random.default_rng(number), 40, 30))
    return dataclasses.replace(make_record(image, number), captions=captions)


def text_of(tokens):
    """Which caption these tokens are; -1: the empty text."""
    known = Tokenizer(context=len(tokens))([*CAPTIONS, ""])
    (index,) = np.flatnonzero((known == tokens).all(axis=1))
    return -1 if index == len(CAPTIONS) else int(index)


def test_a_visit_gives_an_image_and_the_tokens_of_one_caption():
    seen = CaptionedView(CROP, context=12)(record(), np.random.default_rng(0))
    assert seen["image"].shape == (16, 16, 3) and seen["image"].dtype == np.uint8
    assert seen["tokens"].shape == (12,) and seen["tokens"].dtype == np.int32
    assert text_of(seen["tokens"]) in range(3)


def test_every_caption_is_drawn_alike_and_by_the_generator_alone():
    view, one = CaptionedView(CROP, context=12), record()
    drawn = [text_of(view(one, np.random.default_rng(seed))["tokens"]) for seed in range(300)]
    counts = collections.Counter(drawn)
    assert set(counts) == {0, 1, 2} and min(counts.values()) > 70
    again = pickle.loads(pickle.dumps(view))
    assert drawn[:9] == [
        text_of(again(one, np.random.default_rng(seed))["tokens"]) for seed in range(9)
    ]


def test_a_record_without_a_caption_has_the_empty_text_or_counts_as_damaged():
    bare, rng = record(captions=()), np.random.default_rng(0)
    assert text_of(CaptionedView(CROP, context=12)(bare, rng)["tokens"]) == -1
    with pytest.raises(records.RecordError, match="no caption"):
        CaptionedView(CROP, uncaptioned="replace")(bare, rng)
    with pytest.raises(ValueError, match="uncaptioned = 'skip' is not one of empty, replace"):
        CaptionedView(CROP, uncaptioned="skip")


@pytest.mark.parametrize("uncaptioned", ("empty", "replace"))
def test_the_loader_resumes_with_the_same_captions_and_replaces_what_has_none(uncaptioned, caplog):
    items = [record(CAPTIONS if i % 4 else (), i) for i in range(16)]
    source = ListSource(tuple(map(records.encode, items)))
    view = CaptionedView(CROP, context=12, uncaptioned=uncaptioned)
    with caplog.at_level(logging.WARNING):
        with TrainLoader(source, view, global_batch=8, seed=1) as loader:
            whole = [next(loader) for _ in range(4)]
    with TrainLoader(source, view, global_batch=8, seed=1, start_step=3) as loader:
        late = next(loader)
    for name, rows in whole[3].items():
        np.testing.assert_array_equal(late[name], rows, err_msg=name)
    bare = np.concatenate([batch["record"] for batch in whole]) % 4 == 0
    texts = [text_of(row) for batch in whole for row in batch["tokens"]]
    replaced = np.concatenate([batch["substituted"] for batch in whole])
    assert bare.sum() == 8
    if uncaptioned == "replace":
        assert -1 not in texts and (replaced == bare).all()
        assert "list record 4: no caption" in caplog.text
    else:
        assert (np.equal(texts, -1) == bare).all() and not replaced.any()
