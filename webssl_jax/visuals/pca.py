"""Principal components of patch features as colours (Oquab et al., arXiv 2304.07193, section 7.5).

Where patches of different images get one colour, the network describes them alike. An image's own
first component usually tells the subject from the background; an analysis of the subjects' patches
alone, of all images together, colours their parts. Components are scaled to unit variance and +-2.3
standard deviations fill the range of a colour (CAPI's convention, arXiv 2502.08769).

Shape letters: n images, h x w patches each, D channels, k components.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from webssl_jax.visuals import drawing

_RANGE = 2.3  # standard deviations from the middle to the end of a colour
_TINY = 1e-10  # a component with less than this share of the variance is noise of the arithmetic
COLUMNS = ("image", "all images", "this image", "1st component", "foreground")


class Components(NamedTuple):
    """mean (D,); directions (k, D), unit vectors; variances (k,) along them; total variance."""

    mean: np.ndarray
    directions: np.ndarray
    variances: np.ndarray
    total: float

    def scores(self, x: np.ndarray) -> np.ndarray:
        """(..., D) -> (..., k), of unit variance over the data the components were found in. Along
        a direction without variance all scores are 0."""
        real = self.variances > _TINY * max(self.total, np.finfo(float).tiny)
        scale = np.where(real, 1 / np.sqrt(np.where(real, self.variances, 1.0)), 0.0)
        return (x.astype(np.float64) - self.mean) @ self.directions.T * scale

    def explained(self) -> float:
        """The share of the variance that the k components hold."""
        return float(self.variances.sum() / self.total) if self.total > 0 else 0.0


def principal_components(x: np.ndarray, k: int) -> Components:
    """The ``k`` directions of largest variance of (n, D) features, largest first.

    The right singular vectors of the centred features, by way of their smaller Gram matrix. A
    direction's sign means nothing; here its largest entry is positive, so that equal features give
    equal colours. Directions that do not exist (k above the rank) have variance 0.

    Raises:
      ValueError: if ``x`` is not (n, D) with n and D above 0, or not finite.
    """
    x = np.asarray(x, np.float64)
    if x.ndim != 2 or 0 in x.shape or not np.isfinite(x).all():
        raise ValueError(f"components of finite (n, D) features, not of {x.shape}")
    mean = x.mean(axis=0)
    centred, found = x - mean, min(k, *x.shape)
    tall = x.shape[0] >= x.shape[1]
    squares, vectors = np.linalg.eigh(centred.T @ centred if tall else centred @ centred.T)
    squares, vectors = np.maximum(squares[::-1], 0.0), vectors[:, ::-1]  # largest first
    directions = vectors[:, :found].T if tall else vectors[:, :found].T @ centred
    lengths = np.linalg.norm(directions, axis=1, keepdims=True)
    directions = np.divide(directions, lengths, where=lengths > 0, out=np.zeros_like(directions))
    largest = np.take_along_axis(directions, np.abs(directions).argmax(axis=1)[:, None], axis=1)
    directions *= np.where(largest < 0, -1.0, 1.0)
    missing = k - found
    return Components(
        mean,
        np.pad(directions, ((0, missing), (0, 0))),
        np.pad(squares[:found] / len(x), (0, missing)),
        float((centred**2).sum()) / len(x),
    )


def foreground_side(first: np.ndarray) -> int:
    """+1 or -1: the sign that the scores (h, w) of an image's first component have in its
    foreground.

    Of the two sides of zero, the mean patch, it is the one with fewer of the patches on the image's
    border: photographers put their subject in the middle. At a tie, the smaller side.
    """
    above = first > 0
    border = np.ones(first.shape, bool)
    border[1:-1, 1:-1] = False
    on_border = above[border].mean()
    share = above.mean() if on_border == 0.5 else on_border
    return 1 if share <= 0.5 else -1


def colours(scores: np.ndarray) -> np.ndarray:
    """Scores (..., 3) of unit variance -> uint8 red, green, blue; 0 is the middle."""
    return np.round(np.clip((scores / _RANGE + 1) / 2, 0, 1) * 255).astype(np.uint8)


def pca_sheet(
    images: drawing.Images, patches: np.ndarray, title: str = "PCA of patch features"
) -> np.ndarray:
    """One row an image: the first three components over all images, then over this image alone;
    the latter's first in grey, bright in the foreground; and the first three components of the
    foreground patches of all images.

    Args:
      images: n images (H, W, 3) uint8 of one size.
      patches: (n, h, w, D), their patch features.

    Raises:
      ValueError: if there are no images, or not as many as features.
    """
    images, patches = list(images), np.asarray(patches)
    if not images or len(images) != len(patches):
        raise ValueError(f"{len(images)} images with patch features of {len(patches)}")
    _, h, w, width = patches.shape
    flat = patches.reshape(-1, width)
    together = principal_components(flat, 3)
    own = [principal_components(image.reshape(-1, width), 3).scores(image) for image in patches]
    first = np.stack([foreground_side(scores[..., 0]) * scores[..., :1] for scores in own])
    front = first[..., 0] > 0
    front_colours = np.full((*front.shape, 3), drawing.MAT, np.uint8)
    if front.any():
        parts = principal_components(patches[front], 3)
        front_colours[front] = colours(parts.scores(patches[front]))
    rows = []
    for i, image in enumerate(images):
        maps = (
            colours(together.scores(patches[i])),
            colours(own[i]),
            colours(first[i].repeat(3, axis=-1)),
            front_colours[i],
        )
        rows.append([image, *(drawing.enlarge(m, *image.shape[:2]) for m in maps)])
    groups = 2 if len(rows) > 4 else 1
    cells, gaps = drawing.side_by_side(rows, groups)
    return drawing.table(
        cells,
        drawing.cell_size(images),
        heads=COLUMNS * groups,
        title=title,
        subtitle=f"{h} x {w} patches an image. Red, green and blue are the first three components: "
        f"of all images together (they hold {100 * together.explained():.0f} % of the variance), "
        "of the image alone, and of the foreground patches of all images. Foreground is the side "
        "of the image's own 1st component that touches its border less.",
        gap_after=gaps,
    )
