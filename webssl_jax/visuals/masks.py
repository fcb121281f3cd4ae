"""Segmentations: what a head said beside the truth, in the data set's colours; a bar a class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from webssl_jax.visuals import drawing
from webssl_jax.visuals.axes import dress, mark_level, to_pixels

_SIDE = 256  # pixels of the longer side
_UNKNOWN = 255  # the number of a pixel without a class
NO_CLASS = (170, 170, 178)
_SWATCH, _LEGEND_COLUMNS, _LEGEND_MOST = 14, 5, 40


class Segmented(NamedTuple):
    """image (H, W, 3) uint8; truth and predicted (H, W) uint8; score, in words."""

    image: np.ndarray
    truth: np.ndarray
    predicted: np.ndarray
    score: str


def small(image: np.ndarray, truth: np.ndarray, predicted: np.ndarray, score: str) -> Segmented:
    """At most 256 pixels a side, so that many may be kept."""
    image, truth, predicted = drawing.shrunk(_SIDE, image, truth, predicted)
    return Segmented(image, truth, predicted, score)


def sheet(
    shown: Sequence[Segmented], names: Sequence[str], colours: np.ndarray, title: str
) -> np.ndarray:
    """Rows of image, truth and prediction, two side by side, and the names of their colours.

    colours: (256, 3) uint8.
    """
    rows = []
    for one in shown:
        unknown = one.truth == _UNKNOWN
        truth, predicted = colours[one.truth], colours[one.predicted]
        truth[unknown] = NO_CLASS
        rows.append([one.image, truth, predicted])
    groups = min(2, len(rows))
    cells, gaps = drawing.side_by_side(rows, groups)
    height = len(cells)
    captions = [
        [text for group in range(groups) for text in ("", "", _score(shown, group * height + row))]
        for row in range(height)
    ]
    board = drawing.table(
        cells,
        _SIDE,
        ("image", "truth", "prediction") * groups,
        captions,
        title,
        gaps,
        "Grey: pixels without a class, which are not judged.",
    )
    seen = np.zeros(256, np.int64)
    for one in shown:
        known = one.truth != _UNKNOWN
        seen += np.bincount(one.truth[known], minlength=256)
        seen += np.bincount(one.predicted[known], minlength=256)
    order = [i for i in np.argsort(-seen, kind="stable")[:_LEGEND_MOST] if seen[i]]
    return np.concatenate([board, legend([(names[i], colours[i]) for i in order], board.shape[1])])


def bars(
    names: Sequence[str], iou: np.ndarray, colours: np.ndarray, miou: float, of: str
) -> np.ndarray:
    """A bar a class, the best first, and a line at their mean. iou (C,); nan: the class does not
    occur, and has no bar."""
    order = [i for i in np.argsort(-np.nan_to_num(iou, nan=-1), kind="stable") if iou[i] >= 0]
    figure = Figure(figsize=(min(3 + 0.16 * len(order), 26), 4.2), dpi=110, layout="constrained")
    axis = figure.subplots()
    dress(axis, 8)
    axis.bar(range(len(order)), iou[order], color=colours[order] / 255, edgecolor="#b5b5bc", lw=0.4)
    axis.set_xticks(range(len(order)), [names[i] for i in order], rotation=90, fontsize=7)
    axis.set_xlim(-0.7, len(order) - 0.3)
    axis.set_ylim(0, 1)
    axis.grid(False, axis="x")
    mark_level(axis, miou, f"mean {miou:.3f}")
    axis.set_title(f"IoU of each class; {of}", fontsize=10, loc="left")
    canvas = FigureCanvasAgg(figure)
    return to_pixels(canvas)


def _score(shown: Sequence[Segmented], place: int) -> str:
    return f"IoU {shown[place].score}" if place < len(shown) else ""


def legend(entries: Sequence[tuple[str, np.ndarray]], width: int) -> np.ndarray:
    """(H, width, 3) uint8: names beside their colours."""
    columns = min(_LEGEND_COLUMNS, max(len(entries), 1))
    step = (width - 2 * drawing.MARGIN) // columns
    lines = -(-len(entries) // columns)
    height = lines * (_SWATCH + 6) + drawing.MARGIN
    board = Image.new("RGB", (width, height), drawing.PAPER)
    draw = ImageDraw.Draw(board)
    for i, (name, colour) in enumerate(entries):
        x = drawing.MARGIN + (i % columns) * step
        y = (i // columns) * (_SWATCH + 6)
        fill = tuple(int(c) for c in colour)
        draw.rectangle((x, y, x + _SWATCH, y + _SWATCH), fill=fill, outline=drawing.FAINT_INK)
        text = drawing.shorten(name, step - _SWATCH - 12, drawing.LABEL_SIZE - 1)
        draw.text((x + _SWATCH + 6, y - 1), text, drawing.INK, drawing.font(drawing.LABEL_SIZE - 1))
    return np.asarray(board)
