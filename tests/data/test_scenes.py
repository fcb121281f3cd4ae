"""Scenes composed of cut-out pictures: their masks are those of the figures, their colours say
nothing, and no picture is on both sides."""

import io

import numpy as np
import pytest
from PIL import Image, ImageDraw

from tests.data.conversions import read_shards
from webssl_jax.config import UserError
from webssl_jax.corpus import scenes
from webssl_jax.corpus.mini_web import readers
from webssl_jax.corpus.scenes import TOPICS, Material
from webssl_jax.data import annotations
from webssl_jax.tools import scenes as tool


def encoded(image):
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def disc(colour):
    """On transparent ground."""
    image = Image.new("RGBA", (64, 64))
    ImageDraw.Draw(image).ellipse((8, 8, 56, 56), fill=colour)
    return encoded(image)


GREY = encoded(Image.new("RGB", (90, 70), (128, 128, 128)))  # no saturation: no hue can change it
FIGURES = {topic: [disc((250, 10 * i, 0, 255))] for i, topic in enumerate(TOPICS)}


def test_a_mask_is_where_the_figure_was_pasted_and_its_hue_is_drawn_anew():
    hues, rng = [], np.random.default_rng(0)
    for _ in range(20):
        image, classes = scenes.scene(rng, Material(FIGURES, [GREY]), 96)
        assert classes.shape == (96, 96) and set(np.unique(classes)) <= set(range(6))
        pixels = np.asarray(image.convert("HSV")).astype(int)
        coloured = pixels[..., 1] > 60
        # but for a rim that is half of each
        assert (coloured == (classes > 0)).mean() > 0.97 and 0.02 < coloured.mean() < 0.9
        hues += pixels[..., 0][coloured][:1].tolist()
    assert np.ptp(hues) > 150  # all discs were red


def test_shards_have_both_kinds_of_masks_and_the_same_seed_gives_the_same(tmp_path):
    material = Material(FIGURES, [GREY])
    for place, seed in (("a", 3), ("b", 3), ("c", 4)):
        for kind in scenes.CLASSES:
            (tmp_path / place / kind).mkdir(parents=True)
        scenes.write(tmp_path / place, "train", material, 3, 64, seed)
    found = {x: read_shards(tmp_path / x / "many") for x in "abc"}
    assert found["a"] == found["b"] != found["c"]
    two = read_shards(tmp_path / "a/two")
    for key, one in found["a"].items():
        many = annotations.mask(one)
        assert many.max() > 0 and two[key].image == one.image
        np.testing.assert_array_equal(annotations.mask(two[key]), np.minimum(many, 1))


def test_what_is_in_test_scenes_is_in_no_training_scene(tmp_path, monkeypatch):
    pictures = {
        scenes.FIGURES: [
            readers.Picture(f"{i}{tone}", b"%d%d" % (i, tone), topic=topic, group=f"emoji/{i}")
            for i in range(40)
            for tone in (0, 1)  # two versions of one thing
            for topic in [[*TOPICS, "flags"][i % 6]]
        ],
        scenes.GROUNDS: [
            readers.Picture(f"{folder}/{i}", b"%s%d" % (folder.encode(), i))
            for folder in ("land", "scene")
            for i in range(20)
        ],
    }
    monkeypatch.setattr(scenes, "_pictures", lambda source, cache: pictures[source.name])
    train, test = (scenes.read(tmp_path)[part] for part in ("train", "test"))
    things = [{data[:-1] for of in one.figures.values() for data in of} for one in (train, test)]
    assert all(things) and not things[0] & things[1]
    assert len(things[0] | things[1]) == len({i for i in range(40) if i % 6 < 5})  # no flags
    assert train.grounds and test.grounds and not set(train.grounds) & set(test.grounds)
    assert all(b"land" in x for x in (*train.grounds, *test.grounds))


def test_bad_input_of_the_tool_is_one_line(tmp_path):
    (tmp_path / "many.txt").write_text("a\n")
    for flags, says in (
        (["--side", "8"], "--side 8: must be at least 32"),
        ([], "holds scenes; delete them"),
    ):
        with pytest.raises(UserError, match=says):
            tool.main(["--output", str(tmp_path), *flags])
