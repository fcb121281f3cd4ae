"""The held-out part: the right share of each class, whole groups, and look-alikes in one group."""

import numpy as np
import pytest

from webssl_jax.evaluators.features import Rows
from webssl_jax.evaluators.probes.splits import hold_out, look_alikes
from webssl_jax.evaluators.probes.trivial import raw_pixels


@pytest.mark.parametrize("counts", [(10, 20, 30), (1, 3, 5)])
def test_the_same_share_of_each_class_is_held_out_and_one_image_is_kept(counts):
    labels = np.repeat(np.arange(len(counts)), counts)
    kept, held = hold_out(labels, np.arange(len(labels)), 0.2, seed=0)
    assert sorted([*kept, *held]) == list(range(len(labels)))
    for label, n in enumerate(counts):
        assert (labels[held] == label).sum() == min(round(0.2 * n), n - 1)
        assert (labels[kept] == label).sum() >= 1


def test_groups_are_never_cut():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(100), 5)
    labels = rng.integers(0, 4, 100)[groups]
    for seed in range(5):
        kept, held = hold_out(labels, groups, 0.2, seed)
        assert not set(groups[kept]) & set(groups[held])
        assert 0.1 < len(held) / len(labels) <= 0.2


def test_the_seed_alone_decides():
    labels, groups = np.arange(60) % 3, np.arange(60)
    np.testing.assert_array_equal(
        hold_out(labels, groups, 0.2, 7)[1], hold_out(labels, groups, 0.2, 7)[1]
    )
    assert (
        hold_out(labels, groups, 0.2, 7)[1].tolist() != hold_out(labels, groups, 0.2, 8)[1].tolist()
    )


def test_too_few_images_are_judged_on_themselves():
    kept, held = hold_out(np.array([0, 1]), np.arange(2), 0.2, seed=0)
    assert kept.tolist() == held.tolist() == [0, 1]


def test_copies_mirror_images_and_brighter_versions_are_alike_but_not_across_classes():
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 200, (6, 8, 8, 3))
    images = coarse.repeat(4, axis=1).repeat(4, axis=2).astype(np.uint8)
    family = np.concatenate([images, images[:1] + 40, images[1:2, :, ::-1], images[2:3]])
    labels = np.array([0, 0, 0, 1, 1, 1, 0, 0, 1])
    thumbnails = raw_pixels(family)
    groups = look_alikes(thumbnails, labels)
    assert groups[0] == groups[6] and groups[1] == groups[7]
    assert groups[2] != groups[8]  # the same picture under another label
    assert len(set(groups)) == 7
    on_disk = Rows((thumbnails[:4], thumbnails[4:]))
    np.testing.assert_array_equal(look_alikes(on_disk, labels), groups)
