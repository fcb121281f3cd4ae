"""Positions: the fixed table against its formula, resizing against
torch.nn.functional.interpolate."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from webssl_jax.models import position, sizes
from webssl_jax.models.position import INTERPOLATIONS
from webssl_jax.models.vit import ViT

GRIDS = [
    ((16, 16), (7, 7)),
    ((16, 16), (37, 37)),
    ((16, 16), (9, 20)),
    ((37, 37), (16, 16)),
    ((6, 6), (6, 9)),
    ((5, 7), (11, 3)),
]
# Torch's own float32 resize computes even its coordinates in float32. Measured, on tables of unit
# variance: ours is within 6e-7 of torch in float64 and within 1e-5 of torch in float32.
TOLERANCES = {np.float64: 1e-6, np.float32: 2e-5}


def torch_resize(table, old, antialias=False, **kwargs):
    image = torch.tensor(table).reshape(1, *old, -1).permute(0, 3, 1, 2)
    resized = interpolate(image, mode="bicubic", antialias=antialias, **kwargs)
    return resized[0].permute(1, 2, 0).numpy()


def random_table(grid):
    return np.random.default_rng(0).standard_normal((grid[0] * grid[1], 24), np.float32)


@pytest.mark.parametrize(("old", "new"), GRIDS)
def test_plain_resize_is_torch_bicubic_with_size(old, new):
    table = random_table(old)
    ours = np.asarray(INTERPOLATIONS["plain"].resize(table, old, new)).reshape(*new, -1)
    for dtype, tolerance in TOLERANCES.items():
        np.testing.assert_allclose(
            ours, torch_resize(table.astype(dtype), old, size=new), atol=tolerance, rtol=0
        )


@pytest.mark.parametrize(("old", "new"), GRIDS)
def test_antialiased_resize_is_torch_bicubic_with_antialias(old, new):
    table = random_table(old)
    ours = np.asarray(INTERPOLATIONS["antialias"].resize(table, old, new)).reshape(*new, -1)
    for dtype, tolerance in TOLERANCES.items():
        theirs = torch_resize(table.astype(dtype), old, antialias=True, size=new)
        np.testing.assert_allclose(ours, theirs, atol=tolerance, rtol=0)


@pytest.mark.parametrize(("old", "new"), GRIDS)
def test_offset_resize_is_torch_bicubic_with_the_scale_factor_of_dinov2(old, new):
    table = random_table(old)
    factors = tuple((n + 0.1) / o for n, o in zip(new, old, strict=True))
    ours = np.asarray(INTERPOLATIONS["offset"].resize(table, old, new)).reshape(*new, -1)
    for dtype, tolerance in TOLERANCES.items():
        theirs = torch_resize(table.astype(dtype), old, scale_factor=factors)
        np.testing.assert_allclose(ours, theirs, atol=tolerance, rtol=0)


def test_the_modes_differ_visibly():
    table = random_table((16, 16))
    modes = [np.asarray(rule.resize(table, (16, 16), (7, 7))) for rule in INTERPOLATIONS.values()]
    for one, other in itertools.combinations(modes, 2):
        assert np.abs(one - other).max() > 0.05


@pytest.mark.parametrize("mode", INTERPOLATIONS)
def test_the_same_grid_gives_the_same_table(mode):
    table = random_table((6, 6))
    assert INTERPOLATIONS[mode].resize(table, (6, 6), (6, 6)) is table


def test_sincos_table_is_the_formula_of_mae_column_first():
    width, grid = 24, (3, 5)
    table = position.sincos_2d(width, grid)
    assert table.shape == (15, 24)
    for row in range(grid[0]):
        for column in range(grid[1]):
            expected = []
            for index in (column, row):
                angles = [index / 10000 ** (i / (width / 4)) for i in range(width // 4)]
                expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            np.testing.assert_allclose(table[row * grid[1] + column], expected, atol=1e-6)


class RowNumbers(position.Table):
    """CLS at 5, each patch at the number of its row."""

    def table(self, params):
        rows = np.repeat(np.arange(self.grid[0], dtype=np.float32), self.grid[1])
        return jnp.full((self.cls_rows, self.width), 5.0), np.tile(rows[:, None], self.width)


def test_a_new_kind_of_position_is_one_class_and_one_row_of_the_table(monkeypatch):
    monkeypatch.setitem(position.POSITIONS, "rows", RowNumbers)
    config = sizes.web_mae("micro", position="rows", position_resize="antialias")
    images = jnp.ones((1, 32, 64, 3))
    zeros = jax.tree.map(
        jnp.zeros_like, jax.eval_shape(ViT(config).init, jax.random.key(0), images)["params"]
    )
    tokens = ViT(config).apply({"params": zeros}, images).x_prenorm[0, :, 0]
    # resized from 4 x 4 patches to 4 x 8
    np.testing.assert_allclose(tokens, [5, *np.repeat(np.arange(4), 8)], atol=1e-5)


def test_an_unknown_kind_of_position_is_refused_in_one_line():
    with pytest.raises(ValueError, match="position = 'polar' is not one of learned, sincos, "):
        sizes.web_mae("micro", position="polar")
    with pytest.raises(ValueError, match="width = 30 must be a multiple of 4 for sincos positions"):
        sizes.web_mae("micro", width=30)
