"""Is my run healthy? A page of small panels over the share of a run that is done, each with the
curve of a known run behind it, the region of an alarm shaded, and the alarms that were raised."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from webssl_jax.visuals.axes import COLOURS, INK, add_legend, dress, log_ticks, say_empty, to_pixels

_COLUMNS = 5
_REFERENCE, _SICK, _WELL = "#b9b9c2", "#d01c1c", "#2c8a57"
_LEGEND = "x: how much of the run is done · y: a share, of what stands at the right · red: alarms"
_MARGIN = 0.04  # of a scale of shares, so that a curve along 0 or 1 is drawn in full
_FLAT = 0.25  # a curve of shares that spans less is drawn enlarged


class Line(NamedTuple):
    """A curve y over x (percent of the run). raw: the (x, y) that it was smoothed from, drawn
    faintly."""

    label: str
    x: np.ndarray
    y: np.ndarray
    raw: tuple[np.ndarray, np.ndarray] | None = None


class Panel(NamedTuple):
    """reference: (x, y) of the known run. below, above: where an alarm's region begins. unit: what
    the scale means. log: a logarithmic scale where the values ask for it."""

    title: str
    lines: Sequence[Line]
    reference: tuple[np.ndarray, np.ndarray] | None = None
    below: float = -math.inf
    above: float = math.inf
    unit: str = ""
    log: bool = False


def health_figure(
    panels: Sequence[Panel],
    spans: Sequence[tuple[float, float]] = (),
    words: Sequence[str] = (),
    title: str = "",
) -> np.ndarray:
    """Draws the page.

    Args:
      spans: (from, to) in percent of the run, where an alarm was on.
      words: a sentence for each alarm; none means that there was none.

    Returns:
      The picture, (H, W, 3) uint8. It is higher for more panels and words.
    """
    rows = -(-len(panels) // _COLUMNS)
    lines = [line for text in words for line in textwrap.wrap(text, 205, subsequent_indent="  ")]
    head, body = 0.75 + 0.17 * max(len(lines), 1), 2.15 * rows
    height = head + body
    figure = Figure(figsize=(15, height), dpi=100, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    figure.text(0.03, 1 - 0.15 / height, title, fontsize=13, va="top")
    figure.text(0.99, 1 - 0.2 / height, _LEGEND, fontsize=8.5, va="top", ha="right", color=INK)
    figure.text(
        0.03,
        1 - 0.43 / height,
        "\n".join(lines) if lines else "No alarm.",
        fontsize=9.5,
        va="top",
        color=_SICK if lines else _WELL,
        linespacing=1.3,
    )
    axes = figure.subplots(
        rows,
        _COLUMNS,
        squeeze=False,
        gridspec_kw={
            "left": 0.035,
            "right": 0.99,
            "top": 1 - head / height,
            "bottom": 0.3 / height,
            "hspace": 0.42,
            "wspace": 0.27,
        },
    )
    for axis, panel in zip(axes.flat, panels):
        _draw(axis, panel, spans)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    return to_pixels(canvas)


def _draw(axis: Axes, panel: Panel, spans: Sequence[tuple[float, float]]) -> None:
    axis.set_title(panel.title, fontsize=10, loc="left", pad=4)
    if panel.unit:
        axis.set_title(panel.unit, fontsize=8, loc="right", pad=4, color=INK)
    if panel.reference:
        axis.plot(*panel.reference, color=_REFERENCE, linewidth=4, solid_capstyle="round")
    for i, line in enumerate(panel.lines):
        colour = COLOURS[i % len(COLOURS)]
        if line.raw:
            axis.plot(*line.raw, color=colour, alpha=0.25, linewidth=0.8)
        mark = "o" if np.isfinite(line.y).sum() < 3 else None
        axis.plot(
            line.x, line.y, color=colour, linewidth=1.5, marker=mark, markersize=3, label=line.label
        )
    _scale(axis, panel)
    low, high = axis.get_ylim()
    if panel.below > low:
        axis.axhspan(low, min(panel.below, high), color=_SICK, alpha=0.12, linewidth=0)
    if panel.above < high:
        axis.axhspan(max(panel.above, low), high, color=_SICK, alpha=0.12, linewidth=0)
    for start, end in spans:
        axis.axvspan(start, end, color=_SICK, alpha=0.06)
        axis.axvline(start, color=_SICK, linewidth=1)
    axis.set_ylim(low, high)  # as it was before the spans
    axis.set_xlim(-1.5, 101.5)
    axis.set_xticks([0, 25, 50, 75, 100], ["0", "25", "50", "75", "100 %"])
    dress(axis, label_size=8, grid_width=0.7)
    if any(line.label for line in panel.lines):
        add_legend(axis, 7.5, columns=1 if max(len(line.label) for line in panel.lines) > 20 else 2)
    if not panel.lines:
        say_empty(axis, "not logged", 9, INK)


def _scale(axis: Axes, panel: Panel) -> None:
    """Shares from 0 to 1, but a flat curve enlarged; else whatever holds the curves."""
    ys = [line.y for line in panel.lines]
    ys += [line.raw[1] for line in panel.lines if line.raw]
    ys += [panel.reference[1]] if panel.reference else []
    values = np.concatenate([np.asarray(y, float) for y in ys]) if ys else np.zeros(0)
    values = values[np.isfinite(values)]
    if not len(values):
        axis.set_ylim(0, 1)
        return
    if panel.log and values.min() > 0 and values.max() > 20 * values.min():
        axis.set_yscale("log")
        log_ticks(axis.yaxis)
        return
    low, high = float(values.min()), float(values.max())
    if panel.unit and high - low >= _FLAT:
        axis.set_ylim(min(0.0, low) - _MARGIN, max(1.0, high) + _MARGIN)
        return
    margin = 0.08 * (high - low) or 0.05 * abs(high) or 0.05
    axis.set_ylim(low - margin, high + margin)
