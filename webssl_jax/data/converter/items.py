"""What readers yield, and the rules an image must obey to become a record."""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from PIL import Image

from webssl_jax.data import annotations as annotation
from webssl_jax.data import decode, records

# Of one encoded image or annotation; what MAX_PIXELS allows fits, and so does a worker.
MAX_BYTES = 1 << 27
JPEG_QUALITY = 92  # of what --max-side re-encodes, without chroma subsampling: text stays legible
SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .webp .gif .bmp .tif .tiff .ppm .pgm .avif .jp2 .tga .mpo "
    ".heic .heif .hif .jxl".split()
)

Unit = Mapping[str, Any]  # one line of a plan, plain JSON; "size" is its share of the work (or 1)
# Annotations that are asked for: (name, where a reader finds it). Pairs, because they must hash.
Wanted = tuple[tuple[str, str], ...]
MISSING = "missing"
EMPTY = "empty"  # how notes of an input that holds nothing begin
SECOND_IMAGE, APART = "second image of a sample", "caption apart from its image"
# What is lost by reading an input in a way that it does not fit: what to do about each.
MISREAD = {
    SECOND_IMAGE: "members whose names are alike up to the first dot are one sample: name the "
    "image with --image-member, or give --cut-names last-dot",
    APART: "the members of a sample must lie side by side: pack the tar again (tar --sort=name)",
}


@dataclasses.dataclass(frozen=True)
class Candidate:
    """An image found in an input, before any rule. ``data`` is the encoded file; ``notes`` are
    reasons as in :class:`Note`, about this image. ``annotations`` has an entry for each that is
    asked for: its bytes, ``MISSING``, or what is wrong with it. ``source``: if not the reader's.
    ``listed``: the value of a list of the user's that it was found by."""

    key: str
    data: bytes
    captions: tuple[str, ...] = ()
    label: str | None = None
    notes: tuple[str, ...] = ()
    annotations: Mapping[str, bytes | str] = dataclasses.field(default_factory=dict)
    source: str | None = None
    listed: str = ""

    @property
    def identity(self) -> str:
        """What is unique in a conversion."""
        return self.key if self.source is None else f"{self.source}\0{self.key}"


@dataclasses.dataclass(frozen=True)
class Dropped:
    """An image that will not be in the shards. ``reason`` is a short fixed phrase: it is
    counted. ``listed`` as of a candidate."""

    key: str
    reason: str
    listed: str = ""


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

    @property
    def source(self) -> str:
        """What records name as their source."""

    def read(self, unit: Unit, advance: Callable[[int], None] = no_progress) -> Iterator[Item]:
        """Yields what is in one line of the plan. Bad input is a ``Dropped`` or a ``Note``, never
        an exception. A unit of size over 1 may call ``advance`` with the part of the size that is
        done since the last call; the engine adds what is missing at the end."""


@dataclasses.dataclass(frozen=True)
class Rules:
    """What an image must be. Sides in pixels after EXIF rotation; ``max_side`` 0 keeps every size.

    Larger images than ``max_side`` are shrunk and encoded as JPEG, and with them their annotations
    that are PNG. Images that need the extra "formats" (HEIC, JPEG XL) are encoded as JPEG, so that
    who reads the shards does not need it. The bytes of all others stay.
    """

    max_side: int = 0
    min_side: int = 32
    max_aspect: float = 8.0
    require_caption: bool = False
    require_annotations: bool = False
    keep_duplicates: bool = False


def metadata_of(fields: Mapping[str, Any], taken: Mapping[str, Any]) -> dict[str, bytes | str]:
    """What a data set says of an image besides, as the annotation ``META``: numbers that JSON does
    not know (NaN) are null. Nothing if there is nothing, or if an annotation of that name is taken
    from elsewhere."""
    if not fields or annotation.META in taken:
        return {}
    try:
        return {annotation.META: annotation.encode_json(_finite(fields))}
    except annotation.AnnotationError as error:
        return {annotation.META: str(error)}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _finite(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def make_record(
    item: Candidate, source: str, rules: Rules
) -> tuple[records.Record | Dropped, list[Note]]:
    """Applies the rules to one image, which must decode completely to count. An annotation that is
    missing or damaged is left out and noted; the image stays unless the rules require all."""
    decoded = _decode(item, rules)
    if isinstance(decoded, Dropped):
        return decoded, []
    image, width, height = decoded
    source = source if item.source is None else item.source
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
    elif decode.format_of(item.data) in decode.EXTRA:
        record = dataclasses.replace(record, image=_jpeg(image))
    return record, missing + damaged


def reason_of(error: decode.DecodeError) -> str:
    """The short phrase by which an image that cannot be decoded is counted."""
    match error:
        case decode.TooManyPixelsError():
            return "more pixels than the limit"
        case decode.MissingDecoderError():
            return f"no decoder for {error}"
    return "undecodable"


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
    except decode.DecodeError as error:
        return Dropped(item.key, reason_of(error))
    width, height = opened.width, opened.height
    if min(width, height) < rules.min_side:
        return Dropped(item.key, "too small")
    if max(width, height) > rules.max_aspect * min(width, height):
        return Dropped(item.key, "too thin")
    try:
        return decode.decode_image(item.data), width, height
    except decode.DecodeError as error:
        return Dropped(item.key, reason_of(error))


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
    small = image.resize((width, height), Image.Resampling.BICUBIC)
    kept = dict(record.annotations)
    for name, data in kept.items():
        if annotation.is_png(data):
            kept[name] = annotation.shrink_png(record, name, width, height)
    return dataclasses.replace(
        record, image=_jpeg(small), width=width, height=height, annotations=kept
    )


def _jpeg(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return file.getvalue()
