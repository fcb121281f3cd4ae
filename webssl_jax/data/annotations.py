"""What a record's annotations hold, and how they are written and read.

Some names have a fixed meaning:

=============  ===============================================================================
name           bytes
=============  ===============================================================================
labels         JSON: an int or a str, or a list of only ints or only str; the list may be empty
questions      JSON: a list of objects with ``question`` (str) and ``answers`` (list of str); other
               keys are kept (``options``, ``category``, ...)
conversations  JSON: a list of objects with ``from`` and ``value`` (both str), as LLaVA writes them
mask           PNG of one channel of at most 16 bits (grey or palette): a class a pixel
depth          PNG of one channel of 16 bits: depth, 0 unknown. Its unit is in the PNG's text
               ``units_per_metre``, or the data set states it
meta           JSON: an object of what else a data set says of the image (url, sha256, scores)
=============  ===============================================================================

Other names are free: JSON, PNG, or any bytes. Whatever its name, a PNG has one value a pixel and
exactly the size of the image, upright as the image is shown (after its EXIF rotation).
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from webssl_jax.config import suggest
from webssl_jax.data.decode import png_text, reason, without_texts
from webssl_jax.data.records import Record, RecordError

META = "meta"
_MAGIC = b"\x89PNG\r\n\x1a\n"
_SCALE = "units_per_metre"  # a PNG's text
UNITS_PER_METRE = 1000.0  # millimetres, as NYU Depth v2; KITTI has 256
_BIT_DEPTH, _COLOUR_TYPE = 24, 25  # places in a PNG's header
_GREY, _PALETTE = 0, 3


class AnnotationError(RecordError):
    """An annotation that is not there, or does not hold what its name promises. One line."""


def labels(record: Record, name: str = "labels") -> tuple[int, ...] | tuple[str, ...]:
    """The labels of an image, class ids or names. A lone value is a tuple of one.

    Raises: AnnotationError, as every reader here.
    """
    value = json_value(record, name)
    found = value if isinstance(value, list) else [value]
    if not any(all(type(one) is kind for one in found) for kind in (int, str)):
        raise AnnotationError(f"annotation {name!r}: labels are ints, or str, or a list of either")
    return tuple(found)


def questions(record: Record, name: str = "questions") -> list[dict[str, Any]]:
    """Questions about an image: objects with ``question`` and ``answers``, and what else they
    were given."""
    found = _objects(record, name, ("question",))
    for place, one in enumerate(found):
        answers = one.get("answers")
        if not isinstance(answers, list) or not all(isinstance(a, str) for a in answers):
            raise AnnotationError(f"annotation {name!r}: [{place}] has no list of str 'answers'")
    return found


def conversations(record: Record, name: str = "conversations") -> list[dict[str, Any]]:
    """The turns of a conversation about an image: objects with ``from`` and ``value``."""
    return _objects(record, name, ("from", "value"))


def metadata(record: Record, name: str = META) -> dict[str, Any]:
    """What a data set says of an image besides."""
    value = json_value(record, name)
    if not isinstance(value, dict):
        raise AnnotationError(f"annotation {name!r}: an object, not {_kind(value)}")
    return value


def json_value(record: Record, name: str) -> Any:
    """Any annotation that is JSON (RFC 8259: no NaN, no Infinity)."""
    try:
        return json.loads(_bytes(record, name).decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise AnnotationError(f"annotation {name!r}: not JSON: {error}") from None


def mask(record: Record, name: str = "mask") -> np.ndarray:
    """A value for each pixel: (height, width) uint8 or uint16. Of a palette image these are the
    indices, of fewer than 8 bits the numbers as they are stored."""
    data = _bytes(record, name)
    if not is_png(data):
        raise AnnotationError(f"annotation {name!r}: not a PNG")
    try:
        image = Image.open(io.BytesIO(without_texts(data)), formats=("PNG",))
        bits, colour = data[_BIT_DEPTH], data[_COLOUR_TYPE]
        if colour not in (_GREY, _PALETTE):
            raise AnnotationError(f"annotation {name!r}: a PNG of mode {image.mode}, not grey")
        if image.size != (record.width, record.height):
            raise AnnotationError(
                f"annotation {name!r}: {image.width} x {image.height} pixels, its image has "
                f"{record.width} x {record.height}"
            )
        values = np.asarray(image)
    except AnnotationError:
        raise
    except Exception as error:  # Pillow raises nearly every type there is on hostile bytes
        raise AnnotationError(f"annotation {name!r}: damaged PNG: {reason(error)}") from None
    if colour == _GREY and bits in (2, 4):  # Pillow stretches them to 0 ... 255
        values = values // (255 // (2**bits - 1))
    return values.astype(np.uint16 if bits == 16 else np.uint8)


def depth(record: Record, name: str = "depth", units_per_metre: float | None = None) -> np.ndarray:
    """Depth in metres: (height, width) float32, 0 where it is not known.

    Args:
      units_per_metre: of the stored numbers, where the PNG does not say it (those of
        :func:`encode_depth` do): 1000 in NYU Depth v2, 256 in KITTI. By default 1000.

    Raises: AnnotationError, as every reader here, and for another number than the PNG's own.
    """
    values = mask(record, name)
    stored = _stored_scale(record.annotations[name], name)
    if stored and units_per_metre and stored != units_per_metre:
        raise AnnotationError(
            f"annotation {name!r}: its PNG says {stored:g} units a metre, not {units_per_metre:g}"
        )
    scale = stored or units_per_metre or UNITS_PER_METRE
    if values.dtype != np.uint16:
        raise AnnotationError(f"annotation {name!r}: depth is a PNG of 16 bits, this one has 8")
    return values.astype(np.float32) / np.float32(scale)


def check(record: Record) -> None:
    """Reads every annotation that has a fixed meaning, and every PNG.

    Raises: AnnotationError of the first that is wrong.
    """
    for name, data in record.annotations.items():
        if not data:
            raise AnnotationError(f"annotation {name!r}: empty")
        if name in _READERS:
            _READERS[name](record, name)
        elif is_png(data):
            mask(record, name)


def is_png(data: bytes) -> bool:
    """Whether it says of itself that it is a PNG."""
    return data.startswith(_MAGIC)


def format_of(data: bytes) -> str:
    """ "PNG", "JSON" or "other", by the bytes."""
    if is_png(data):
        return "PNG"
    try:
        json.loads(data.decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return "other"
    return "JSON"


def encode_json(value: Any) -> bytes:
    """JSON of lists, objects, str and numbers.

    Raises: AnnotationError for what JSON cannot hold, NaN and bytes among it.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return text.encode("utf-8")
    except (TypeError, ValueError, RecursionError) as error:
        raise AnnotationError(f"no JSON value: {error}") from None


def encode_mask(values: np.ndarray, units_per_metre: float | None = None) -> bytes:
    """A PNG of (height, width) uint8 or uint16; of depth with its scale.

    Raises: AnnotationError for another shape or type.
    """
    if values.ndim != 2 or values.dtype not in (np.uint8, np.uint16) or not values.size:
        raise AnnotationError(
            f"a mask is (height, width) uint8 or uint16, not {values.shape} {values.dtype}"
        )
    file = io.BytesIO()
    info = PngInfo()
    if units_per_metre is not None:
        info.add_text(_SCALE, f"{units_per_metre:g}")
    Image.fromarray(np.ascontiguousarray(values)).save(file, "PNG", pnginfo=info)
    return file.getvalue()


def encode_depth(metres: np.ndarray, units_per_metre: float = UNITS_PER_METRE) -> bytes:
    """A PNG of (height, width) depths in metres, which says its scale. What is not finite, or not
    above 0, is unknown and becomes 0.

    Raises: AnnotationError for another shape, and for depths that 16 bits cannot hold.
    """
    known = np.isfinite(metres) & (metres > 0)
    units = np.rint(np.where(known, metres, 0) * units_per_metre)
    if units.size and units.max() > 65535:
        raise AnnotationError(
            f"depth of {units.max() / units_per_metre:.1f} m: 16 bits hold at most "
            f"{65535 / units_per_metre:.1f} m at {units_per_metre:g} units a metre"
        )
    return encode_mask(units.astype(np.uint16), units_per_metre)


def shrink_png(record: Record, name: str, width: int, height: int) -> bytes:
    """An annotation that is a PNG at another size, with the scale that it states."""
    values = resize_mask(mask(record, name), width, height)
    return encode_mask(values, _stored_scale(record.annotations[name], name))


def _stored_scale(data: bytes, name: str) -> float | None:
    """The units of a metre that a PNG states; None where it states none."""
    text = png_text(data, _SCALE)
    if text is None:
        return None
    try:
        scale = float(text)
    except ValueError:
        scale = 0.0
    if not 0 < scale < float("inf"):
        raise AnnotationError(f"annotation {name!r}: {_SCALE} of {text[:20]!r} in its PNG")
    return scale


def resize_mask(values: np.ndarray, width: int, height: int) -> np.ndarray:
    """Another size by the nearest value, so that no new value appears: (height, width)."""
    rows, columns = (
        ((np.arange(new) + 0.5) * old / new).astype(np.intp)
        for new, old in zip((height, width), values.shape)
    )
    return values[rows[:, None], columns]


def _bytes(record: Record, name: str) -> bytes:
    if name not in record.annotations:
        there = suggest(name, record.annotations) if record.annotations else "it has none"
        raise AnnotationError(f"no annotation {name!r} in record {record.key!r}; {there}")
    return record.annotations[name]


def _objects(record: Record, name: str, keys: tuple[str, ...]) -> list[dict[str, Any]]:
    """A JSON list of objects that have ``keys``, each a str."""
    found = json_value(record, name)
    if not isinstance(found, list):
        raise AnnotationError(f"annotation {name!r}: a list of objects, not {_kind(found)}")
    for place, one in enumerate(found):
        for key in keys:
            if not isinstance(one, dict) or not isinstance(one.get(key), str):
                raise AnnotationError(f"annotation {name!r}: [{place}] has no str {key!r}")
    return found


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is no JSON")


_READERS: dict[str, Callable[[Record, str], Any]] = {
    "labels": labels,
    "questions": questions,
    "conversations": conversations,
    "mask": mask,
    "depth": depth,
    META: metadata,
}
