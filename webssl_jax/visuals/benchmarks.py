"""Several models on many benchmarks in categories: as a radar of all, and as bars by category."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.projections.polar import PolarAxes

from webssl_jax.visuals.axes import COLOURS, GREY, INK, dress, to_pixels

# (value, low, high), in percent
Figures = Mapping[str, Mapping[str, tuple[float, float, float]]]


def radar(
    models: Mapping[str, Mapping[str, float]], categories: Mapping[str, Sequence[str]], title: str
) -> np.ndarray:
    """One spoke a benchmark, from 0 in the middle to 100 percent.

    Args:
      models: {name: {benchmark: percent}}; a benchmark without a figure leaves a gap.
      categories: {name: its benchmarks}, which stand side by side on a ground of their own.

    Returns:
      The picture, (H, W, 3) uint8.
    """
    spokes = [name for names in categories.values() for name in names]
    angles = 2 * np.pi * np.arange(len(spokes)) / len(spokes)
    figure = Figure(figsize=(9, 8.6), dpi=100, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    axis = figure.add_axes((0.13, 0.09, 0.74, 0.74), projection="polar")
    assert isinstance(axis, PolarAxes)
    axis.set_theta_offset(np.pi / 2)
    axis.set_theta_direction(-1)
    _ground(axis, categories, len(spokes))
    for place, (name, figures) in enumerate(models.items()):
        values = np.array([figures.get(spoke, np.nan) for spoke in spokes])
        ring = [*range(len(spokes)), 0]
        colour = COLOURS[place % len(COLOURS)]
        axis.plot(angles[ring], values[ring], "o-", color=colour, lw=1.8, ms=3.5, label=name)
    axis.set_xticks(angles, spokes, fontsize=9, color=INK)
    axis.tick_params(axis="x", pad=10)
    axis.set_ylim(0, 100)
    axis.set_yticks([20, 40, 60, 80, 100])
    axis.set_yticklabels([f"{level}" for level in (20, 40, 60, 80, 100)], fontsize=7, color=GREY)
    axis.set_rlabel_position(180 / len(spokes))  # between the first two spokes
    axis.grid(color="#dcdce2", linewidth=0.7)
    axis.spines["polar"].set_visible(False)
    figure.text(0.03, 0.965, title, fontsize=12, color="black")
    figure.legend(
        *axis.get_legend_handles_labels(),
        loc="upper left",
        bbox_to_anchor=(0.02, 0.955),
        ncols=min(len(models), 3),
        fontsize=9,
        frameon=False,
    )
    return to_pixels(canvas)


def _ground(axis: PolarAxes, categories: Mapping[str, Sequence[str]], spokes: int) -> None:
    """A wedge behind the spokes of a category, with its name at the rim."""
    first = 0
    for place, (name, members) in enumerate(categories.items()):
        middle = 2 * np.pi * (first + (len(members) - 1) / 2) / spokes
        width = 2 * np.pi * len(members) / spokes
        shade = "#f3f3f7" if place % 2 else "#e9edf5"
        axis.bar(middle, 100, width=width, color=shade, zorder=0, linewidth=0)
        side = "left" if np.sin(middle) > 0 else "right"
        axis.text(middle, 121, name, ha=side, va="center", fontsize=10, color="black")
        first += len(members)


def bars(models: Figures, groups: Mapping[str, str], title: str) -> np.ndarray:
    """A group of bars a category, one bar a model, with its interval.

    Args:
      models: {name: {group: (percent, low, high)}}; what a model lacks stays empty.
      groups: {group: as it is called below the bars}.

    Returns:
      The picture, (H, W, 3) uint8.
    """
    figure = Figure(figsize=(max(1.6 * len(groups) + 2, 7), 4.8), dpi=100, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    axis = figure.subplots()
    dress(axis, label_size=9)
    axis.grid(False, axis="x")
    width = 0.8 / len(models)
    for place, (name, figures) in enumerate(models.items()):
        there = [(x, figures[group]) for x, group in enumerate(groups) if group in figures]
        x = np.array([at for at, _ in there]) + (place - (len(models) - 1) / 2) * width
        value, low, high = np.array([found for _, found in there]).reshape(-1, 3).T
        colour = COLOURS[place % len(COLOURS)]
        axis.bar(x, value, width * 0.92, color=colour, label=name)
        spread = np.maximum([value - low, high - value], 0)
        axis.errorbar(x, value, spread, fmt="none", ecolor=INK, elinewidth=1, capsize=2)
        if len(models) * len(groups) <= 24:
            for at, top, figure_there in zip(x, high, value):
                axis.annotate(
                    f"{figure_there:.1f}",
                    (at, top),
                    (0, 2),
                    textcoords="offset points",
                    ha="center",
                    fontsize=7.5,
                    color=INK,
                )
    axis.set_xticks(range(len(groups)), list(groups.values()), fontsize=10, color=INK)
    axis.set_ylabel("percent", fontsize=9, color=INK)
    axis.set_title(title, fontsize=11, loc="left", pad=28)
    axis.legend(
        loc="lower left",
        bbox_to_anchor=(-0.01, 1.0),
        ncols=min(len(models), 4),
        fontsize=9,
        frameon=False,
    )
    figure.tight_layout()
    return to_pixels(canvas)
