"""Images and texts in one space: how alike all are to all, and what each finds first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from PIL import Image, ImageDraw

from webssl_jax.visuals import drawing
from webssl_jax.visuals.neighbours import OTHER, SAME

_CELLS = 44, 102  # least and largest side of a cell of the heat map
_TEXT = 13
_LINE = _TEXT + 6
_BLOCK = 620  # width of a block of the sheets; two stand side by side
_WHITE = (255, 255, 255)
_Block = Callable[[ImageDraw.ImageDraw, Image.Image, int, int, int], None]
_MAP = matplotlib.colormaps["viridis"]


class FedText(NamedTuple):
    """A caption; the text of each of its tokens; how many more were cut off at the end."""

    caption: str
    tokens: tuple[str, ...]
    cut: int = 0


def fed_sheet(
    images: drawing.Images, crops: drawing.Images, texts: Sequence[FedText]
) -> np.ndarray:
    """Each image beside the crop and the text that the network is given in its place.

    Args:
      images, crops: n images (H, W, 3) uint8. texts: n texts.
    """
    cell = 140
    left = 2 * (cell + drawing.GAP) + drawing.GAP
    room = _BLOCK - left

    def block(draw: ImageDraw.ImageDraw, board: Image.Image, x: int, y: int, i: int) -> None:
        board.paste(drawing.fit(images[i], cell), (x, y))
        board.paste(drawing.fit(crops[i], cell), (x + cell + drawing.GAP, y))
        caption, tokens, cut = texts[i]
        lines = [(line, drawing.INK) for line in _clip_lines(caption or "(no caption)", room, 3)]
        head = f"{len(tokens)} tokens" + f", {cut} more are cut off" * bool(cut)
        shown = _clip_lines(" · ".join(tokens), room, cell // _LINE - len(lines) - 1)
        lines.append((head + ":" * bool(tokens), OTHER if cut else drawing.FAINT_INK))
        lines += [(line, drawing.FAINT_INK) for line in shown]
        for line, colour in lines:
            draw.text((x + left, y), line, colour, drawing.font(_TEXT))
            y += _LINE

    return _sheet(
        len(images),
        cell,
        block,
        "What the network is shown: images, their random crops, and the caption that was drawn",
        "Below each caption its tokens, as the network gets them, with dots between.",
    )


def similarity_sheet(
    images: drawing.Images, texts: Sequence[str], cosines: np.ndarray, own: np.ndarray, title: str
) -> np.ndarray:
    """A heat map, one row a text, one column an image. Right pairs have a frame.

    Args:
      images: n images (H, W, 3) uint8. texts: m texts.
      cosines: (m, n). own: (m, n) bool, which pairs are right.
    """
    low, high = float(cosines.min()), float(cosines.max())
    best = [
        int(own[np.arange(len(own)), cosines.argmax(axis=1)].sum()),
        int(own[cosines.argmax(axis=0), np.arange(own.shape[1])].sum()),
    ]
    subtitle = (
        f"Cosines from {low:.2f} (dark) to {high:.2f} (bright). White frames: what belongs "
        f"together. It is the brightest of its row for {best[0]} of {len(texts)} texts, of its "
        f"column for {best[1]} of {len(images)} images."
    )
    cell, left = min(max(1600 // len(images), _CELLS[0]), _CELLS[1]), 300
    width = 2 * drawing.MARGIN + left + len(images) * cell
    height = (len(texts) + 1) * cell + drawing.GAP
    board, draw, top = _board(width, height, title, subtitle)
    for column, image in enumerate(images):
        at = drawing.MARGIN + left + column * cell
        board.paste(drawing.fit(image, cell - drawing.GAP), (at, top))
    top += cell + drawing.GAP
    for row, text in enumerate(texts):
        lines = _clip_lines(text, left - 2 * drawing.GAP, cell // _LINE)
        y = top + row * cell + (cell - len(lines) * _LINE) // 2
        for i, line in enumerate(lines):
            draw.text((drawing.MARGIN, y + i * _LINE), line, drawing.INK, drawing.font(_TEXT))
        for column in range(len(images)):
            value = float(cosines[row, column])
            share = (value - low) / max(high - low, 1e-9)
            corner = drawing.MARGIN + left + column * cell, top + row * cell
            box = (*corner, corner[0] + cell - 2, corner[1] + cell - 2)
            colour = tuple(int(255 * x) for x in _MAP(share)[:3])
            frame = _WHITE if own[row, column] else colour
            draw.rectangle(box, fill=colour, outline=frame, width=drawing.FRAME)
            middle = corner[0] + cell / 2 - 1, corner[1] + cell / 2 - 1
            ink = drawing.INK if share > 0.55 else _WHITE
            number = f"{round(value, 2) + 0.0:.2f}"  # never -0.00
            draw.text(middle, number, ink, drawing.font(min(cell // 4, 16)), anchor="mm")
    return np.asarray(board)


def texts_sheet(
    images: drawing.Images,
    found: Sequence[Sequence[tuple[str, float, bool]]],
    missed: Sequence[tuple[str, float, int] | None],
    title: str,
    subtitle: str,
) -> np.ndarray:
    """Each image with the texts closest to it.

    Args:
      found: for each image (text, cosine, whether it is the image's own), closest first.
      missed: where none of them is its own, (its own closest text, cosine, place); else None.
    """
    lines = max(map(len, found)) + 1
    cell = lines * _LINE

    def block(draw: ImageDraw.ImageDraw, board: Image.Image, x: int, y: int, i: int) -> None:
        board.paste(drawing.fit(images[i], cell), (x, y))
        x += cell + 2 * drawing.GAP
        room = _BLOCK - cell - 2 * drawing.GAP
        rows = [(f"{cosine:.3f}", text, SAME if own else None) for text, cosine, own in found[i]]
        if miss := missed[i]:
            rows.append((f"{miss[1]:.3f}", f"(place {miss[2]:,}) {miss[0]}", OTHER))
        for cosine, text, colour in rows:
            draw.text((x, y), cosine, drawing.FAINT_INK, drawing.font(_TEXT))
            line = drawing.shorten(text, room - 48, _TEXT)
            draw.text((x + 44, y), line, colour or drawing.INK, drawing.font(_TEXT))
            y += _LINE

    return _sheet(len(images), cell, block, title, subtitle)


def images_sheet(
    texts: Sequence[str],
    found: Sequence[Sequence[tuple[np.ndarray, float, bool]]],
    title: str,
    subtitle: str,
) -> np.ndarray:
    """Each text with the images closest to it: ``found`` has for each (image, cosine, whether it is
    the text's own), closest first. The text's own have a green frame."""
    columns = max(map(len, found))
    cell = (_BLOCK - (columns - 1) * drawing.GAP) // columns

    def block(draw: ImageDraw.ImageDraw, board: Image.Image, x: int, y: int, i: int) -> None:
        line = drawing.shorten(texts[i], _BLOCK, _TEXT + 1)
        draw.text((x, y), line, drawing.INK, drawing.font(_TEXT + 1))
        y += _LINE + 2
        for column, (image, cosine, own) in enumerate(found[i]):
            at = x + column * (cell + drawing.GAP), y
            board.paste(drawing.fit(image, cell), at)
            if own:
                corner = at[0] + cell - 1, at[1] + cell - 1
                draw.rectangle((*at, *corner), outline=SAME, width=drawing.FRAME)
            below = at[0], at[1] + cell + 2
            draw.text(below, f"{cosine:.3f}", drawing.FAINT_INK, drawing.font(_TEXT))

    return _sheet(len(texts), cell + 2 * _LINE + 2, block, title, subtitle)


def _sheet(count: int, height: int, block: _Block, title: str, subtitle: str) -> np.ndarray:
    """``count`` blocks in two columns, read downwards; ``block(draw, board, x, y, i)`` draws
    one."""
    columns = min(2, count)
    rows = -(-count // columns)
    gap = 3 * drawing.GAP
    width = 2 * drawing.MARGIN + columns * _BLOCK + (columns - 1) * gap
    board, draw, top = _board(width, rows * (height + gap) - gap, title, subtitle)
    for i in range(count):
        x = drawing.MARGIN + (i // rows) * (_BLOCK + gap)
        block(draw, board, x, top + (i % rows) * (height + gap), i)
    return np.asarray(board)


def _board(
    width: int, height: int, title: str, subtitle: str
) -> tuple[Image.Image, ImageDraw.ImageDraw, int]:
    """An empty page with its title, and where its ``height`` of content begins."""
    room = width - 2 * drawing.MARGIN
    lines = drawing.wrap(subtitle, room, drawing.SUBTITLE_SIZE)
    step = drawing.SUBTITLE_SIZE + 5
    below = drawing.MARGIN + drawing.TITLE_SIZE + 10
    top = below + len(lines) * step + 6
    board = Image.new("RGB", (width, top + height + drawing.MARGIN), drawing.PAPER)
    draw = ImageDraw.Draw(board)
    title = drawing.shorten(title, room, drawing.TITLE_SIZE)
    at = drawing.MARGIN, drawing.MARGIN - 2
    draw.text(at, title, drawing.INK, drawing.font(drawing.TITLE_SIZE))
    for i, line in enumerate(lines):
        at = drawing.MARGIN, below - 3 + i * step
        draw.text(at, line, drawing.FAINT_INK, drawing.font(drawing.SUBTITLE_SIZE))
    return board, draw, top


def _clip_lines(text: str, width: int, most: int) -> list[str]:
    """At most ``most`` lines; the last says by dots that there was more."""
    lines = drawing.wrap(text, width, _TEXT)
    if len(lines) > most:
        lines = [*lines[: most - 1], drawing.shorten(" ".join(lines[most - 1 :]), width, _TEXT)]
    return lines
