"""Pictures of any model: which images are shown, which are neighbours, what may be
asked."""

import dataclasses

import jax
import numpy as np
import pytest

from tests.evaluators.small_models import small_clip, small_mae
from webssl_jax.config import UserError
from webssl_jax.data import records
from webssl_jax.evaluators import pictures, text_pictures
from webssl_jax.model import Model, Origin
from webssl_jax.models.features import Diagnostics, Features, Want
from webssl_jax.visuals import neighbours
from webssl_jax.weights.networks import Networks


class Brightness:
    """A model that tells images apart by their brightness alone, as an angle; ``calls`` are the
    numbers of images that it was shown."""

    networks, mesh, text, origin = Networks(), None, None, Origin("bright")
    rounded_batch = Model.rounded_batch

    def __init__(self):
        self.calls = []

    def features(self, images, want):
        self.calls.append(len(images))
        n = len(images)
        angle = images.reshape(n, -1).mean(1) / 255 * np.pi / 2
        cls = np.stack([np.cos(angle), np.sin(angle)], axis=1)
        patches = np.broadcast_to(cls[:, None, None], (n, 2, 2, 2))
        looked = Diagnostics(
            np.full((n, 3, 2, 2), 0.2), angle, np.zeros((n, 0)), np.ones((n, 2, 2))
        )
        assert want == Want(diagnostics=True)
        return Features(cls, patches, None, {}, looked)


def some_images(n):
    levels = np.random.default_rng(0).permutation(n) * (255 // n)
    pixels = np.broadcast_to(levels[:, None, None, None], (n, 16, 16, 3)).astype(np.uint8)
    return pictures.Images(pixels, ["bright" if x > 127 else "dark" for x in levels], [""] * n)


@pytest.fixture(autouse=True)
def eight_a_call(monkeypatch):
    """Images a call of a network."""
    monkeypatch.setattr(pictures, "_BATCH", 8)


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
    model, images = Brightness(), some_images(21)
    drawn = pictures.ModelPictures(images, ("neighbours",), 4).draw(model)
    assert list(drawn) == ["neighbours"] and model.calls == [8, 8, 8]
    levels = images.pixels[:, 0, 0, 0].astype(int)
    assert list(found) == [0, 5, 10, 15]
    for query, near in found.items():
        distances = np.abs(levels - levels[query])
        wanted = np.sort(distances)[1 : 1 + pictures.NEIGHBOURS]
        assert distances[near].tolist() == wanted.tolist()


def test_pictures_of_single_images_do_not_look_at_the_others():
    model = Brightness()
    drawn = pictures.ModelPictures(some_images(21), ("pca", "attention"), 4).draw(model)
    assert sorted(drawn) == ["attention", "pca"]
    assert model.calls == [8]


def test_every_picture_is_drawn_and_only_by_the_first_process(monkeypatch):
    drawn = pictures.ModelPictures(some_images(9), pictures.NAMES).draw(Brightness())
    assert tuple(drawn) == pictures.NAMES
    assert all(x.dtype == np.uint8 and x.ndim == 3 for x in drawn.values())
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    model = Brightness()
    assert pictures.ModelPictures(some_images(9), pictures.NAMES).draw(model) == {}
    assert model.calls == [8, 8]  # but all must look


def test_a_single_image_has_no_neighbours_and_all_other_pictures(caplog):
    with caplog.at_level("INFO"):
        drawn = pictures.ModelPictures(some_images(1), pictures.NAMES).draw(Brightness())
    assert sorted(drawn) == ["attention", "norms", "pca"]
    assert "there is a single image" in caplog.text


def test_a_network_that_diverged_is_not_drawn_and_stops_nothing(caplog):
    class Diverged(Brightness):
        def features(self, images, want):
            seen = super().features(images, want)
            return seen._replace(patches=seen.patches * np.nan)

    assert pictures.ModelPictures(some_images(3), pictures.NAMES).draw(Diverged()) == {}
    assert "NaN or infinity" in caplog.text


def test_titles_say_whose_pictures_they_are(monkeypatch):
    said = []
    monkeypatch.setattr(
        neighbours, "neighbour_sheet", lambda *rest, title, **more: said.append(title)
    )
    made = pictures.ModelPictures(some_images(9), ("neighbours",))
    for of in ("", "run, step 3"):
        made.draw(Brightness(), of)
    assert said == ["Nearest neighbours, bright", "Nearest neighbours, run, step 3"]


def test_what_can_be_drawn_follows_from_the_networks():
    of_mae, of_clip = small_mae().networks, small_clip().networks
    assert pictures.available(of_mae) == ("reconstruction", *pictures.NAMES)
    assert pictures.available(of_clip) == (*text_pictures.NAMES, *pictures.NAMES)
    other = dataclasses.replace(of_clip.text, vocabulary=64)  # ids of a tokenizer that is not here
    assert pictures.available(dataclasses.replace(of_clip, text=other)) == pictures.NAMES


def test_what_a_model_cannot_give_is_passed_over():
    asked = ("reconstruction", "similarity", "norms")
    assert list(pictures.ModelPictures(some_images(3), asked).draw(Brightness())) == ["norms"]


def test_pictures_are_chosen_by_name():
    known = ("reconstruction", *pictures.NAMES)
    assert pictures.choose("all", known, "--pictures") == known
    assert pictures.choose("none", known, "--pictures") == ()
    assert pictures.choose("norms, pca,norms", known, "--pictures") == ("norms", "pca")
    with pytest.raises(UserError, match=r"config.pictures.kinds = pac: .*did you mean 'pca'"):
        pictures.choose("pac", known, "config.pictures.kinds")
    for nothing in ("", " , "):
        with pytest.raises(UserError, match="--pictures = .*names no picture; give all, none or"):
            pictures.choose(nothing, known, "--pictures")


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
