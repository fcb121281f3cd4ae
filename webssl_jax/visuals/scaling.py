"""Figures of cells over their size or the images they saw: every run, the means, a line through
them, and the levels they stand beside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from webssl_jax.visuals.axes import COLOURS, GREY, INK, add_bare_legend, dress, log_ticks

_COLUMNS = 2
_NAME_PIXELS = 12  # from one name of a level to the next


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
    texts: list[list[Text]] = []
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
        texts.append([_mark(axis, level, name) for name, level in panel.levels])
        axis.set_title(panel.title, fontsize=11, loc="left")
        axis.set_xlabel(panel.x_label, fontsize=9, color=INK, loc="right")
        axis.margins(x=0.08, y=0.1)
        log_ticks(axis.xaxis)
        dress(axis, label_size=8)
    figure.tight_layout()
    canvas.draw()
    for axis, own in zip(axes, texts, strict=False):
        add_bare_legend(axis, 9)
        _spread(axis, own)
    return figure


def _mark(axis: Axes, level: float, name: str) -> Text:
    """A broken line across the axis, with its name at the right of the frame, where no point is."""
    axis.axhline(level, color=GREY, linewidth=1, linestyle="--")
    place = axis.get_yaxis_transform()
    return axis.text(1.01, level, name, transform=place, va="center", fontsize=8, color=INK)


def _spread(axis: Axes, texts: Sequence[Text]) -> None:
    """Moves names upwards that would be drawn over the one below."""
    lowest = -np.inf
    for text in sorted(texts, key=lambda text: text.get_position()[1]):
        height = axis.transData.transform((1, text.get_position()[1]))[1]
        lowest = max(height, lowest + _NAME_PIXELS)
        text.set_y(axis.transData.inverted().transform((0, lowest))[1])
