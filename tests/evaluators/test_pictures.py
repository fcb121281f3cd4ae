"""Pictures of any feature function: which images are shown, which are neighbours, what may be
asked."""

import jax
import numpy as np
import pytest

from webssl_jax.config import UserError
from webssl_jax.data import records
from webssl_jax.evaluators import pictures
from webssl_jax.methods.base import Features, Inside
from webssl_jax.visuals import neighbours


def brightness(calls):
    """Features that tell images apart by their brightness alone, as an angle."""

    def features(images, layers=(), inside=False):
        calls.append(len(images))
        n = len(images)
        angle = images.reshape(n, -1).mean(1) / 255 * np.pi / 2
        cls = np.stack([np.cos(angle), np.sin(angle)], axis=1)
        patches = np.broadcast_to(cls[:, None, None], (n, 2, 2, 2))
        looked = Inside(np.full((n, 3, 2, 2), 0.2), angle, np.zeros((n, 0)), np.ones((n, 2, 2)))
        return Features(cls, patches, np.zeros((n, 0, 2)), {}, looked if inside else None)

    return features


def some_images(n):
    levels = np.random.default_rng(0).permutation(n) * (255 // n)
    pixels = np.broadcast_to(levels[:, None, None, None], (n, 16, 16, 3)).astype(np.uint8)
    return pictures.Images(pixels, ["bright" if x > 127 else "dark" for x in levels], [""] * n)


def test_shown_images_are_spread_over_all_of_them():
    assert pictures.evenly_spaced(10, 5).tolist() == [0, 2, 4, 6, 8]
    assert pictures.evenly_spaced(3, 8).tolist() == [0, 1, 2]
    assert pictures.evenly_spaced(0, 8).tolist() == []


def test_every_call_gets_one_batch_size_and_neighbours_are_sought_among_all(monkeypatch):
    found = {}
    monkeypatch.setattr(
        neighbours,
        "neighbour_sheet",
        lambda images, queries, indices, *rest, **kwargs: found.update(
            zip(queries.tolist(), indices.tolist())
        ),
    )
    calls, images = [], some_images(21)
    drawn = dict(pictures.FeaturePictures(images, ("neighbours",), 4, 8).run(brightness(calls), 3))
    assert list(drawn) == ["neighbours"] and calls == [8, 8, 8]
    levels = images.pixels[:, 0, 0, 0].astype(int)
    assert list(found) == [0, 5, 10, 15]
    for query, near in found.items():
        distances = np.abs(levels - levels[query])
        wanted = np.sort(distances)[1 : 1 + pictures.NEIGHBOURS]
        assert distances[near].tolist() == wanted.tolist()


def test_pictures_of_single_images_do_not_look_at_the_others():
    calls = []
    drawn = pictures.FeaturePictures(some_images(21), ("pca", "attention"), 4, 8)
    assert sorted(dict(drawn.run(brightness(calls), 3))) == ["attention", "pca"]
    assert calls == [8]


def test_every_picture_is_drawn_and_only_by_the_first_process(monkeypatch):
    made = pictures.FeaturePictures(some_images(5), pictures.NAMES, 8, 4)
    drawn = dict(made.run(brightness([]), 3))
    assert tuple(drawn) == pictures.NAMES
    assert all(x.dtype == np.uint8 and x.ndim == 3 for x in drawn.values())
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    calls = []
    other = pictures.FeaturePictures(some_images(5), pictures.NAMES, 8, 4)
    assert dict(other.run(brightness(calls), 3)) == {} and calls == [4, 4]  # but all must look


def test_a_single_image_has_no_neighbours_and_all_other_pictures(caplog):
    with caplog.at_level("INFO"):
        drawn = dict(
            pictures.FeaturePictures(some_images(1), pictures.NAMES).run(brightness([]), 0)
        )
    assert sorted(drawn) == ["attention", "norms", "pca"]
    assert "there is a single image" in caplog.text


def test_a_network_that_diverged_is_not_drawn_and_stops_nothing(caplog):
    def features(images, **kwargs):
        seen = brightness([])(images, **kwargs)
        return seen._replace(patches=seen.patches * np.nan)

    assert dict(pictures.FeaturePictures(some_images(3), pictures.NAMES).run(features, 0)) == {}
    assert "NaN or infinity" in caplog.text


def test_pictures_are_chosen_by_name():
    own = ("reconstruction",)
    assert pictures.choose("all", own, "--pictures") == (*own, *pictures.NAMES)
    assert pictures.choose("none", own, "--pictures") == ()
    assert pictures.choose("norms, pca,norms", own, "--pictures") == ("norms", "pca")
    with pytest.raises(UserError, match=r"config.pictures.kinds = pac: .*did you mean 'pca'"):
        pictures.choose("pac", own, "config.pictures.kinds")
    for nothing in ("", " , "):
        with pytest.raises(UserError, match="--pictures = .*names no picture; give all, none or"):
            pictures.choose(nothing, own, "--pictures")


class Shelf:
    """A source of a few records, some damaged."""

    def __init__(self, items):
        self._items = items

    def __len__(self):
        return len(self._items)

    def __getitem__(self, index):
        return self._items[index]

    def describe(self, index):
        return f"shelf {index}"


def record(level, label=None, captions=()):
    return records.encode(records.Record(bytes([level]), captions, f"key{level}", 1, 1, "", label))


def view(data):
    return np.full((4, 4, 3), data[0], np.uint8)


def test_images_are_read_with_their_names_and_damaged_ones_are_passed_over():
    shelf = Shelf([record(1, "cat"), b"broken", record(3, captions=("a tree", "wood")), record(4)])
    images = pictures.read_images(shelf, view, 10)
    assert images.pixels[:, 0, 0, 0].tolist() == [1, 3, 4]
    assert list(images.labels) == ["cat", None, None]
    assert list(images.captions) == ["key1", "a tree", "key4"]
    assert len(pictures.read_images(shelf, view, 2).pixels) == 2


def test_a_source_of_nothing_but_damage_is_one_line():
    with pytest.raises(UserError, match="shelf 0, ...: no image can be read"):
        pictures.read_images(Shelf([b"", b"broken"]), view, 10)
