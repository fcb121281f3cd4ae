"""Texts drawn in many fonts: whole, with contrast, and in test images by fonts never seen."""

import io
import pathlib

import matplotlib
import numpy as np
import pytest
from PIL import Image

from tests.data.conversions import read_shards
from webssl_jax.config import UserError
from webssl_jax.corpus import reading, texts
from webssl_jax.corpus.mini_web import packages
from webssl_jax.tools import reading as tool

FOLDER = pathlib.Path(matplotlib.get_data_path(), "fonts", "ttf")
FONTS = {
    name: [(FOLDER / f"{name}.ttf").read_bytes()]
    for name in ("DejaVuSans", "DejaVuSerif", "STIXGeneral")
}


def test_a_text_is_whole_wherever_it_stands_and_differs_in_grey_from_its_ground(monkeypatch):
    rng = np.random.default_rng(0)
    monkeypatch.setattr(reading, "_colours", lambda rng: (np.zeros(3), np.full(3, 200.0)))
    for text in ("W", "0", "moon", "cast") * 5:
        image, ink = reading.draw(rng, FONTS, text, 48)
        dark = np.asarray(image)[..., 0] < 100
        rows, columns = np.flatnonzero(dark.any(1)), np.flatnonzero(dark.any(0))
        assert 0.35 * 48 < max(np.ptp(rows), np.ptp(columns)) and 0.02 < ink < 0.6
        rim = np.concatenate([dark[[0, -1]].ravel(), dark[:, [0, -1]].ravel()])
        assert rim.mean() < 0.03  # nothing is cut off
    monkeypatch.undo()
    weights = np.array([0.299, 0.587, 0.114])
    pairs = [reading._colours(rng) for _ in range(50)]
    assert min(abs(weights @ (a - b)) for a, b in pairs) >= 70


def test_shards_hold_every_text_as_often_and_the_same_seed_gives_the_same(tmp_path):
    found = []
    for place, seed in (("a", 1), ("b", 1), ("c", 2)):
        (tmp_path / place).mkdir()
        reading.write(tmp_path / place, "test", "words", FONTS, 2, 24, seed)
        found.append(read_shards(tmp_path / place, "test"))
    assert found[0] == found[1] != found[2]
    labels = [record.label for record in found[0].values()]
    assert sorted(labels) == sorted(2 * texts.WORDS) and len(set(texts.WORDS)) == 40
    image = next(iter(found[0].values())).image
    assert Image.open(io.BytesIO(image)).size == (24, 24)


def test_no_font_of_test_images_is_in_training_images(tmp_path, monkeypatch):
    monkeypatch.setattr(packages.Package, "archive", lambda self, cache: cache / self.name)
    monkeypatch.setattr(
        packages,
        "read",
        lambda archive, wanted: {
            name: f"{archive.name} {name}".encode()
            for name in ("files/x-latin-400.woff", "files/x-latin-100.woff", "x-400.woff2")
            if wanted.search(name)
        },
    )
    fonts = reading.read(tmp_path)
    faces = {part: {x for faces in fonts[part].values() for x in faces} for part in fonts}
    assert len(faces["train"]) == 16 and len(faces["test"]) == 6
    assert not faces["train"] & faces["test"] and not set(fonts["train"]) & set(fonts["test"])
    monkeypatch.setattr(packages, "read", lambda archive, wanted: {})
    with pytest.raises(UserError, match="holds no face of"):
        reading.read(tmp_path)


def test_bad_input_of_the_tool_is_one_line(tmp_path):
    (tmp_path / "words").mkdir()
    (tmp_path / "words/test-00000-of-00001.arrayrecord").write_text("")
    for flags, says in (
        (["--side", "8"], "--side 8: must be at least 16"),
        ([], "holds records; delete them"),
    ):
        with pytest.raises(UserError, match=says):
            tool.main(["--output", str(tmp_path), *flags])
