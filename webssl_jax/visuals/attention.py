"""Where the CLS token looks, head by head (Caron et al., arXiv 2104.14294, figures 1 and 3).

Shape letters: n images, k heads, h x w patches.
"""

from __future__ import annotations

import matplotlib
import numpy as np

from webssl_jax.visuals import drawing

MASS = 0.6  # of the attention on patches: DINO's threshold
HEADS_A_ROW = 8
_MAX_ROWS = 12
_MAX_CELL = 160  # pixels; a page holds many cells
_NARROW = 6  # columns; two images find room beside each other
_DIMMED = 0.22  # brightness of what lies outside of the mass
_HEAT = matplotlib.colormaps["magma"]
_Row = list[tuple[np.ndarray | None, str]]  # cells, each with its caption


def mass_mask(weights: np.ndarray, mass: float = MASS) -> np.ndarray:
    """The fewest patches that hold at least ``mass`` of the weights: (h, w) -> (h, w) bool."""
    flat = weights.ravel().astype(np.float64)
    order = np.argsort(-flat, kind="stable")
    before = np.cumsum(flat[order]) - flat[order]
    mask = np.zeros(flat.shape, bool)
    # a rounding error must not let in one patch more
    mask[order] = before < mass * flat.sum() * (1 - 1e-9)
    return mask.reshape(weights.shape)


def heat(weights: np.ndarray, height: int, width: int) -> np.ndarray:
    """(h, w) weights as a (height, width, 3) uint8 heat map: black is 0, the brightest the
    largest."""
    scaled = weights / max(float(weights.max()), np.finfo(np.float32).tiny)
    return drawing.enlarge((_HEAT(scaled)[..., :3] * 255).astype(np.uint8), height, width)


def overlay(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The image with everything outside of ``mask`` (h, w) in dim grey."""
    inside = drawing.enlarge(mask, *image.shape[:2])[:, :, None]
    grey = image.mean(axis=-1, keepdims=True) * _DIMMED
    return np.where(inside, image, np.round(grey)).astype(np.uint8)


def attention_sheet(
    images: drawing.Images,
    attention: np.ndarray,
    title: str = "Attention of the CLS token in the last block",
) -> np.ndarray:
    """For each image two rows, or several pairs where there are many heads: heat maps of the mean
    and of each head, and below them the patches that hold 60 % of it.

    Args:
      images: n images (H, W, 3) uint8 of one size. As many are drawn as make a readable page.
      attention: (n, k, h, w), each head's weights on patches; what is missing to 1 lies on CLS
        itself and on registers.

    Raises:
      ValueError: if there are no images, or not as many as attention maps.
    """
    images, attention = list(images), np.asarray(attention, np.float64)
    if not images or len(images) != len(attention):
        raise ValueError(f"{len(images)} images with attention maps of {len(attention)}")
    blocks = [_rows_of(image, maps) for image, maps in zip(images, attention)]
    height, columns = len(blocks[0]), len(blocks[0][0])
    groups = 2 if columns <= _NARROW and len(blocks) > 1 else 1
    blocks = blocks[: groups * max(_MAX_ROWS // height, 1)]
    deep = -(-len(blocks) // groups)  # images below each other
    empty: list[_Row] = [[(None, "")] * columns] * height
    blocks += [empty] * (groups * deep - len(blocks))
    rows = [
        [cell for group in range(groups) for cell in blocks[group * deep + i][r]]
        for i in range(deep)
        for r in range(height)
    ]
    return drawing.table(
        [[picture for picture, _ in row] for row in rows],
        _cell(max(images[0].shape[:2])),
        captions=[[text for _, text in row] for row in rows],
        title=title,
        subtitle="Upper rows: weights on patches, black is none and each map's largest is the "
        "brightest; the percentage is what patches get together, the rest stays on the CLS token "
        f"and registers. Lower rows: the fewest patches that hold {100 * MASS:.0f} % of it.",
        gap_after=[columns - 1] if groups > 1 else [],
    )


def _cell(side: int) -> int:
    return side * (_MAX_CELL // side) if side <= _MAX_CELL else _MAX_CELL


def _rows_of(image: np.ndarray, maps: np.ndarray) -> list[_Row]:
    """The cells of one image, each with its caption: rows of heat maps (the image and the mean of
    the heads before the first) alternate with rows of overlays."""
    named = [("mean of heads", maps.mean(axis=0))]
    named += [(f"head {head + 1}", weights) for head, weights in enumerate(maps)]
    first, rest = named[: 1 + HEADS_A_ROW], named[1 + HEADS_A_ROW :]
    lines = [first] + [rest[i : i + HEADS_A_ROW] for i in range(0, len(rest), HEADS_A_ROW)]
    rows: list[_Row] = []
    for number, line in enumerate(lines):
        left: _Row = [(image if number == 0 else None, "")] + [(None, "")] * (number > 0)
        right: _Row = [(None, "")] * (1 + len(first) - len(left) - len(line))
        rows.append(left + [(heat(w, *image.shape[:2]), "") for _, w in line] + right)
        masks = [
            (overlay(image, mass_mask(w)), f"{name}, {100 * w.sum():.0f} %") for name, w in line
        ]
        rows.append([(None, "")] * len(left) + masks + right)
    return rows
