"""Sliding windows: an image of any size seen through windows of one size, so that the network
compiles once, and their logits put together again.

The originals enlarge the logits of each window to pixels, add them up on a canvas of the resized
image, divide by how many windows saw a pixel, and resize the canvas to the image's own size. Each
of these steps is linear and works on rows and columns apart, so all together are two matrices, one
for rows and one for columns, and no canvas is needed: at 150 classes and three times 640 pixels it
would have 3 GB.

Shape letters: n x m windows, t tokens a side of a window, H x W pixels of the image, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

_TILE = 128  # pixels a side that are put together at a time


def spans(length: int, crop: int, stride: int) -> list[tuple[int, int]]:
    """Where the windows of an axis begin and end, as mmsegmentation lays them: the last one is
    moved back to the edge.

    Raises:
      ValueError: if the axis is shorter than a window.
    """
    if length < crop:
        raise ValueError(f"{length} pixels are less than a window of {crop}")
    ends = [min(i * stride + crop, length) for i in range(-(-(length - crop) // stride) + 1)]
    return [(end - crop, end) for end in ends]


def interpolation(size: int, out: int) -> np.ndarray:
    """(out, size) float64: the matrix of PyTorch's bilinear resizing of one axis,
    ``align_corners=False``."""
    place = np.clip((np.arange(out) + 0.5) * size / out - 0.5, 0, size - 1)
    low = np.floor(place).astype(int)
    high = np.minimum(low + 1, size - 1)
    matrix = np.zeros((out, size))
    np.add.at(matrix, (np.arange(out), low), 1 - (place - low))
    np.add.at(matrix, (np.arange(out), high), place - low)
    return matrix


def assembly(length: int, crop: int, stride: int, tokens: int, out: int) -> np.ndarray:
    """(out, windows * tokens) float32: from the tokens of all windows of an axis of ``length``
    pixels to ``out`` pixels."""
    own = interpolation(tokens, crop)
    places = spans(length, crop, stride)
    canvas = np.zeros((length, len(places) * tokens))
    seen = np.zeros(length)
    for i, (start, end) in enumerate(places):
        canvas[start:end, i * tokens : (i + 1) * tokens] = own
        seen[start:end] += 1
    canvas /= seen[:, None]
    return (interpolation(length, out) @ canvas).astype(np.float32)


def cut(image: np.ndarray, crop: int, stride: int) -> np.ndarray:
    """(n, m, crop, crop, 3) of an image (H, W, 3)."""
    rows, columns = (spans(side, crop, stride) for side in image.shape[:2])
    return np.stack([np.stack([image[y0:y1, x0:x1] for x0, x1 in columns]) for y0, y1 in rows])


def joined(windows: np.ndarray) -> np.ndarray:
    """Logits of windows (n, m, t, t, C) as :func:`assemble` takes them, (n t, m t, C)."""
    n, m, t, _, classes = windows.shape
    return windows.transpose(0, 2, 1, 3, 4).reshape(n * t, m * t, classes)


def assemble(logits: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """rows (H, p) and columns (W, q), or parts of them, applied to logits (p, q, C): (H, W, C)."""
    there = [np.flatnonzero(part.any(axis=0)) for part in (rows, columns)]
    low, high = zip(*((x[0], x[-1] + 1) for x in there))
    inner = logits[low[0] : high[0], low[1] : high[1]]
    down = np.tensordot(rows[:, low[0] : high[0]], inner, axes=1)
    return np.matmul(columns[:, low[1] : high[1]], down)


def tiles(height: int, width: int) -> Iterator[tuple[slice, slice]]:
    """Parts of an image that are put together at a time, so that memory does not grow with it."""
    for y in range(0, height, _TILE):
        for x in range(0, width, _TILE):
            yield slice(y, min(y + _TILE, height)), slice(x, min(x + _TILE, width))
