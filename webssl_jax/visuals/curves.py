"""A run's curves on one page, from the rows of ``metrics.jsonl``."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from webssl_jax.visuals.axes import (
    COLOURS,
    GREY,
    INK,
    add_legend,
    dress,
    log_ticks,
    say_empty,
    to_pixels,
)
from webssl_jax.visuals.png import save_png

Curve = tuple[np.ndarray, np.ndarray]  # (steps, values)
_LINE_STYLES = (":", "--", "-.", (0, (6, 1, 1, 1, 1, 1)))


def loss_curves(
    rows: Iterable[Mapping[str, float]],
    path: str | os.PathLike | None = None,
    baselines: Mapping[str, Mapping[str, float]] | None = None,
    title: str | None = None,
    headlines: Sequence[str] | None = None,
) -> np.ndarray:
    """Loss, learning rate, gradient norm, speed and evaluations over steps.

    Steps that a resumed run repeated count once, with their last value. Values that are not finite
    are left out of the line and marked at the bottom of their panel. A panel without data says so.

    Args:
      rows: one mapping a logged step, with "step"; keys as the loop writes them (``train/loss``,
        ``optim/learning_rate``, ``optim/grad_norm``, ``eval/ROW/METRIC``).
      path: also save the picture there, as PNG.
      baselines: {"raw pixels": {"eval/probe/top1": 0.35, ...}, ...}: level lines in the evaluation
        panels.
      headlines: the evaluation's figures to draw, by their keys; None for all that have a standard
        error (``KEY_se``).

    Returns:
      The picture, (H, W, 3) uint8.
    """
    series = collect(rows)
    measured = [name for name in series if name.startswith("eval/") and f"{name}_se" in series]
    if headlines is not None:
        measured = list(headlines)
    lines = -(-(4 + max(len(measured), 2)) // 3)
    height = 3.0 + 2.3 * lines if lines > 2 else 7.6
    figure = Figure(figsize=(13, height), dpi=100, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(
        lines,
        3,
        gridspec_kw={
            "left": 0.05,
            "right": 0.985,
            "bottom": 1.14 / height,
            "wspace": 0.2,
            "top": 1 - (0.76 if title else 0.38) / height,
            "hspace": 0.46 if lines > 2 else 0.3,
        },
    )
    if title:
        figure.suptitle(title, fontsize=13, x=0.05, ha="left")
    _plot_loss(axes[0, 0], series.get("train/loss"))
    _plot_line(axes[0, 1], series.get("optim/learning_rate"), "learning rate", COLOURS[2])
    _plot_line(
        axes[0, 2],
        series.get("optim/grad_norm"),
        "gradient norm, before clipping",
        COLOURS[3],
        log=True,
    )
    rest = list(axes.flat[3:])
    _plot_line(
        rest.pop(), series.get("perf/images_per_s"), "images per second", COLOURS[4], from_zero=True
    )
    for axis, name in zip(rest, measured):
        words = name.removeprefix("eval/").replace("/", ", ").replace("_", " ")
        _plot_evaluation(axis, series, name, words, baselines or {})
    for axis in rest[len(measured) :]:
        axis.set_axis_off()
    last = max((steps[-1] for steps, _ in series.values()), default=1)
    for axis in axes.flat:
        if axis.axison:
            _dress(axis, last)
    picture = to_pixels(canvas)
    if path is not None:
        save_png(path, picture)
    return picture


def collect(rows: Iterable[Mapping[str, float]]) -> dict[str, Curve]:
    """{metric: (steps, values)}, by increasing step, the last row of a step winning for each
    metric."""
    table: dict[str, dict[int, float]] = {}
    for row in rows:
        for name, value in row.items():
            if name != "step" and isinstance(value, (int, float)):
                table.setdefault(name, {})[int(row["step"])] = float(value)
    return {
        name: (np.array(sorted(points)), np.array([points[step] for step in sorted(points)]))
        for name, points in table.items()
    }


def smooth(values: np.ndarray, window: int, points: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """Centred running median over ``window`` values (fewer at the ends), blind to those that are
    not finite.

    Returns (indices, medians) at ``points`` evenly spaced indices at most, so that a long run costs
    no more.
    """
    at = np.unique(np.linspace(0, len(values) - 1, min(points, len(values))).round().astype(int))
    out = np.full(len(at), np.nan)
    for i, centre in enumerate(at):
        near = values[max(centre - window // 2, 0) : centre + window // 2 + 1]
        near = near[np.isfinite(near)]
        if len(near):
            out[i] = np.median(near)
    return at, out


def _plot_loss(axis: Axes, series: Curve | None) -> None:
    axis.set_title("training loss", fontsize=11, loc="left")
    if series is None:
        return
    steps, values = series
    window = max(len(values) // 40, 1)
    if window < 3:
        _line(axis, steps, values, COLOURS[0])
    else:
        _line(axis, steps, values, COLOURS[0], alpha=0.25, linewidth=0.8)
        at, smoothed = smooth(values, window)
        _line(axis, steps[at], smoothed, COLOURS[0], mark_gaps=False)
    finite = values[np.isfinite(values)]
    if len(finite):
        axis.set_title(f"last {finite[-1]:.4g}", fontsize=10, loc="right", color=COLOURS[0])


def _plot_line(
    axis: Axes,
    series: Curve | None,
    title: str,
    colour: str,
    log: bool = False,
    from_zero: bool = False,
) -> None:
    axis.set_title(title, fontsize=11, loc="left")
    if series is None:
        return
    _line(axis, *series, colour)
    positive = series[1][np.isfinite(series[1]) & (series[1] > 0)]
    if log and len(positive) and positive.max() > 20 * positive.min():
        axis.set_yscale("log")
        log_ticks(axis.yaxis)
    if from_zero and len(positive):
        axis.set_ylim(0, 1.15 * positive.max())


def _plot_evaluation(
    axis: Axes,
    series: Mapping[str, Curve],
    key: str,
    title: str,
    baselines: Mapping[str, Mapping[str, float]],
) -> None:
    axis.set_title(title, fontsize=11, loc="left")
    if key not in series:
        return
    steps, values = series[key]
    errors = dict(zip(*series.get(f"{key}_se", ((), ())), strict=True))
    axis.errorbar(
        steps,
        values,
        [errors.get(step, 0.0) for step in steps],
        color=COLOURS[0],
        marker="o",
        markersize=4,
        linewidth=1.5,
        elinewidth=1,
        capsize=2,
        label="this run ± 1 standard error",
    )
    for i, (name, metrics) in enumerate(baselines.items()):
        if key in metrics:
            axis.axhline(
                metrics[key],
                color=GREY,
                linewidth=1.2,
                linestyle=_LINE_STYLES[i % len(_LINE_STYLES)],
                label=f"{name} {metrics[key]:.3f}",
            )
    axis.legend(
        fontsize=9,
        frameon=False,
        loc="upper left",
        bbox_to_anchor=(-0.03, -0.15),
        ncols=2,
        borderaxespad=0,
        handlelength=2.4,
        columnspacing=1.2,
    )


def _line(
    axis: Axes,
    steps: np.ndarray,
    values: np.ndarray,
    colour: str,
    mark_gaps: bool = True,
    alpha: float = 1.0,
    linewidth: float = 1.5,
) -> None:
    finite = np.isfinite(values)
    axis.plot(
        steps,
        np.where(finite, values, np.nan),
        color=colour,
        alpha=alpha,
        linewidth=linewidth,
        marker="o" if finite.sum() < 3 else None,
        markersize=4,
    )
    if mark_gaps and not finite.all():
        axis.plot(
            steps[~finite],
            np.full((~finite).sum(), 0.02),
            "x",
            color="#d01c1c",
            markersize=5,
            transform=axis.get_xaxis_transform(),
            label="not finite",
            clip_on=False,
        )


def _dress(axis: Axes, last: int) -> None:
    axis.set_xlim(-0.015 * max(last, 1), 1.015 * max(last, 1))
    axis.set_xlabel("step", fontsize=9, color=INK, loc="right", labelpad=1)
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    dress(axis, label_size=9)
    if axis.get_legend() is None:
        add_legend(axis, 8)
    if not axis.lines:
        say_empty(axis, "nothing logged yet", 10, GREY)
        axis.set_yticks([])
