"""Trivial features: what a picture gives away before anything is learned.

A model's figure says nothing alone. Always guessing the commonest class, comparing thumbnails pixel
by pixel and comparing colours go through the same k-NN and the same probe, so that their figures
stand beside the model's.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

THUMBNAIL = 16
COLOUR_BINS = 6


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


def majority(train_labels: np.ndarray, test_labels: np.ndarray) -> np.ndarray:
    """(n_test,) bool: which test items are right when the commonest training class is always
    guessed."""
    return np.asarray(test_labels) == np.bincount(train_labels).argmax()
