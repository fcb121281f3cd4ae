"""Which layers of two networks agree: a heat map over all pairs of them."""

from __future__ import annotations

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from webssl_jax.visuals.axes import INK, to_pixels


def layer_map(scores: np.ndarray, texts: str, title: str) -> np.ndarray:
    """A row a block of the encoder, a column a layer of the language model; the best has a frame.

    Args:
      scores: (L, M), of blocks 1 ... L and layers 0 ... M - 1. texts: what the columns are.

    Returns:
      The picture, (H, W, 3) uint8.
    """
    rows, columns = scores.shape
    size = max(5.0, 2 + 0.24 * columns), max(3.0, 1.5 + 0.24 * rows)
    figure = Figure(figsize=size, dpi=100, facecolor="white", layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axis = figure.subplots()
    extent = (-0.5, columns - 0.5, 0.5, rows + 0.5)
    shown = axis.imshow(scores, "viridis", origin="lower", aspect="auto", extent=extent)
    bar = figure.colorbar(shown, ax=axis, pad=0.02)
    bar.ax.tick_params(labelsize=8, colors=INK)
    bar.outline.set_visible(False)
    best = np.unravel_index(scores.argmax(), scores.shape)
    corner = best[1] - 0.5, best[0] + 0.5
    axis.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="#d03030", linewidth=2))
    words = f"best {scores.max():.3f}: block {best[0] + 1}, layer {best[1]}"
    axis.set_title(f"{title}\n{words}", fontsize=10, loc="left")
    axis.set_xlabel(texts, fontsize=9, color=INK)
    axis.set_ylabel("block of the encoder", fontsize=9, color=INK)
    for part in (axis.xaxis, axis.yaxis):
        part.set_major_locator(MaxNLocator(12, integer=True, min_n_ticks=1))
    axis.tick_params(labelsize=8, colors=INK, length=3)
    for spine in axis.spines.values():
        spine.set_visible(False)
    return to_pixels(canvas)
