"""Questions about images, what a model answered, and whether that is right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from webssl_jax.visuals import drawing

RIGHT, WRONG, PARTLY = (44, 138, 87), (208, 72, 44), (184, 134, 11)

_SIDE = 176  # of an image
_TEXT = 340  # width of the words beside it
_SIZE = 13
_LINE = _SIZE + 4
_QUESTION_LINES, _ANSWER_LINES = 5, 3


class Shown(NamedTuple):
    """image (H, W, 3) uint8, or None; verdict: 0 (wrong) to 1 (right)."""

    image: np.ndarray | None
    question: str
    answer: str
    truth: str
    verdict: float


def sheet(shown: Sequence[Shown], title: str, subtitle: str = "", columns: int = 2) -> np.ndarray:
    """Cards, filled row by row: the image in a frame that is green where the answer is right, red
    where it is wrong and yellow in between; beside it question, answer and truth.

    Returns:
      The picture, (H, W, 3) uint8.

    Raises:
      ValueError: if there is nothing to show.
    """
    if not shown:
        raise ValueError("no question to draw")
    columns = min(columns, len(shown))
    card = _SIDE + _TEXT + 3 * drawing.GAP
    width = 2 * drawing.MARGIN + columns * card
    lines = drawing.wrap(subtitle, width - 2 * drawing.MARGIN, drawing.SUBTITLE_SIZE)
    top = drawing.MARGIN + drawing.TITLE_SIZE + 10 + len(lines) * (drawing.SUBTITLE_SIZE + 5) + 4
    rows = -(-len(shown) // columns)
    height = top + rows * (_SIDE + 2 * drawing.GAP) + drawing.MARGIN
    board = Image.new("RGB", (width, height), drawing.PAPER)
    draw = ImageDraw.Draw(board)
    head = drawing.shorten(title, width - 2 * drawing.MARGIN, drawing.TITLE_SIZE)
    at = drawing.MARGIN, drawing.MARGIN - 2
    draw.text(at, head, drawing.INK, drawing.font(drawing.TITLE_SIZE))
    for number, line in enumerate(lines):
        y = drawing.MARGIN + drawing.TITLE_SIZE + 7 + number * (drawing.SUBTITLE_SIZE + 5)
        draw.text((drawing.MARGIN, y), line, drawing.FAINT_INK, drawing.font(drawing.SUBTITLE_SIZE))
    for place, one in enumerate(shown):
        row, column = divmod(place, columns)
        left = drawing.MARGIN + column * card
        _draw_card(board, draw, (left, top + row * (_SIDE + 2 * drawing.GAP)), one)
    return np.asarray(board)


def _draw_card(
    board: Image.Image, draw: ImageDraw.ImageDraw, at: tuple[int, int], one: Shown
) -> None:
    x, y = at
    colour = RIGHT if one.verdict >= 1 else WRONG if one.verdict <= 0 else PARTLY
    if one.image is not None:
        board.paste(drawing.fit(one.image, _SIDE), at)
    draw.rectangle((x, y, x + _SIDE - 1, y + _SIDE - 1), outline=colour, width=drawing.FRAME)
    left = x + _SIDE + 2 * drawing.GAP
    y = _write(draw, (left, y), one.question, drawing.INK, _QUESTION_LINES)
    partly = f" ({one.verdict:.2f})" if colour == PARTLY else ""
    y = _write(draw, (left, y + 4), f"said{partly}: {one.answer or '(nothing)'}", colour)
    _write(draw, (left, y + 4), f"truth: {one.truth}", drawing.FAINT_INK, 2)


def _write(
    draw: ImageDraw.ImageDraw,
    at: tuple[int, int],
    text: str,
    colour: tuple[int, int, int],
    most: int = _ANSWER_LINES,
) -> int:
    """Writes at most ``most`` lines, with dots where there would be more; the place below them."""
    lines = [
        piece for line in text.splitlines() for piece in drawing.wrap(line, _TEXT, _SIZE) or [""]
    ]
    if len(lines) > most:
        lines = [*lines[: most - 1], "..."]
    for number, line in enumerate(lines):
        draw.text((at[0], at[1] + number * _LINE), line, colour, drawing.font(_SIZE))
    return at[1] + len(lines) * _LINE
