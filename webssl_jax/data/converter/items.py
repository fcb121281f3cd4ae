"""What readers yield, and the rules an image must obey to become a record."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from PIL import Image

from webssl_jax.data import decode, records

MAX_BYTES = 1 << 27  # of one encoded image; what MAX_PIXELS allows fits, and so does a worker
MAX_TEXT_BYTES = 1 << 20  # of one caption or one json beside an image
JPEG_QUALITY = 92  # of what --max-side re-encodes, without chroma subsampling: text stays legible
SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .webp .gif .bmp .tif .tiff .ppm .pgm .avif .jp2 .tga .mpo".split()
)

Unit = Mapping[str, Any]  # one line of a plan, plain JSON; "size" is its share of the work (or 1)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """An image found in an input, before any rule. ``data`` is the encoded file; ``notes`` are
    reasons as in :class:`Note`, about this image."""

    key: str
    data: bytes
    captions: tuple[str, ...] = ()
    label: str | None = None
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Dropped:
    """An image that will not be in the shards. ``reason`` is a short fixed phrase: it is
    counted."""

    key: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Note:
    """Something that a person must hear of and that is not one image: a damaged file, say."""

    key: str
    reason: str


Item = Candidate | Dropped | Note


def no_progress(size: int) -> None:
    """For callers that show none."""


class Reader(Protocol):
    """Opens one input. Must pickle, and must depend on nothing but its fields and the input."""

    source: str

    def read(self, unit: Unit, advance: Callable[[int], None] = no_progress) -> Iterator[Item]:
        """Yields what is in one line of the plan. Bad input is a ``Dropped`` or a ``Note``, never
        an exception. A unit of size over 1 may call ``advance`` with the part of the size that is
        done since the last call; the engine adds what is missing at the end."""


@dataclasses.dataclass(frozen=True)
class Rules:
    """What an image must be. Sides in pixels after EXIF rotation; ``max_side`` 0 keeps every size.

    Larger images than ``max_side`` are shrunk and encoded as JPEG; the bytes of all others stay.
    """

    max_side: int = 0
    min_side: int = 32
    max_aspect: float = 8.0
    require_caption: bool = False
    keep_duplicates: bool = False


def text_of(value: str | bytes) -> tuple[str, bool]:
    """Text that UTF-8 can hold, stripped, and whether characters had to be replaced by U+FFFD."""
    data = value if isinstance(value, bytes) else value.encode("utf-8", "surrogatepass")
    text = data.decode("utf-8", "replace")
    return text.removeprefix("\ufeff").strip(), text.encode() != data


def clean_captions(values: list[str | bytes]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Captions without blanks and repeats, in order, and the notes about them."""
    captions: dict[str, None] = {}
    notes: dict[str, None] = {}
    for value in values:
        if len(value) > MAX_TEXT_BYTES:
            notes["text larger than the limit, ignored"] = None
            continue
        text, mended = text_of(value)
        if mended:
            notes["caption not UTF-8, mended"] = None
        if text:
            captions[text] = None
    return tuple(captions), tuple(notes)


def make_record(item: Candidate, source: str, rules: Rules) -> records.Record | Dropped:
    """Applies the rules to one image. It must decode completely to count."""
    if not item.data:
        return Dropped(item.key, "empty file")
    if len(item.data) > MAX_BYTES:
        return Dropped(item.key, "more bytes than the limit")
    if rules.require_caption and not item.captions:
        return Dropped(item.key, "image without caption")
    try:
        opened = decode.open_image(item.data)
    except decode.TooManyPixelsError:
        return Dropped(item.key, "more pixels than the limit")
    except decode.DecodeError:
        return Dropped(item.key, "undecodable")
    width, height = opened.width, opened.height
    if min(width, height) < rules.min_side:
        return Dropped(item.key, "too small")
    if max(width, height) > rules.max_aspect * min(width, height):
        return Dropped(item.key, "too thin")
    try:
        image = decode.decode_image(item.data)
    except decode.DecodeError:
        return Dropped(item.key, "undecodable")
    data = item.data
    if rules.max_side and max(width, height) > rules.max_side:
        scale = rules.max_side / max(width, height)
        width, height = (max(1, round(side * scale)) for side in (width, height))
        encoded = io.BytesIO()
        small = image.resize((width, height), Image.Resampling.BICUBIC)
        small.save(encoded, "JPEG", quality=JPEG_QUALITY, subsampling=0)
        data = encoded.getvalue()
    return records.Record(data, item.captions, item.key, width, height, source, item.label)
