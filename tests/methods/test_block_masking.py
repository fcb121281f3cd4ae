"""iBOT's block masks against the statistics of 1000 draws of DINOv2's own code (golden/)."""

import functools
import json
import pathlib

import jax
import numpy as np
import pytest

from webssl_jax.methods import masking
from webssl_jax.methods.masking import BlockMasking

HERE = pathlib.Path(__file__).parent / "golden"
GOLDEN = json.loads((HERE / "g_masking.json").read_text())
CELLS = np.load(HERE / "g_masking.npz")
CASES = [name for name in GOLDEN["masking"] if not name.endswith("want0")]


@functools.cache
def masks_of(grid):
    """1000 masks for each golden target of one grid, drawn together."""
    wants = [
        v["want"] for k, v in GOLDEN["masking"].items() if k.startswith(f"{grid[0]}x{grid[1]}/")
    ]
    keys = jax.random.split(jax.random.key(0), 1000 * len(wants))
    masks = jax.jit(masking.block_masks, static_argnums=2)(keys, np.repeat(wants, 1000), grid)
    return dict(zip(wants, np.asarray(masks).reshape(len(wants), 1000, *grid)))


@pytest.mark.parametrize("name", CASES)
def test_a_mask_is_as_large_and_as_blocky_and_lies_where_the_original_s_does(name):
    theirs = GOLDEN["masking"][name]
    grid, want = tuple(map(int, name.split("/")[0].split("x"))), theirs["want"]
    masks = masks_of(grid)[want]
    counts = masks.sum(axis=(1, 2))
    assert counts.max() <= want
    spread = 5 * np.sqrt(2 / 1000)  # five standard errors of a difference of two means
    assert abs(counts.mean() - theirs["mean"]) <= spread * max(theirs["std"], counts.std())
    assert abs((counts == want).mean() - theirs["exact"]) <= spread / 2
    alike = [masks[:, 1:] == masks[:, :-1], masks[:, :, 1:] == masks[:, :, :-1]]
    alike = np.mean([x.mean(axis=(1, 2)) for x in alike], axis=0)
    assert abs(alike.mean() - theirs["neighbour_agreement"]) <= spread * alike.std() + 2e-3
    # every cell: six standard errors, for there are up to 729 of them
    cells = CELLS[f"{name}/per_cell_probability"]
    assert np.abs(masks.mean(axis=0) - cells).max() <= 6 * np.sqrt(2 * 0.25 / 1000)


def test_nothing_to_hide_hides_nothing():
    assert not masks_of((4, 4))[0].any()


@pytest.mark.parametrize(
    "images, probability, most_ratio",
    [(16, 0.5, 0.5), (4, 0.5, 0.5), (16, 1.0, 0.5), (3, 0.5, 0.45), (1, 0.5, 0.5)],
)
def test_a_group_spreads_its_ratios_as_the_original_s_batch(images, probability, most_ratio):
    theirs = GOLDEN["collate"][f"B{images}_p{probability}_r0.1-{most_ratio}"]
    masking_ = BlockMasking(probability, 0.1, most_ratio)
    assert masking_.most(2 * images, 256) == theirs["upperbound"]
    draw = jax.jit(masking_.draw, static_argnums=(1, 2, 3))
    masks = np.asarray(draw(jax.random.key(1), 300, 2 * images, (16, 16)))
    counts = np.sort(masks.sum(axis=-1), axis=1)
    masked = int(2 * images * probability)
    assert ((counts > 0).sum(axis=1) == masked).all()
    # 300 draws of ours; a stratum is 102 / n patches wide, uniform
    width = 256 * (most_ratio - 0.1) / masked
    np.testing.assert_allclose(
        counts.mean(axis=0), theirs["sorted_counts_mean"], atol=5 * width / 12**0.5 / 10 + 0.1
    )
    assert counts.sum(axis=1).max() <= theirs["upperbound"]
    # which crop gets which ratio is drawn anew: every crop is masked about equally often
    share = (masks.sum(axis=-1) > 0).mean(axis=0)
    assert np.abs(share - masked / (2 * images)).max() <= 5 * 0.5 / 300**0.5


@pytest.mark.parametrize(
    "images, patches, most",
    [(8, 256, 663), (12, 256, 967), (24, 256, 1883), (64, 256, 4941), (16, 1369, 6838)],
)
def test_the_buffer_is_as_large_as_the_original_s(images, patches, most):
    assert BlockMasking().most(2 * images, patches) == most


def test_a_group_s_masks_depend_on_its_number_alone():
    draw = jax.jit(BlockMasking().draw, static_argnums=(1, 2, 3))
    four, two = (draw(jax.random.key(5), groups, 6, (8, 8)) for groups in (4, 2))
    np.testing.assert_array_equal(four[:2], two)
    assert (four[0] != four[1]).any()


def test_the_buffer_holds_every_masked_patch_once_with_its_crop_s_weight():
    masks = np.zeros((2, 3, 5), bool)
    masks[0, 0, [1, 4]] = masks[0, 2, 3] = masks[1, 1, :4] = True
    made = masking.masked_patches(masks, 6)
    assert made.indices[0, :3].tolist() == [1, 4, 13] and made.indices[1, :4].tolist() == [
        5,
        6,
        7,
        8,
    ]
    assert made.weights.tolist() == [[0.5, 0.5, 1, 0, 0, 0], [0.25] * 4 + [0, 0]]


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(probability=0.0), "probability = 0.0"),
        (dict(ratio_min=0.6), "ratio_min = 0.6, ratio_max = 0.5"),
        (dict(ratio_max=1.5), "ratio_max = 1.5"),
    ],
)
def test_ratios_out_of_range_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        BlockMasking(**fields)
