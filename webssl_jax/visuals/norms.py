"""How long tokens are before the final norm. A few patches many times longer than the rest are
outliers: the network keeps something there that is not about the patch (Darcet et al., arXiv
2309.16588). They spoil attention maps, segmentation and depth; registers are the cure.

Shape letters: n images, h x w patches, R registers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from webssl_jax.visuals import drawing
from webssl_jax.visuals.axes import to_pixels

# An outlier is this many times as long as the median patch. In DINOv2-g patches lie around 50 and
# outliers above 150.
OUTLIER = 3.0
_SHOWN = 4
_PATCH, _CLS, _REGISTER, _GREY = "#1f5fa8", "#c8511b", "#2c8a57", "#55555c"


class Outlier(NamedTuple):
    """A patch by its place, counted from 0; ``norm`` and how many medians that is."""

    image: int
    row: int
    column: int
    norm: float
    times: float


def outliers(patches: np.ndarray, factor: float = OUTLIER) -> list[Outlier]:
    """The patches of (n, h, w) norms longer than ``factor`` medians, the longest first."""
    median = float(np.median(patches))
    places = np.argwhere(patches > factor * median)
    found = [
        Outlier(i, r, c, float(patches[i, r, c]), float(patches[i, r, c]) / median)
        for i, r, c in places.tolist()
    ]
    return sorted(found, key=lambda outlier: -outlier.norm)


def norm_figure(
    images: drawing.Images,
    cls: np.ndarray,
    registers: np.ndarray,
    patches: np.ndarray,
    names: Sequence[str] | None = None,
    title: str = "Token norms after the last block",
) -> np.ndarray:
    """A histogram of all tokens' norms, and maps of the images with the longest patches.

    Args:
      images: n images (H, W, 3) uint8. names: n texts to call them by; by default their numbers.
      cls: (n,). registers: (n, R), R may be 0. patches: (n, h, w).

    Returns:
      The picture, (H, W, 3) uint8.
    """
    names = [f"image {i}" for i in range(len(images))] if names is None else list(names)
    found, median = outliers(patches), float(np.median(patches))
    order = np.argsort(-patches.reshape(len(patches), -1).max(axis=1), kind="stable")[:_SHOWN]

    figure = Figure(figsize=(13, 6.2), dpi=100, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=14, x=0.05, ha="left", y=0.975)
    words = _in_words(found, median, patches.size, names)
    figure.text(0.05, 0.93, words, fontsize=10, color=_GREY, va="top")
    grid = figure.add_gridspec(
        2, 2 + _SHOWN, left=0.05, right=0.94, top=0.8, bottom=0.09, wspace=0.15, hspace=0.3
    )
    _histogram(figure.add_subplot(grid[:, :2]), cls, registers, patches, median)
    limits = float(patches[order].min()), float(patches.max())
    maps = []
    for column, i in enumerate(order):
        picture, heat = (figure.add_subplot(grid[row, 2 + column]) for row in (0, 1))
        picture.imshow(images[i])
        picture.set_title(_short(names[i]), fontsize=10)
        maps.append(heat.imshow(patches[i], cmap="magma", vmin=limits[0], vmax=limits[1]))
        r, c = np.unravel_index(patches[i].argmax(), patches[i].shape)
        heat.plot(c, r, "o", mfc="none", mec="#3fd0ff", markersize=9, markeredgewidth=1.6)
        heat.set_title(f"row {r}, column {c}: {patches[i, r, c]:.3g}", fontsize=10)
        for axis in (picture, heat):
            axis.set_xticks([])
            axis.set_yticks([])
    scale = figure.add_axes((0.952, 0.09, 0.011, 0.315))
    figure.colorbar(maps[0], cax=scale).ax.tick_params(labelsize=9)
    return to_pixels(canvas)


def _in_words(found: Sequence[Outlier], median: float, total: int, names: Sequence[str]) -> str:
    limit = f"{OUTLIER:g} times the median patch ({OUTLIER * median:.3g})"
    if not found:
        return f"No outliers: none of {total:,} patches is longer than {limit}."
    worst = "; ".join(
        f"{_short(names[o.image])} ({o.row}, {o.column}) {o.norm:.3g} = {o.times:.1f} medians"
        for o in found[:_SHOWN]
    )
    return (
        f"Outliers: {len(found):,} of {total:,} patches ({100 * len(found) / total:.2g} %) are "
        f"longer than {limit}. The longest:\n{worst}"
    )


def _short(name: str) -> str:
    return name if len(name) <= 24 else name[:21] + "..."


def _histogram(
    axis: Axes, cls: np.ndarray, registers: np.ndarray, patches: np.ndarray, median: float
) -> None:
    longest = max(float(values.max()) for values in (cls, registers, patches) if values.size)
    edges = np.linspace(0, 1.05 * longest, 61).tolist()
    for values, colour, name in (
        (patches, _PATCH, "patches"),
        (cls, _CLS, "CLS"),
        (registers, _REGISTER, "registers"),
    ):
        if values.size:
            label = f"{values.size:,} {name}, median {np.median(values):.3g}"
            axis.hist(values.ravel(), edges, color=colour, alpha=0.7, label=label)
    if longest > OUTLIER * median:
        limit = f"{OUTLIER:g} medians of patches"
        axis.axvline(OUTLIER * median, color=_GREY, linestyle="--", linewidth=1.3, label=limit)
    axis.set_yscale("log")
    axis.set_ylim(bottom=0.7)
    axis.set_xlim(0, edges[-1])
    axis.set_xlabel("norm", fontsize=10)
    axis.set_ylabel("tokens", fontsize=10)
    axis.tick_params(labelsize=9)
    axis.legend(
        fontsize=9,
        frameon=False,
        loc="lower left",
        bbox_to_anchor=(-0.03, 1.0),
        ncols=2,
        borderaxespad=0.2,
        handlelength=1.4,
        columnspacing=1.2,
    )
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
