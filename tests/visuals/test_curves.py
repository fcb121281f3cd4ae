"""Curves survive what real runs log: restarts, NaN, one point, nothing."""

import numpy as np
import pytest

from webssl_jax.visuals import curves
from webssl_jax.visuals.curves import loss_curves

BLUE = (31, 95, 168)


def rows_of(n):
    return [
        {
            "step": s,
            "train/loss": 1 / (s + 1),
            "optim/learning_rate": 1e-3,
            "optim/grad_norm": 2.0 + s,
        }
        for s in range(n)
    ]


def near(picture, colour):
    return int((np.abs(picture.astype(int) - np.array(colour)).max(-1) < 12).sum())


@pytest.mark.parametrize(
    "rows",
    [
        [],
        rows_of(1),
        rows_of(2),
        rows_of(500),
        [{"step": 0, "train/loss": float("nan")}],
        [{"step": 7, "eval/knn/top1": 0.3, "eval/knn/top1_se": 0.1}],
        [{"step": 3, "optim/grad_norm": 0.0}],
    ],
    ids=["none", "one", "two", "many", "nan", "evaluation only", "zero"],
)
def test_any_history_makes_a_picture(rows):
    picture = loss_curves(rows)
    assert picture.dtype == np.uint8 and picture.shape == (760, 1300, 3)
    assert (picture < 128).any()


def evaluated(*names):
    """Four steps of figures whose errors are known."""
    return [
        {"step": s} | {key: s / 10 for name in names for key in (name, f"{name}_se")}
        for s in range(4)
    ]


@pytest.mark.parametrize("count, height", [(0, 760), (1, 760), (2, 760), (3, 990), (6, 1220)])
def test_every_evaluation_has_a_panel_and_the_page_grows_with_them(count, height):
    """Whatever it is called: nothing here knows an evaluation by name."""
    names = [f"eval/row{i}/figure" for i in range(count)]
    picture = loss_curves(evaluated(*names))
    assert picture.shape == (height, 1300, 3)
    panels = [near(panel, BLUE) > 100 for panel in panels_of(picture)]
    assert sum(panels) == count and panels[:count] == [True] * count


def panels_of(picture):
    """Those of evaluations, row by row, from the second row on; the last panel shows the speed."""
    top, bottom = 38, picture.shape[0] - 114
    rows = round((picture.shape[0] - 300) / 230) if picture.shape[0] > 760 else 2
    edges = np.linspace(top, bottom, rows + 1).round().astype(int)
    cut = [
        picture[edges[row] : edges[row + 1], column * 433 : (column + 1) * 433]
        for row in range(1, rows)
        for column in range(3)
    ]
    return cut[:-1]


def test_figures_without_an_error_are_drawn_where_they_are_asked_for():
    rows = [{"step": s, "eval/depth/rmse": s / 10, "eval/knn/cls_top1_k20": 0.5} for s in range(4)]
    assert not any(near(panel, BLUE) for panel in panels_of(loss_curves(rows)))
    picture = loss_curves(rows, headlines=("eval/depth/rmse",))
    assert [near(panel, BLUE) > 100 for panel in panels_of(picture)] == [True, False]
    picture = loss_curves(rows, headlines=("eval/absent/figure", "eval/depth/rmse"))
    assert [near(panel, BLUE) > 100 for panel in panels_of(picture)] == [False, True]


def test_a_repeated_step_counts_once_with_its_last_value():
    rows = rows_of(5) + [{"step": 3, "train/loss": 9.0}, {"step": 4, "train/loss": 8.0}]
    steps, values = curves.collect(rows)["train/loss"]
    assert steps.tolist() == [0, 1, 2, 3, 4]
    assert values[3:].tolist() == [9.0, 8.0]
    assert "step" not in curves.collect(rows)


def test_smoothing_follows_the_loss_and_ignores_what_is_not_finite():
    values = np.array([1.0, 1.0, np.nan, 1.0, np.inf, 1.0, 50.0, 1.0])
    at, medians = curves.smooth(values, 5)
    assert at.tolist() == list(range(8)) and medians.tolist() == [1.0] * 8
    assert np.isnan(curves.smooth(np.full(3, np.nan), 3)[1]).all()
    assert len(curves.smooth(np.ones(100_000), 2500)[0]) == 400


def test_a_step_that_is_not_finite_is_marked_in_red():
    red = (208, 28, 28)
    rows = rows_of(40)
    assert near(loss_curves(rows), red) == 0
    rows[20]["train/loss"] = float("nan")
    assert near(loss_curves(rows), red) > 5


def test_evaluations_and_their_baselines_are_drawn(tmp_path):
    rows = rows_of(20)
    for step in (0, 10, 19):
        rows[step] |= {"eval/probe/top1": 0.3 + step / 100, "eval/probe/top1_se": 0.02}
    plain = loss_curves(rows)
    picture = loss_curves(
        rows, tmp_path / "curves.png", {"raw pixels": {"eval/probe/top1": 0.35}}, "a run"
    )
    grey = (140, 140, 148)
    assert near(picture, grey) > near(plain, grey) + 100
    assert near(picture[390:], BLUE) > 200
    assert (tmp_path / "curves.png").stat().st_size > 10_000
