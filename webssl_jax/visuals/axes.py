"""How the axes of all curves look."""

from __future__ import annotations

import io

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

COLOURS = ("#1f5fa8", "#c8511b", "#2c8a57", "#8a4fa3", "#b8860b", "#3a8fa0")
INK, GREY = "#55555c", "#8c8c94"
GRID, FRAME = "#e6e6ea", "#b5b5bc"


def dress(axis: Axes, label_size: float, grid_width: float = 0.8) -> None:
    """A light grid behind the curves, and no frame above and to the right of them."""
    axis.tick_params(labelsize=label_size, colors=INK, length=3)
    axis.grid(True, color=GRID, linewidth=grid_width)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_color(FRAME)


def add_legend(axis: Axes, size: float, columns: int = 1) -> None:
    """A legend at the top of the frame; the scale is extended upwards, so that no curve runs
    through it. None where nothing has a name. Call it when all is drawn and laid out."""
    if not axis.get_legend_handles_labels()[0]:
        return
    legend = axis.legend(
        fontsize=size,
        edgecolor="none",
        framealpha=0.8,
        loc="upper left",
        ncols=columns,
        borderpad=0.1,
        borderaxespad=0.2,
        handlelength=1.4,
        labelspacing=0.2,
        columnspacing=1.0,
    )
    assert axis.figure is not None
    canvas = axis.figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    height = legend.get_window_extent(canvas.get_renderer()).height
    share = min(height / axis.get_window_extent().height + 0.04, 0.6)
    scale, (low, high) = axis.yaxis.get_transform(), axis.get_ylim()
    bottom, top = scale.transform([low, high])
    above = scale.inverted().transform([bottom + (top - bottom) / (1 - share)])[0]
    axis.set_ylim(low, above)


def add_bare_legend(axis: Axes, size: float) -> None:
    """A legend without a frame, which would be white on any ground."""
    add_legend(axis, size)
    if legend := axis.get_legend():
        legend.set_frame_on(False)


def log_ticks(part: Axis) -> None:
    """Plain numbers on a logarithmic axis, also where it spans less than a decade."""
    part.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=6))
    part.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 1000 else f"{value:.3g}")
    part.set_minor_locator(NullLocator())


def mark_level(axis: Axes, level: float, name: str) -> None:
    """A broken line across the axis at ``level``, with its name above its right end."""
    axis.axhline(level, color=GREY, linewidth=1, linestyle="--")
    axis.annotate(
        name,
        (0.99, level),
        xycoords=("axes fraction", "data"),
        ha="right",
        va="bottom",
        fontsize=8,
        color=GREY,
    )


def to_pixels(canvas: FigureCanvasAgg) -> np.ndarray:
    """Draws a figure: (H, W, 3) uint8."""
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def say_empty(axis: Axes, words: str, size: float, colour: str) -> None:
    """``words`` in the middle of an axis that has no curve."""
    axis.text(
        0.5,
        0.5,
        words,
        transform=axis.transAxes,
        ha="center",
        va="center",
        color=colour,
        fontsize=size,
    )


def png(figure: Figure) -> np.ndarray:
    """(H, W, 3) uint8, on white."""
    figure.set_facecolor("white")
    return to_pixels(FigureCanvasAgg(figure))


def svg(figure: Figure) -> str:
    """For a page of either theme, without a ground: its ink is the colour of the text around it,
    its grid the variable ``--line`` of the page."""
    text = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "webssl_jax"}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    whole = text.getvalue()[text.getvalue().index("<svg") :]
    for colour in (INK, "#000000"):
        whole = whole.replace(colour, "currentColor")
    for colour in (GRID, FRAME):
        whole = whole.replace(colour, "var(--line)")
    return whole
