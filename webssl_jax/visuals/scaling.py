"""Figures of cells over their size or the images they saw: every run, the means, a line through
them, and the levels they stand beside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from webssl_jax.visuals.axes import COLOURS, INK, add_bare_legend, dress, log_ticks, mark_level

_COLUMNS = 2


class Points(NamedTuple):
    """x: (n,) of cells. y: a figure of each run of each. line: (a, b) of a + b log10 x, or None."""

    x: np.ndarray
    y: Sequence[np.ndarray]
    line: tuple[float, float] | None = None


class Panel(NamedTuple):
    """title; x_label; groups: {name: points}; levels: [(name, figure)]."""

    title: str
    x_label: str
    groups: Mapping[str, Points]
    levels: Sequence[tuple[str, float]] = ()


def draw(panels: Sequence[Panel]) -> Figure:
    """Two panels a row; a group has one colour in all of them."""
    columns = min(len(panels), _COLUMNS)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(6.2 * columns, 4.4 * rows), dpi=100)
    canvas = FigureCanvasAgg(figure)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    names = list(dict.fromkeys(name for panel in panels for name in panel.groups))
    for axis, panel in zip(axes, panels, strict=False):
        axis.set_xscale("log")
        for name, (x, y, line) in panel.groups.items():
            colour = COLOURS[names.index(name) % len(COLOURS)]
            for place, figures in zip(x, y, strict=True):
                axis.plot(np.full(len(figures), place), figures, "o", color=colour, alpha=0.4, ms=4)
            means = [float(np.mean(figures)) for figures in y]
            axis.plot(x, means, "o", color=colour, ms=7, label=name)
            if line is not None:
                ends = np.array([x.min(), x.max()])
                axis.plot(ends, line[0] + line[1] * np.log10(ends), color=colour, linewidth=1.5)
        for name, level in panel.levels:
            mark_level(axis, level, name)
        axis.set_title(panel.title, fontsize=11, loc="left")
        axis.set_xlabel(panel.x_label, fontsize=9, color=INK, loc="right")
        axis.margins(x=0.08, y=0.1)
        log_ticks(axis.xaxis)
        dress(axis, label_size=8)
    figure.tight_layout()
    canvas.draw()
    for axis in axes[: len(panels)]:
        add_bare_legend(axis, 9)
    return figure
