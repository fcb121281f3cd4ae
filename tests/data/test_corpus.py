"""Claims about the embedded corpus, and about the likeness by which its splits were kept apart."""

import collections
import hashlib
import json
from glob import glob
from pathlib import Path

import numpy as np
import pytest
from array_record.python import array_record_module
from PIL import Image, ImageDraw

from webssl_jax import corpus
from webssl_jax.corpus import near_duplicates
from webssl_jax.data import decode, records

FOLDER = Path(corpus.__file__).parent


@pytest.fixture(scope="module")
def splits():
    """{split: its records}."""
    found = {}
    for split in corpus.SPLITS:
        found[split] = []
        for path in sorted(glob(corpus.pattern(split))):
            reader = array_record_module.ArrayRecordReader(path)
            found[split] += [records.decode(data) for data in reader.read_all()]
            reader.close()
    return found


@pytest.fixture(scope="module")
def images(splits):
    """{split: decoded pixels}: decoding is itself a claim."""
    return {
        split: [np.asarray(decode.decode_image(record.image)) for record in found]
        for split, found in splits.items()
    }


def test_it_is_small_enough_to_live_in_the_package():
    size = sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file())
    assert size <= 10_000_000


def test_it_holds_thousands_of_images_in_at_least_ten_classes(splits):
    assert sum(map(len, splits.values())) >= 4500
    train, test = (collections.Counter(r.label for r in splits[s]) for s in ("train", "test"))
    assert set(test) == set(train) - {None} and len(test) >= 10
    assert sum(test.values()) >= 1000
    assert min(test.values()) >= 15 and min(train.values()) >= 30
    assert max(test.values()) < 0.2 * sum(test.values()), "guessing one class must not pay"


def test_every_image_decodes_to_the_size_its_record_states(splits, images):
    for split, found in splits.items():
        for record, pixels in zip(found, images[split], strict=True):
            assert pixels.shape == (record.height, record.width, 3), record.key
            assert pixels.dtype == np.uint8
            sides = sorted(pixels.shape[:2])
            assert 20 < sides[0] <= 64 and sides[1] <= 128, record.key
            assert pixels.std() > 0, record.key


def test_keys_are_unique_and_nearly_every_image_has_a_caption(splits):
    everything = [record for found in splits.values() for record in found]
    assert len({record.key for record in everything}) == len(everything)
    assert sum(bool(record.captions) for record in everything) > 0.95 * len(everything)
    assert all(caption.strip() for record in everything for caption in record.captions)
    assert {record.source for record in everything} == {"openclipart"}


def test_no_pixels_occur_twice(images):
    digests = [
        hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).digest()
        for found in images.values()
        for pixels in found
    ]
    assert len(set(digests)) == len(digests)


def test_no_test_image_resembles_a_training_image(images):
    train, test = (np.stack([near_duplicates.canvas(p) for p in images[s]]) for s in corpus.SPLITS)
    scores = near_duplicates.likeness(test, train)
    assert not near_duplicates.alike(scores, edges=0.70, colour=0.84).any()


def test_likeness_joins_mirrored_and_outlined_versions_and_not_other_drawings():
    def draw(fill, mirrored=False, other=False):
        image = Image.new("RGB", (64, 64), "white")
        pen = ImageDraw.Draw(image)
        points = [(5, 60), (20, 8), (34, 40), (60, 55)]
        if other:
            points = [(2, 20), (60, 4), (40, 25), (62, 60), (10, 50)]
        pen.polygon(points, fill=fill, outline="black", width=2)
        pixels = np.asarray(image)
        return pixels[:, ::-1] if mirrored else pixels

    canvases = np.stack(
        [draw("red"), draw("red", mirrored=True), draw("white"), draw("red", other=True)]
    )
    near = near_duplicates.alike(near_duplicates.likeness(canvases), edges=0.84, colour=0.93)
    assert near[0, 1] and near[0, 2] and not near[:3, 3].any()
    assert near_duplicates.components(near, list("abcd")) == [0, 0, 0, 3]
    assert near_duplicates.components(np.zeros((3, 3), bool), ["x", "y", "x"]) == [0, 1, 0]


def test_the_readme_states_licence_counts_and_command(splits):
    text = (FOLDER / "README.md").read_text("utf-8")
    assert "public domain" in text and "tools/build_corpus.py" in text
    for label in {record.label for record in splits["test"]}:
        counts = [sum(r.label == label for r in splits[split]) for split in corpus.SPLITS]
        assert f"| {label} | {counts[0]} | {counts[1]} |" in text


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="train, test"):
        corpus.pattern("val")
    assert json.dumps(corpus.pattern("train")).endswith('train-*.arrayrecord"')
