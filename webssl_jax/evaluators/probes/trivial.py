"""Trivial features: what a picture gives away before anything is learned."""

from __future__ import annotations

import numpy as np
from PIL import Image

THUMBNAIL = 16
COLOUR_BINS = 6
ROW_BYTES = 4 * (THUMBNAIL**2 * 3 + COLOUR_BINS**3)


def trivial_features(images: np.ndarray) -> dict[str, np.ndarray]:
    """{"raw pixels": (n, 768), "colour histogram": (n, 216)} float32 of images (n, H, W, 3)
    uint8."""
    return {"raw pixels": raw_pixels(images), "colour histogram": colour_histogram(images)}


def raw_pixels(images: np.ndarray, size: int = THUMBNAIL) -> np.ndarray:
    """Thumbnails (n, size * size * 3) in [-1, 1], averaged down with a box filter."""
    small = [
        np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BOX))
        for image in images
    ]
    return np.stack(small).reshape(len(images), -1).astype(np.float32) / 127.5 - 1


def colour_histogram(images: np.ndarray, bins: int = COLOUR_BINS) -> np.ndarray:
    """Square roots of the shares of pixels in each of bins^3 RGB cells, (n, bins^3).

    The square root (Hellinger) keeps a large flat background from drowning every other colour.
    """
    cells = images.reshape(len(images), -1, 3).astype(np.int32) * bins // 256
    index = (cells[..., 0] * bins + cells[..., 1]) * bins + cells[..., 2]
    counts = np.stack([np.bincount(row, minlength=bins**3) for row in index])
    return np.sqrt(counts / index.shape[1]).astype(np.float32)
