"""Principal components: planted directions are found, signs are stable, the subject is the
foreground."""

import numpy as np
import pytest

from webssl_jax.visuals import drawing, pca


def planted(n=400, width=16, lengths=(5.0, 3.0, 2.0), noise=0.01, seed=0):
    """(n, width) features that vary along a few known orthonormal directions, and those."""
    rng = np.random.default_rng(seed)
    directions = np.linalg.qr(rng.normal(size=(width, len(lengths))))[0].T
    x = rng.normal(size=(n, len(lengths))) * np.array(lengths) @ directions
    return x + noise * rng.normal(size=(n, width)) + 7.0, directions


@pytest.mark.parametrize("n", (400, 12))  # more, and fewer, patches than channels
def test_planted_directions_are_found_largest_first(n):
    x, directions = planted(n)
    found = pca.principal_components(x, 3)
    u, s, vt = np.linalg.svd(x - x.mean(0), full_matrices=False)
    np.testing.assert_allclose(np.abs((found.directions * vt[:3]).sum(1)), 1, atol=1e-9)
    np.testing.assert_allclose(found.variances, s[:3] ** 2 / n, rtol=1e-9)
    np.testing.assert_allclose(found.explained(), (s[:3] ** 2).sum() / (s**2).sum(), rtol=1e-9)
    inside = directions.T @ directions  # the found ones lie in the planted space
    np.testing.assert_allclose(found.directions @ inside, found.directions, atol=0.02)


def test_scores_have_zero_mean_and_unit_variance():
    x, _ = planted()
    scores = pca.principal_components(x, 3).scores(x)
    np.testing.assert_allclose(scores.mean(0), 0, atol=1e-9)
    np.testing.assert_allclose(scores.std(0), 1, rtol=1e-9)


def test_the_sign_of_a_component_does_not_depend_on_the_order_or_the_number_of_patches():
    x, _ = planted()
    shuffled = np.random.default_rng(1).permutation(x)
    a, b, few = (pca.principal_components(y, 3).directions for y in (x, shuffled, x[:15]))
    np.testing.assert_allclose(a, b, atol=1e-9)
    assert ((a * few).sum(1)[:1] > 0.9).all()  # of one route through the Gram matrix and the other
    assert (np.take_along_axis(a, np.abs(a).argmax(1)[:, None], 1) > 0).all()


def test_equal_patches_and_too_few_channels_are_the_middle_colour_and_no_error():
    flat = pca.principal_components(np.full((20, 8), 3.0), 3)
    assert (pca.colours(flat.scores(np.full((2, 8), 3.0))) == 128).all()
    assert flat.explained() == 0
    one = pca.principal_components(np.arange(6.0)[:, None], 3)  # one channel: one component
    assert one.scores(np.arange(6.0)[:, None]).shape == (6, 3)
    assert (one.variances[1:] == 0).all() and one.variances[0] > 0


def test_features_that_are_not_finite_are_refused():
    x, _ = planted(20)
    x[3, 4] = np.nan
    with pytest.raises(ValueError, match="finite"):
        pca.principal_components(x, 3)


def test_colours_reach_their_ends_at_2_3_standard_deviations():
    ends = pca.colours(np.array([-9.0, -2.3, 0.0, 2.3, 9.0]))
    assert ends.tolist() == [0, 0, 128, 255, 255]


@pytest.mark.parametrize("sign", (1, -1))
def test_the_foreground_is_the_side_that_touches_the_border_less(sign):
    scores = np.full((8, 8), -1.0)
    scores[1:7, 1:7] = 1.0  # more than half of the image, but not its border
    assert pca.foreground_side(sign * scores) == sign


def test_where_both_sides_touch_the_border_alike_the_smaller_is_the_foreground():
    scores = np.where(np.arange(8) < 4, 1.0, -1.0)[None].repeat(8, 0)
    scores[2, 6] = 1.0
    assert pca.foreground_side(scores) == -1
    assert pca.foreground_side(-scores) == 1


def test_a_planted_subject_is_cut_out_and_its_parts_coloured_alike_in_all_images():
    rng = np.random.default_rng(0)
    subject, part, ground = rng.normal(size=(3, 32))
    patches = np.empty((2, 10, 10, 32))
    boxes = ((2, 2), (4, 3))
    for i, (top, left) in enumerate(boxes):
        patches[i] = ground
        patches[i, top : top + 4, left : left + 4] = subject
        patches[i, top : top + 4, left : left + 2] += part
    patches += 0.01 * rng.normal(size=patches.shape)
    images = np.full((2, 40, 40, 3), 200, np.uint8)
    sheet = pca.pca_sheet(images, patches)
    cell, gap = 120, drawing.GAP  # 40 pixels, three times enlarged
    found = []
    for i, (top, left) in enumerate(boxes):
        y = sheet.shape[0] - 12 - (2 - i) * cell - (1 - i) * gap
        front = sheet[y : y + cell, 12 + 4 * (cell + gap) :][:, :cell].reshape(10, 12, 10, 12, 3)
        front = front[:, 6, :, 6]
        is_ground = (front == np.array(drawing.MAT)).all(-1)
        wanted = np.ones((10, 10), bool)
        wanted[top : top + 4, left : left + 4] = False
        assert (is_ground == wanted).all()
        found.append(front[top : top + 4, left : left + 4].astype(int))
    red = np.stack(found)[..., 0]  # the first component of the foreground: which part
    assert np.ptp(red[:, :, :2]) < 60 and np.ptp(red[:, :, 2:]) < 60
    assert abs(red[:, :, :2].mean() - red[:, :, 2:].mean()) > 80


def test_images_and_features_must_be_as_many():
    with pytest.raises(ValueError, match="2 images with patch features of 3"):
        pca.pca_sheet(np.zeros((2, 8, 8, 3), np.uint8), np.zeros((3, 2, 2, 4)))
