"""The drawing board under the sheets: a table of image cells with labels, in Pillow, without global
state."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Images = Sequence[np.ndarray] | np.ndarray  # n of (H, W, 3) uint8, perhaps as one array

PAPER = (246, 246, 248)  # not white: many images are, and their edges must show
INK = (30, 30, 34)
FAINT_INK = (95, 95, 102)
MAT = (228, 228, 233)  # fills the cell around an image that is not square

MARGIN = 12
GAP = 6
LABEL_SIZE = 14
TITLE_SIZE = 19
SUBTITLE_SIZE = 14
FRAME = 3  # thickness of a coloured frame
MIN_CELL = 120
MAX_CELL = 256


@functools.cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """The face of the curves: matplotlib brings the file, so that pictures look the same on every
    machine. It is wider than most, hence a size less."""
    import matplotlib  # takes as long as all else here

    path = pathlib.Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    return ImageFont.truetype(str(path), size - 1, layout_engine=ImageFont.Layout.BASIC)


def shorten(text: str, width: int, size: int) -> str:
    """``text`` on one line, cut with an ellipsis to ``width`` pixels."""
    text = " ".join(str(text).split())
    if font(size).getlength(text) <= width:
        return text
    low, high = 0, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        if font(size).getlength(text[:middle].rstrip() + "...") <= width:
            low = middle
        else:
            high = middle - 1
    return text[:low].rstrip() + "..."


def wrap(text: str, width: int, size: int) -> list[str]:
    """``text`` in lines of at most ``width`` pixels, broken between words; a longer word is cut."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font(size).getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(shorten(word, width, size))
    return lines


def enlarge(tokens: np.ndarray, height: int, width: int) -> np.ndarray:
    """One colour or number a patch, (h, w, ...) -> (height, width, ...), every patch a flat
    rectangle: what the network said, and no detail that it did not."""
    rows = np.arange(height) * tokens.shape[0] // height
    columns = np.arange(width) * tokens.shape[1] // width
    return tokens[rows][:, columns]


def shrunk(side: int, image: np.ndarray, *maps: np.ndarray) -> list[np.ndarray]:
    """An image (H, W, 3) uint8 and maps (h, w) that lie over it, as large as the maps, with at most
    ``side`` pixels a side, so that many may be kept. Of maps no values are mixed."""
    height, width = maps[0].shape
    scale = min(side / max(height, width), 1)
    size = max(round(width * scale), 1), max(round(height * scale), 1)
    pictures = [Image.fromarray(image).resize(size, Image.Resampling.BOX)]
    pictures += [Image.fromarray(x).resize(size, Image.Resampling.NEAREST) for x in maps]
    return [np.asarray(picture) for picture in pictures]


def cell_size(images: Images) -> int:
    """Side of a cell in pixels: the largest image, enlarged by a whole factor when tiny, at most
    256."""
    side = max(max(image.shape[:2]) for image in images)
    if side < MIN_CELL:
        side *= -(-MIN_CELL // side)
    return min(side, MAX_CELL)


def fit(image: np.ndarray, cell: int) -> Image.Image:
    """One image centred in a square cell. Small ones grow by a whole factor, pixel by pixel
    (nearest), so that what the network sees is what is shown; large ones shrink with antialiasing.

    Raises:
      ValueError: if ``image`` is not (H, W, 3) uint8.
    """
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"an image is (H, W, 3) uint8, not {image.shape} {image.dtype}")
    height, width = image.shape[:2]
    picture = Image.fromarray(image)
    factor = cell // max(height, width)
    if factor >= 1:
        picture = picture.resize((width * factor, height * factor), Image.Resampling.NEAREST)
    else:
        scale = cell / max(height, width)
        size = max(round(width * scale), 1), max(round(height * scale), 1)
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    board = Image.new("RGB", (cell, cell), MAT)
    board.paste(picture, ((cell - picture.width) // 2, (cell - picture.height) // 2))
    return board


def side_by_side(
    rows: Sequence[Sequence[np.ndarray]], groups: int
) -> tuple[list[list[np.ndarray | None]], list[int]]:
    """Folds a tall table into ``groups`` side by side, each read downwards: (rows for
    :func:`table`, its ``gap_after``)."""
    columns, height = len(rows[0]), -(-len(rows) // groups)
    empty: list[np.ndarray | None] = [None] * columns
    filled = [*rows, *[empty] * (height * groups - len(rows))]
    folded = [
        [image for group in range(groups) for image in filled[group * height + r]]
        for r in range(height)
    ]
    return folded, [group * columns - 1 for group in range(1, groups)]


def table(
    cells: Sequence[Sequence[np.ndarray | None]],
    cell: int,
    heads: Sequence[str] = (),
    captions: Sequence[Sequence[str]] = (),
    title: str | None = None,
    gap_after: Sequence[int] = (),
    subtitle: str | None = None,
    frames: Sequence[Sequence[tuple[int, int, int] | None]] = (),
) -> np.ndarray:
    """Draws rows of image cells.

    Args:
      cells: rows of (H, W, 3) uint8 images or None for an empty place.
      cell: side of a cell in pixels.
      heads: one label a column, above it.
      captions: one text a cell, below it; a row without any takes no room for them.
      title: a line above everything.
      gap_after: columns after which a wider gap separates groups.
      subtitle: what the reader must know, below the title; wrapped to the width of the table.
      frames: a colour or None for each cell, drawn around the image.

    Returns:
      The picture, (H, W, 3) uint8.
    """
    columns = max(len(row) for row in cells)
    lefts, x = [], MARGIN
    for column in range(columns):
        lefts.append(x)
        x += cell + (4 * GAP if column in gap_after else GAP)
    width = lefts[-1] + cell + MARGIN
    lines = wrap(subtitle, width - 2 * MARGIN, SUBTITLE_SIZE) if subtitle else []
    below_title = MARGIN + (TITLE_SIZE + 10 if title else 0)
    top = below_title + len(lines) * (SUBTITLE_SIZE + 5) + (4 if lines else 0)
    top += LABEL_SIZE + 7 if heads else 0
    tops, y = [], top
    for r in range(len(cells)):
        tops.append(y)
        y += cell + GAP + (LABEL_SIZE + 5 if captions and any(captions[r]) else 0)
    board = Image.new("RGB", (width, y - GAP + MARGIN), PAPER)
    draw = ImageDraw.Draw(board)
    if title:
        draw.text(
            (MARGIN, MARGIN - 2),
            shorten(title, width - 2 * MARGIN, TITLE_SIZE),
            INK,
            font(TITLE_SIZE),
        )
    for i, line in enumerate(lines):
        at = MARGIN, below_title - 3 + i * (SUBTITLE_SIZE + 5)
        draw.text(at, line, FAINT_INK, font(SUBTITLE_SIZE))
    for left, head in zip(lefts, heads, strict=False):
        text = shorten(head, cell, LABEL_SIZE)
        draw.text((left + cell / 2, top - 6), text, INK, font(LABEL_SIZE), anchor="ms")
    for r, row in enumerate(cells):
        for c, image in enumerate(row):
            if image is None:
                continue
            at = lefts[c], tops[r]
            board.paste(fit(image, cell), at)
            if frames and frames[r][c]:
                corner = at[0] + cell - 1, at[1] + cell - 1
                draw.rectangle((*at, *corner), outline=frames[r][c], width=FRAME)
            if captions:
                text = shorten(captions[r][c], cell, LABEL_SIZE - 1)
                draw.text((at[0], at[1] + cell + 2), text, FAINT_INK, font(LABEL_SIZE - 1))
    return np.asarray(board)
