"""Differences with their intervals, one below the other, beside a line at zero."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from webssl_jax.visuals.axes import COLOURS, GREY, INK, dress

# (value, low, high)
Interval = tuple[float, float, float]


def draw(panels: Mapping[str, Mapping[str, Interval]]) -> Figure:
    """{what is measured, with its unit: {name: interval}}, a panel each, in one column. An interval
    that holds zero is grey."""
    sizes = [len(rows) for rows in panels.values()]
    figure = Figure(figsize=(9.3, 0.32 * sum(sizes) + 1.0 * len(sizes)), dpi=100)
    FigureCanvasAgg(figure)
    ratios = [size + 1 for size in sizes]
    axes = figure.subplots(len(panels), 1, squeeze=False, gridspec_kw={"height_ratios": ratios})
    for axis, (title, rows) in zip(axes.flat, panels.items(), strict=True):
        for place, (value, low, high) in enumerate(rows.values()):
            colour = GREY if low <= 0 <= high else COLOURS[0]
            axis.plot([low, high], [place, place], color=colour, linewidth=2)
            axis.plot([value], [place], "o", color=colour, ms=6)
        axis.axvline(0, color=INK, linewidth=1)
        axis.set_yticks(range(len(rows)), list(rows))
        axis.set_ylim(len(rows) - 0.4, -0.6)
        axis.set_xlabel(title, fontsize=9, color=INK, loc="right")
        dress(axis, label_size=9)
    figure.tight_layout()
    return figure
