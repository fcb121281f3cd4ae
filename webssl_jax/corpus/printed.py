"""Pictures of words and figures whose text is known from what drew them: bar charts by rule, and
pieces of the pages of LaTeX manuals, whose words the PDF itself says."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from webssl_jax.corpus.mini_web import readers
from webssl_jax.corpus.texts import WORDS
from webssl_jax.visuals.drawing import font

_WORD = re.compile(r"(?<![^\s(])[a-z]{4,9}(?=[\s,.;:)])")
_TEST = 4  # every fourth manual is of the test
_EACH = 6  # words of one manual
_TRIES = 30  # pages of a manual that are opened for them, at most
_MARGIN = 1.7  # width of a piece over that of its word
_INK = 60  # grey levels between the ink and the paper of a word, at least
_TOP = 10  # of the axis of a chart


class Chart(NamedTuple):
    """A bar chart: what its title says, and {label: height, 1 to 9}, no two of a height."""

    image: Image.Image
    title: str
    bars: dict[str, int]


class Piece(NamedTuple):
    """A square piece of a page with ``word`` in its middle."""

    image: Image.Image
    word: str
    key: str


def chart(rng: np.random.Generator, side: int) -> Chart:
    """Three or four bars with labels, an axis with numbers, and a title, of ``texts.WORDS``."""
    title, *labels = (WORDS[i] for i in rng.permutation(len(WORDS))[: int(rng.integers(4, 6))])
    heights = (1 + rng.permutation(_TOP - 1)[: len(labels)]).tolist()
    image = Image.new("RGB", (side, side), "white")
    draw, ink, size = ImageDraw.Draw(image), (40, 40, 40), side // 12
    draw.text((side / 2, size), title, ink, font(size + 4), anchor="mm")
    left, bottom, high = 2 * size, side - 2 * size, side - 5 * size
    for tick in range(0, _TOP + 1, 2):
        y = bottom - high * tick / _TOP
        draw.line((left, y, side - 4, y), (205, 205, 205))
        draw.text((left - 4, y), str(tick), ink, font(size), anchor="rm")
    step = (side - 4 - left) / len(labels)
    for place, (label, height) in enumerate(zip(labels, heights)):
        x, colour = left + step * (place + 0.5), tuple(rng.integers(40, 200, 3).tolist())
        y = bottom - high * height / _TOP
        draw.rectangle((x - step / 4, y, x + step / 4, bottom), colour)
        draw.text((x, bottom + size), label, ink, font(size - 2), anchor="mm")
    draw.line((left, bottom, side - 4, bottom), ink, 2)
    return Chart(image, title, dict(zip(labels, heights)))


def is_test(name: str) -> bool:
    """Whether a manual is of the test: none is on both sides."""
    return int(readers.digest(f"manual {name}"), 16) % _TEST == 0


def pieces(
    tree: Mapping[str, bytes], test: bool, side: int, rng: np.random.Generator
) -> Iterator[Piece]:
    """Words of manuals, the same number of each manual, until all manuals are used up.

    Args:
      tree: the files of ``catalogue``'s source latex-manuals, its reader of PDFs among them.
      test: those of the test, or of the training.
    """
    library = readers.load_pdfium(tree)
    names = {PurePosixPath(path).stem: path for path in sorted(tree) if path.endswith(".pdf")}
    for name in rng.permutation(sorted(name for name in names if is_test(name) == test)):
        try:
            document = library.PdfDocument(tree[names[name]])
        except library.PdfiumError:
            continue  # a manual that cannot be opened has no pages in the corpus either
        found = 0
        for number in rng.permutation(len(document))[:_TRIES].tolist():
            one = _piece(document[number], side, rng)
            if one:
                found += 1
                yield Piece(*one, f"{name}/{number + 1}")
            if found == _EACH:
                break
        document.close()


def _piece(page: Any, side: int, rng: np.random.Generator) -> tuple[Image.Image, str] | None:
    """A word of a page drawn by chance; None where it cannot be cut out, or shows no ink."""
    layer = page.get_textpage()
    text = layer.get_text_range()
    words = list(_WORD.finditer(text))
    if not words:
        return None
    word = words[int(rng.integers(len(words)))]
    boxes = np.array([layer.get_charbox(i) for i in range(*word.span())])
    (x0, y0), (x1, y1) = boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)
    half, (x, y) = (x1 - x0) * _MARGIN / 2, ((x0 + x1) / 2, (y0 + y1) / 2)
    width, height = page.get_size()
    edges = x - half, y - half, width - x - half, height - y - half  # left, bottom, right, top
    said = layer.get_text_bounded(x0 - 0.5, y0 - 0.5, x1 + 0.5, y1 + 0.5).strip()
    if min(edges) < 0 or y1 - y0 > (x1 - x0) / 2 or said != word.group():
        return None  # at the rim, set upright, or not where the PDF's text says
    drawn = page.render(scale=side / (2 * half), crop=edges).to_pil().convert("RGB")
    grey = np.asarray(drawn.convert("L"), np.int16)
    rows = int((y1 - y0) / (4 * half) * len(grey))
    middle = grey[len(grey) // 2 - rows : len(grey) // 2 + rows + 1]
    if np.ptp(middle) < _INK:
        return None
    return drawn.resize((side, side), Image.Resampling.BICUBIC), word.group()
