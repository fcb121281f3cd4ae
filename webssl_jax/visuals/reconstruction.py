"""What a masked autoencoder saw, what it made of it, and what was there (MAE paper, figures 2 and
3)."""

from __future__ import annotations

import numpy as np

from webssl_jax.visuals import drawing

COLUMNS = ("image", "masked", "predicted", "pasted")


def panel(
    images: drawing.Images,
    masked: drawing.Images,
    predicted: drawing.Images,
    pasted: drawing.Images,
    title: str | None = None,
) -> np.ndarray:
    """Rows of image | masked | predicted | pasted; more than four go into two groups side by side.

    Args:
      images: (n, H, W, 3) uint8. masked: hidden patches greyed out. predicted: the decoder's output
        everywhere.
      pasted: prediction in the hidden places, the true image elsewhere.

    Raises:
      ValueError: if the four do not have the same number of images, or none.
    """
    rows = list(zip(images, masked, predicted, pasted, strict=True))
    if not rows:
        raise ValueError("no images to draw")
    groups = 2 if len(rows) > 4 else 1
    cells, gaps = drawing.side_by_side(rows, groups)
    return drawing.table(
        cells, drawing.cell_size(list(images)), heads=COLUMNS * groups, title=title, gap_after=gaps
    )
