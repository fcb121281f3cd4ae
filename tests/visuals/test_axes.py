"""What every figure shares: nothing is cut off, no legend lies on a curve, one typeface."""

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from webssl_jax.visuals import comparison, drawing, scaling
from webssl_jax.visuals.axes import add_legend
from webssl_jax.visuals.health import Line, Panel, health_figure

BLUE = (31, 95, 168)


@pytest.mark.parametrize("scale", ["linear", "log"])
def test_a_legend_lies_above_all_curves(scale):
    figure = Figure(figsize=(3, 2), dpi=100)
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for i in range(4):
        axis.plot([0, 1], [1, 100], label=f"line {i}")
    axis.set_yscale(scale)
    add_legend(axis, 8)
    renderer = figure.canvas.get_renderer()
    box = axis.get_legend().get_window_extent(renderer)
    assert box.y0 > axis.transData.transform((0, 100))[1] + 1
    assert box.y1 <= axis.get_window_extent(renderer).y1


def test_a_curve_along_the_end_of_its_scale_is_drawn_in_full():
    def blue(low, high):
        y = np.array([low] * 50 + [np.nan] + [high] * 50)
        picture = health_figure([Panel("", [Line("", np.linspace(0, 100, 101), y)], unit="1 = 2")])
        return int((np.abs(picture.astype(int) - np.array(BLUE)).max(-1) < 60).sum())

    assert blue(0.0, 1.0) == pytest.approx(blue(0.2, 0.8), rel=0.2)  # not the half of it


def test_runs_of_no_step_have_an_axis_of_different_numbers():
    (axis,) = comparison.draw({"top1": {"mae": (np.zeros(1), np.array([[0.3]]))}}, {}).axes
    low, high = axis.get_xlim()
    ticks = zip(axis.get_xticks(), axis.get_xticklabels(), strict=True)
    assert [label.get_text() for at, label in ticks if low <= at <= high] == ["0", "1"]


def test_sheets_and_curves_have_one_typeface():
    family = drawing.font(14).getname()[0]
    assert family == matplotlib.rcParamsDefault["font.sans-serif"][0]


def test_names_of_levels_stand_apart_beside_the_frame_and_inside_the_figure():
    points = scaling.Points(np.array([1.0, 10.0]), [np.array([0.1]), np.array([0.2])])
    levels = [("one", 0.1), ("the same", 0.1), ("a little above", 0.101), ("far off", 0.5)]
    figure = scaling.draw([scaling.Panel("title", "x", {"runs": points}, levels)])
    (axis,) = figure.axes
    boxes = sorted((text.get_window_extent() for text in axis.texts), key=lambda box: box.y0)
    assert len(boxes) == 4 and all(a.y1 <= b.y0 for a, b in zip(boxes, boxes[1:], strict=False))
    frame = axis.get_window_extent()
    assert all(frame.x1 <= box.x0 and box.x1 <= figure.bbox.x1 for box in boxes)
