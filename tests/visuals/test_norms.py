"""Token norms: outliers are found and named."""

import numpy as np
from matplotlib.figure import Figure

from webssl_jax.visuals import norms


def with_outliers():
    patches = np.random.default_rng(0).normal(50, 4, (5, 7, 9))
    patches[3, 2, 8], patches[1, 6, 0] = 400.0, 180.0
    return patches


def texts_of_figures(monkeypatch):
    said, write = [], Figure.text

    def text(self, x, y, text, **kwargs):
        said.append(text)
        return write(self, x, y, text, **kwargs)

    monkeypatch.setattr(Figure, "text", text)
    return said


def test_outliers_are_named_by_their_place_the_longest_first():
    found = norms.outliers(with_outliers())
    assert [(o.image, o.row, o.column, o.norm) for o in found] == [
        (3, 2, 8, 400.0),
        (1, 6, 0, 180.0),
    ]
    assert 7.5 < found[0].times < 8.5


def test_norms_of_one_kind_hold_no_outliers():
    assert norms.outliers(np.random.default_rng(0).normal(50, 10, (5, 7, 9))) == []


def test_the_outliers_are_written_into_the_figure(monkeypatch):
    said = texts_of_figures(monkeypatch)
    names = ["bus", "cup", "dog", "a tree that stands alone", "sky"]
    draw = (np.full((5, 18, 14, 3), 90, np.uint8), np.full(5, 60.0), np.zeros((5, 0)))
    picture = norms.norm_figure(*draw, with_outliers(), names)
    assert picture.dtype == np.uint8 and picture.shape == (620, 1300, 3)
    assert "2 of 315" in said[-1] and "a tree that stands alone (2, 8) 400" in said[-1]
    assert said[-1].index("a tree") < said[-1].index("cup (6, 0) 180")


def test_registers_and_a_single_image_are_drawn(monkeypatch):
    said = texts_of_figures(monkeypatch)
    picture = norms.norm_figure(
        np.zeros((1, 8, 8, 3), np.uint8), np.ones(1), np.full((1, 4), 9.0), np.ones((1, 2, 2))
    )
    assert picture.shape == (620, 1300, 3)
    assert said[-1].startswith("No outliers: none of 4 patches")
