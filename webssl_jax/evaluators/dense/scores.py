"""Figures of dense predictions: areas and mean IoU of classes, errors of depth. On the host, in
numpy.

Shape letters: n images, H x W pixels, C classes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from webssl_jax.data.dense_views import IGNORE


class Areas(NamedTuple):
    """Pixels a class, each (C,) or (n, C) int64: where prediction and truth agree, what is
    predicted, and what is true; pixels without a truth are left out of all."""

    both: np.ndarray
    predicted: np.ndarray
    true: np.ndarray

    @property
    def union(self) -> np.ndarray:
        """Pixels of the one or the other."""
        return self.predicted + self.true - self.both


def areas(predicted: np.ndarray, truth: np.ndarray, classes: int) -> Areas:
    """Of one image: (H, W) integers below ``classes``; a truth of 255 is none."""
    known = truth != IGNORE
    p, t = predicted[known].astype(np.int64), truth[known].astype(np.int64)
    counts = (np.bincount(x, minlength=classes) for x in (p[p == t], p, t))
    return Areas(*counts)


class Segmented(NamedTuple):
    """iou (C,), nan where a class is neither predicted nor true. miou: their mean without nan; of
    the areas of all images together, not a mean over images. accuracy: share of right pixels.
    mean_accuracy: mean over the true classes of the share of their pixels that is right. influence
    (n,): see :func:`segmented`."""

    iou: np.ndarray
    miou: float
    accuracy: float
    mean_accuracy: float
    influence: np.ndarray


def segmented(found: Areas) -> Segmented:
    """Figures of the areas (n, C) of n images.

    ``influence`` makes a mean of what is none: its mean over images is ``miou``, and its standard
    deviation over sqrt(n) is the standard error of ``miou`` over images (the infinitesimal
    jackknife: with image i weighed 1 + e the figure moves by e (influence_i - miou) / n). So two
    models are compared image by image as with any other figure.
    """
    n = len(found.both)
    both, union, true = (x.sum(axis=0) for x in (found.both, found.union, found.true))
    with np.errstate(invalid="ignore", divide="ignore"):
        iou, recall = both / union, both / true
    there = union > 0
    slope = (found.both - iou * found.union)[:, there] / union[there]
    miou = float(iou[there].mean())
    return Segmented(
        iou,
        miou,
        float(both.sum() / true.sum()),
        float(recall[true > 0].mean()),
        miou + n * slope.mean(axis=1),
    )


# Of each image; the figure of a set is the mean over its images.
DEPTH_FIGURES = (
    *("rmse", "abs_rel", "sq_rel", "log10", "rmse_log", "silog"),
    *("delta1", "delta2", "delta3"),
)


def depth_errors(predicted: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """{:data:`DEPTH_FIGURES`} of depths (k,) in metres at the pixels that count, all above 0.

    rmse and rmse_log are roots of mean squares of the differences and of their logarithms; abs_rel,
    sq_rel: over the truth; log10: mean absolute; silog: 100 std of the log differences; deltaK: the
    share of pixels with a ratio below 1.25^K either way.
    """
    p, t = predicted.astype(np.float64), truth.astype(np.float64)
    gap, logs = p - t, np.log(p) - np.log(t)
    ratio = np.maximum(p / t, t / p)
    return {
        "rmse": float(np.sqrt((gap**2).mean())),
        "abs_rel": float((np.abs(gap) / t).mean()),
        "sq_rel": float((gap**2 / t).mean()),
        "log10": float(np.abs(np.log10(p) - np.log10(t)).mean()),
        "rmse_log": float(np.sqrt((logs**2).mean())),
        "silog": float(100 * np.sqrt(max((logs**2).mean() - logs.mean() ** 2, 0))),
        **{f"delta{k}": float((ratio < 1.25**k).mean()) for k in (1, 2, 3)},
    }
