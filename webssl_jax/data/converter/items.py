"""What readers yield, and the rules an image must obey to become a record."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from PIL import Image

from webssl_jax.data import annotations as annotation
from webssl_jax.data import decode, records

# Of one encoded image or annotation; what MAX_PIXELS allows fits, and so does a worker.
MAX_BYTES = 1 << 27
MAX_TEXT_BYTES = 1 << 20  # of one caption or one json beside an image
JPEG_QUALITY = 92  # of what --max-side re-encodes, without chroma subsampling: text stays legible
SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .webp .gif .bmp .tif .tiff .ppm .pgm .avif .jp2 .tga .mpo".split()
)

Unit = Mapping[str, Any]  # one line of a plan, plain JSON; "size" is its share of the work (or 1)
# Annotations that are asked for: (name, where a reader finds it). Pairs, because they must hash.
Wanted = tuple[tuple[str, str], ...]
MISSING = "missing"


@dataclasses.dataclass(frozen=True)
class Candidate:
    """An image found in an input, before any rule. ``data`` is the encoded file; ``notes`` are
    reasons as in :class:`Note`, about this image. ``annotations`` has an entry for each that is
    asked for: its bytes, ``MISSING``, or what is wrong with it."""

    key: str
    data: bytes
    captions: tuple[str, ...] = ()
    label: str | None = None
    notes: tuple[str, ...] = ()
    annotations: Mapping[str, bytes | str] = dataclasses.field(default_factory=dict)


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

    Larger images than ``max_side`` are shrunk and encoded as JPEG, and with them their annotations
    that are PNG; the bytes of all others stay.
    """

    max_side: int = 0
    min_side: int = 32
    max_aspect: float = 8.0
    require_caption: bool = False
    require_annotations: bool = False
    keep_duplicates: bool = False


def text_of(value: str | bytes) -> tuple[str, bool]:
    """Text that UTF-8 can hold, stripped, and whether characters had to be replaced by U+FFFD."""
    data = value if isinstance(value, bytes) else value.encode("utf-8", "surrogatepass")
    text = data.decode("utf-8", "replace")
    return text.removeprefix("\ufeff").strip(), text.encode() != data


def clean_captions(values: Sequence[str | bytes]) -> tuple[tuple[str, ...], tuple[str, ...]]:
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


def make_record(
    item: Candidate, source: str, rules: Rules
) -> tuple[records.Record | Dropped, list[Note]]:
    """Applies the rules to one image, which must decode completely to count. An annotation that is
    missing or damaged is left out and noted; the image stays unless the rules require all."""
    decoded = _decode(item, rules)
    if isinstance(decoded, Dropped):
        return decoded, []
    image, width, height = decoded
    record = records.Record(item.data, item.captions, item.key, width, height, source, item.label)
    kept: dict[str, bytes] = {}
    missing, damaged = [], []
    for name, data in item.annotations.items():
        problem = data if isinstance(data, str) else _problem(record, name, data)
        if problem == MISSING:
            missing.append(Note(item.key, f"no annotation {name!r}"))
        elif isinstance(data, bytes) and not problem:
            kept[name] = data
        else:
            damaged.append(Note(f"{item.key}: {problem}", f"damaged annotation {name!r}"))
    if rules.require_annotations and (missing or damaged):
        lost = next(name for name in item.annotations if name not in kept)
        return Dropped(item.key, f"image without annotation {lost!r}"), damaged
    record = dataclasses.replace(record, annotations=kept)
    if rules.max_side and max(width, height) > rules.max_side:
        record = _shrink(record, image, rules.max_side)
    return record, missing + damaged


def _decode(item: Candidate, rules: Rules) -> tuple[Image.Image, int, int] | Dropped:
    """The upright image, its width and its height."""
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
        return decode.decode_image(item.data), width, height
    except decode.DecodeError:
        return Dropped(item.key, "undecodable")


def _problem(record: records.Record, name: str, data: bytes) -> str:
    """What is wrong with an annotation of an image; empty if nothing is."""
    if len(data) > MAX_BYTES:
        return "more bytes than the limit"
    try:
        annotation.check(dataclasses.replace(record, annotations={name: data}))
    except records.RecordError as error:
        return " ".join(str(error).split())[:200]
    return ""


def _shrink(record: records.Record, image: Image.Image, max_side: int) -> records.Record:
    scale = max_side / max(record.width, record.height)
    width, height = (max(1, round(side * scale)) for side in (record.width, record.height))
    file = io.BytesIO()
    small = image.resize((width, height), Image.Resampling.BICUBIC)
    small.save(file, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    kept = dict(record.annotations)
    for name, data in kept.items():
        if annotation.is_png(data):
            kept[name] = annotation.shrink_png(record, name, width, height)
    return dataclasses.replace(
        record, image=file.getvalue(), width=width, height=height, annotations=kept
    )
