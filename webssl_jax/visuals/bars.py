"""Headline figures of several models side by side: a panel a figure, a bar a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from webssl_jax.visuals.axes import COLOURS, GREY, INK, dress, to_pixels

_ROW = 0.42  # inches a bar


class Bar(NamedTuple):
    """A figure and, where there is one, its standard error; trivial: of features that need no
    training."""

    name: str
    value: float
    se: float | None
    trivial: bool = False


class Panel(NamedTuple):
    """title: which figure. bars: in order, from above. chance: where it is known."""

    title: str
    bars: Sequence[Bar]
    chance: float | None = None


def bar_charts(panels: Sequence[Panel]) -> np.ndarray:
    """Panels one above the other.

    Returns:
      The picture, (H, W, 3) uint8.
    """
    sizes = [len(panel.bars) for panel in panels]
    height = _ROW * sum(sizes) + 0.9 * len(panels)
    figure = Figure(figsize=(8.5, height), dpi=100, facecolor="white", layout="constrained")
    canvas = FigureCanvasAgg(figure)
    parts = figure.subplots(len(panels), 1, squeeze=False, height_ratios=sizes).flat
    for axis, panel in zip(parts, panels):
        places = np.arange(len(panel.bars))
        values = [bar.value for bar in panel.bars]
        colours = [GREY if bar.trivial else COLOURS[0] for bar in panel.bars]
        errors = [2 * (bar.se or 0) for bar in panel.bars]
        axis.barh(places, values, xerr=errors, color=colours, height=0.7, ecolor=INK, capsize=3)
        for place, bar, error in zip(places, panel.bars, errors):
            beside = max(bar.value, 0) + error
            words = f" {bar.value:.3f}"
            axis.annotate(words, (beside, place), va="center", fontsize=8, color=INK)
        if panel.chance is not None:
            axis.axvline(panel.chance, color=COLOURS[1], linewidth=1, linestyle="--")
        chance = "" if panel.chance is None else f"; broken line: chance, {panel.chance:.3f}"
        axis.set_title(
            f"{panel.title} (lines: two standard errors{chance})", fontsize=9, loc="left"
        )
        axis.set_yticks(places, [bar.name for bar in panel.bars])
        axis.invert_yaxis()
        axis.margins(x=0.12)
        dress(axis, label_size=8)
        axis.grid(False, axis="y")
    return to_pixels(canvas)
