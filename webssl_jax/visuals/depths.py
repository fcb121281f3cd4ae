"""Depth: what a head said beside the truth, in one scale of colours, and where it is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from PIL import Image, ImageDraw

from webssl_jax.visuals import drawing

_SIDE = 256  # pixels of the longer side
_DEPTHS, _ERRORS = matplotlib.colormaps["viridis_r"], matplotlib.colormaps["coolwarm"]
_BAR = 16  # height of a colour bar
UNKNOWN = (170, 170, 178)


class Predicted(NamedTuple):
    """image (H, W, 3) uint8; truth (0 where unknown) and predicted (H, W), metres; score, in
    words."""

    image: np.ndarray
    truth: np.ndarray
    predicted: np.ndarray
    score: str


def small(image: np.ndarray, truth: np.ndarray, predicted: np.ndarray, score: str) -> Predicted:
    """At most 256 pixels a side, so that many may be kept."""
    maps = truth.astype(np.float32), predicted.astype(np.float32)
    image, truth, predicted = drawing.shrunk(_SIDE, image, *maps)
    return Predicted(image, truth, predicted, score)


def sheet(shown: Sequence[Predicted], high: float, title: str) -> np.ndarray:
    """Rows of image, truth, prediction and error, and two colour bars. The scales end at the 98th
    percentile of what is shown, and at ``high`` metres at most."""
    known = [one.truth > 0 for one in shown]
    depths = np.concatenate([one.truth[there] for one, there in zip(shown, known)])
    gaps = [np.where(there, one.predicted - one.truth, 0) for one, there in zip(shown, known)]
    far = min(float(np.percentile(depths, 98)), high) if depths.size else high
    off = max(float(np.percentile(np.abs(np.concatenate([x.ravel() for x in gaps])), 98)), 0.01)
    cells, captions = [], []
    for one, there, gap in zip(shown, known, gaps):
        truth = _colour(_DEPTHS, one.truth / far)
        error = _colour(_ERRORS, (gap / off + 1) / 2)
        truth[~there], error[~there] = UNKNOWN, UNKNOWN
        cells.append([one.image, truth, _colour(_DEPTHS, one.predicted / far), error])
        captions.append(["", "", f"RMSE {one.score}", ""])
    heads = ("image", "truth", "prediction", "prediction - truth")
    subtitle = "Grey: pixels without a depth."
    board = drawing.table(cells, _SIDE, heads, captions, title, subtitle=subtitle)
    return np.concatenate([board, _bars(board.shape[1], far, off)])


def _bars(width: int, far: float, off: float) -> np.ndarray:
    """Depths below the first half, errors below the second."""
    board = Image.new("RGB", (width, _BAR + 34), drawing.PAPER)
    draw = ImageDraw.Draw(board)
    room = (width - 4 * drawing.MARGIN) // 2
    ramp = np.linspace(0, 1, room)[None].repeat(_BAR, axis=0)
    for x, map_, low, end in (
        (drawing.MARGIN, _DEPTHS, 0.0, far),
        (3 * drawing.MARGIN + room, _ERRORS, -off, off),
    ):
        board.paste(Image.fromarray(_colour(map_, ramp)), (x, 2))
        for share, anchor in ((0, "la"), (0.25, "ma"), (0.5, "ma"), (0.75, "ma"), (1, "ra")):
            at = x + share * room, _BAR + 8
            text = f"{low + share * (end - low):.2g} m"
            draw.text(at, text, drawing.FAINT_INK, drawing.font(drawing.LABEL_SIZE), anchor=anchor)
    return np.asarray(board)


def _colour(map_: matplotlib.colors.Colormap, shares: np.ndarray) -> np.ndarray:
    """(H, W) in 0 ... 1, which is kept within -> (H, W, 3) uint8."""
    return (map_(np.clip(shares, 0, 1))[..., :3] * 255).astype(np.uint8)
