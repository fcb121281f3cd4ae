"""Figures of several groups of runs over the images they have seen, a panel for each figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from webssl_jax.visuals.axes import COLOURS, INK, add_bare_legend, dress, mark_level, png

# (x (n,), y (runs, n))
Curves = tuple[np.ndarray, np.ndarray]


def comparison(
    panels: Mapping[str, Mapping[str, Curves]], levels: Mapping[str, Sequence[tuple[str, float]]]
) -> np.ndarray:
    """:func:`draw` as a picture, (H, W, 3) uint8."""
    return png(draw(panels, levels))


def draw(
    panels: Mapping[str, Mapping[str, Curves]],
    levels: Mapping[str, Sequence[tuple[str, float]]],
    marker: str = "o",
    columns: int = 3,
) -> Figure:
    """Draws each run of a group thinly and their mean on top.

    Args:
      panels: {title: {group: (images seen (n,), shares (runs, n))}}. A group has one colour in all.
      levels: {title: [(name, share)]}, drawn as level lines.
      marker: of each value of a mean; "" for none. columns: panels beside each other, at most.
    """
    columns = min(len(panels), columns)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(6.2 * columns, 4.6 * rows), dpi=100)
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    names = list(dict.fromkeys(name for groups in panels.values() for name in groups))
    for axis, (title, groups) in zip(axes, panels.items()):
        axis.set_title(title, fontsize=11, loc="left")
        for name, (x, y) in groups.items():
            colour = COLOURS[names.index(name) % len(COLOURS)]
            axis.plot(x, y.T, color=colour, alpha=0.35, linewidth=0.9)
            style = f"{marker}-"
            axis.plot(x, y.mean(axis=0), style, color=colour, linewidth=2, markersize=4, label=name)
        for name, level in levels.get(title, ()):
            mark_level(axis, level, name)
        axis.set_xlabel("images seen", fontsize=9, color=INK, loc="right")
        last = max(max(float(x.max(initial=0)) for x, _ in groups.values()), 1.0)
        axis.set_xlim(-0.015 * last, 1.015 * last)
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        dress(axis, label_size=8)
    figure.tight_layout()
    canvas.draw()
    for axis in axes[: len(panels)]:
        add_bare_legend(axis, 9)
    return figure
