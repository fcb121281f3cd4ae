"""Neighbour sheets: the order is by cosine, a query is not its own neighbour, a frame tells who
has the query's label."""

import numpy as np
import pytest

from webssl_jax.visuals import neighbours


def at(*degrees):
    angles = np.radians(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def test_neighbours_come_by_cosine_whatever_their_length():
    bank = at(90, 10, 45, 180) * np.array([[1], [100], [0.01], [5]])
    indices, cosines = neighbours.nearest(at(0) * 3, bank, 3)
    assert indices.tolist() == [[1, 2, 0]]
    np.testing.assert_allclose(cosines[0], np.cos(np.radians([10, 45, 90])), atol=1e-6)


def test_a_query_is_not_its_own_neighbour_but_its_double_is():
    bank = at(0, 30, 0, 60)
    indices, _ = neighbours.nearest(bank[[0, 1]], bank, 9, own=[0, 1])
    assert indices.tolist() == [[2, 1, 3], [0, 2, 3]]


def test_a_feature_of_zeros_has_cosine_zero():
    indices, cosines = neighbours.nearest(at(0), np.array([[0, 0], [-1, 0], [1, 0.0]]), 3)
    assert indices.tolist() == [[2, 0, 1]] and cosines[0, 1] == 0


def test_a_bank_that_holds_only_the_query_is_refused():
    with pytest.raises(ValueError, match="nothing to compare"):
        neighbours.nearest(at(0), at(0), 3, own=[0])


def frame_colours(labels):
    images = np.full((3, 64, 64, 3), 250, np.uint8)
    sheet = neighbours.neighbour_sheet(
        images, [0], np.array([[1, 2]]), np.array([[0.9, 0.8]]), labels
    )
    return [
        int((sheet == np.array(colour)).all(-1).sum())
        for colour in (neighbours.SAME, neighbours.OTHER)
    ]


def test_only_who_has_the_label_of_the_query_has_a_frame():
    """A bad network's sheet is not a page of red frames."""
    one = frame_colours(["cat", "cat", "dog"])
    assert one[0] > 1000 and one[1] == 0
    assert frame_colours(["cat", "cat", "cat"]) == [2 * one[0], 0]
    assert frame_colours(["cat", None, "dog"]) == frame_colours(["cat", "dog", "dog"]) == [0, 0]
    assert frame_colours([None, "cat", "dog"]) == frame_colours(None) == [0, 0]
