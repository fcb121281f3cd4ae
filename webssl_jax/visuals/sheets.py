"""Contact sheets: many images on one page, with captions; and what augmentation makes of them at
step 0."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from webssl_jax.visuals import drawing

_MAX_COLUMNS = 8  # of a crop sheet; few views leave room for several images side by side
_MIN_ROWS = 4


def image_grid(
    images: drawing.Images,
    columns: int,
    captions: Sequence[str] | None = None,
    title: str | None = None,
) -> np.ndarray:
    """A grid, filled row by row.

    Args:
      images: n images (H, W, 3) uint8, of any sizes.
      columns: images a row.
      captions: n texts, cut to the width of an image.

    Raises:
      ValueError: if there are no images, or not as many captions as images.
    """
    images = list(images)
    if not images or columns < 1:
        raise ValueError(f"{len(images)} images in {columns} columns: nothing to draw")
    if captions is not None and len(captions) != len(images):
        raise ValueError(f"{len(captions)} captions for {len(images)} images")
    columns = min(columns, len(images))
    rows = [images[i : i + columns] for i in range(0, len(images), columns)]
    texts = (
        [list(captions[i : i + columns]) for i in range(0, len(images), columns)]
        if captions is not None
        else ()
    )
    return drawing.table(rows, drawing.cell_size(images), captions=texts, title=title)


def crop_sheet(
    originals: drawing.Images,
    views: Mapping[str, drawing.Images] | drawing.Images,
    title: str | None = "What the network is shown: images and their random crops",
) -> np.ndarray:
    """Each image beside what augmentation makes of it. A wrong crop, colour or size is seen here
    first.

    Args:
      originals: n images (H, W, 3) uint8, of any sizes.
      views: {column name: n images}, for instance {"crop 1": (n, h, w, 3), ...}, or the n images of
        one column. All are drawn to one scale, so a small local crop looks small.

    Raises:
      ValueError: if a view does not have n images.
    """
    originals = list(originals)
    views = dict(views) if isinstance(views, Mapping) else {"crop": views}
    wrong = [name for name, images in views.items() if len(images) != len(originals)]
    if wrong or not originals:
        raise ValueError(f"{len(originals)} originals; not as many images in views {wrong}")
    side = max((max(image.shape[:2]) for images in views.values() for image in images), default=0)
    padded = {name: [_pad(image, side) for image in images] for name, images in views.items()}
    cell = drawing.cell_size([image for images in padded.values() for image in images] or originals)
    rows = [
        [original, *(images[i] for images in padded.values())]
        for i, original in enumerate(originals)
    ]
    groups = max(min(_MAX_COLUMNS // len(rows[0]), -(-len(rows) // _MIN_ROWS)), 1)
    cells, gaps = drawing.side_by_side(rows, groups)
    return drawing.table(
        cells, cell, heads=["original", *views] * groups, title=title, gap_after=gaps
    )


def _pad(image: np.ndarray, side: int) -> np.ndarray:
    """Centres ``image`` in a square of ``side`` pixels."""
    board = np.full((side, side, 3), drawing.MAT, np.uint8)
    height, width = image.shape[:2]
    top, left = (side - height) // 2, (side - width) // 2
    board[top : top + height, left : left + width] = image
    return board
