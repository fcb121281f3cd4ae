"""Held-out parts of the training images, with near-duplicates on one side.

What is chosen on images whose twins were trained on is chosen for memory: on the embedded corpus,
accuracy on a plain random fifth was 0.03 to 0.06 above that on the test set (whose near-duplicates
were removed) and favoured too weak penalties. With look-alikes kept together the two mostly agree
to 0.02.
"""

from __future__ import annotations

import numpy as np

from webssl_jax.evaluators.features import Table
from webssl_jax.evaluators.probes.trivial import THUMBNAIL

ALIKE = 0.85


def look_alikes(thumbnails: Table, labels: np.ndarray, threshold: float = ALIKE) -> np.ndarray:
    """Group numbers (n,) of images, by their thumbnails (n, 16 * 16 * 3) of ``trivial.raw_pixels``.

    Two images of one class are linked when their 16 x 16 thumbnails, or one and the other's mirror
    image, correlate above ``threshold``; groups are what links connect. Look-alikes of different
    classes give nothing away.
    """
    from scipy.sparse.csgraph import connected_components  # takes a fifth of a second to import

    groups, count = np.zeros(len(labels), np.int64), 0
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        plain = _unit(thumbnails[rows])
        square = plain.reshape(-1, THUMBNAIL, THUMBNAIL, 3)
        mirrored = square[:, :, ::-1].reshape(len(rows), -1)
        alike = np.maximum(plain @ plain.T, plain @ mirrored.T) > threshold
        found, members = connected_components(alike, directed=False)
        groups[rows] = members + count
        count += found
    return groups


def hold_out(
    labels: np.ndarray, groups: np.ndarray, share: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers (kept, held out): of each class about ``share``, in whole groups, from ``seed``
    alone.

    A class whose groups are all larger than its share stays whole. If that is so for every class (a
    few images, or all of them alike), nothing can be held out and both parts are all the images.
    """
    rng = np.random.default_rng(seed)
    held = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        room = min(round(share * len(rows)), len(rows) - 1)
        names, sizes = np.unique(groups[rows], return_counts=True)
        for i in rng.permutation(len(names)):
            if sizes[i] <= room:
                held[rows[groups[rows] == names[i]]] = True
                room -= sizes[i]
    if not held.any():
        return np.arange(len(labels)), np.arange(len(labels))
    return np.flatnonzero(~held), np.flatnonzero(held)


def _unit(x: np.ndarray) -> np.ndarray:
    x = x - x.mean(axis=1, keepdims=True)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-6)
