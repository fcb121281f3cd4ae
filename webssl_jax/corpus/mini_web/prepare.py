"""One source from its packages to encoded pictures, descriptors and counts: the work of one
process.

A source is done when its ``.json`` is there; it is written last. Nothing is decoded twice: the
pixels that are judged (size, blankness, likeness) are those that are encoded.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import io
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from array_record.python import array_record_module
from PIL import Image

from webssl_jax.corpus import near_duplicates
from webssl_jax.corpus.mini_web import packages
from webssl_jax.corpus.mini_web.catalogue import Source
from webssl_jax.corpus.mini_web.readers import Picture, digest
from webssl_jax.data import decode, records
from webssl_jax.data.converter.items import Dropped
from webssl_jax.files import write_text

MIN_SIDE, MAX_ASPECT = 32, 6.0
# Sixteen openclipart pictures of up to 623 Mpixel hold two thirds of its pixels.
MAX_PIXELS = 40_000_000
_TOO_LARGE = f"over {MAX_PIXELS // 1_000_000} Mpixel"
TEXT_FACTOR = 2  # documents are kept twice as large, so that their text can be read
QUALITY = 90
_KEPT_FORMATS = ("JPEG", "PNG", "WEBP")  # those of the record schema
_BLANK = 4.0  # standard deviation of grey levels
_INK = 240  # what is darker than this is drawing, not paper
_CROP = (0.25, 0.7)  # share of the shorter side
_DESCRIBED = 512  # canvases a call


class Prepared(NamedTuple):
    """A prepared source. rows: one dict a picture, see :func:`prepare`. bank: descriptors of
    ``near_duplicates.describe``, a row a picture."""

    rows: list[dict]
    bank: dict[str, np.ndarray]
    dropped: collections.Counter


@dataclasses.dataclass(frozen=True)
class Files:
    """Where a source's work lies. ``settings`` is part of the names, so that another size is other
    work."""

    folder: Path
    name: str
    settings: str

    @property
    def records(self) -> Path:
        return self.folder / f"{self.name}-{self.settings}.arrayrecord"

    @property
    def bank(self) -> Path:
        return self.records.with_suffix(".npz")

    @property
    def rows(self) -> Path:
        return self.records.with_suffix(".json")

    def load(self) -> Prepared:
        """Raises FileNotFoundError if the source is not done."""
        stored = json.loads(self.rows.read_text("utf-8"))
        with np.load(self.bank) as bank:
            loaded = {name: bank[name] for name in bank.files}
        return Prepared(stored["rows"], loaded, collections.Counter(stored["dropped"]))


def prepare(source: Source, cache: Path, files: Files, max_side: int) -> int:
    """Writes a source's files; the number of its pictures.

    The records' order is the package's; label is the topic. A row holds key, group, kind (of
    caption), topic, digest (of the encoded bytes), width, height, bytes.
    """
    tree = packages.read_all(source.packages, cache, source.pattern)
    dropped: collections.Counter[str] = collections.Counter()
    in_group: collections.Counter[str] = collections.Counter()
    rows, canvases, banks, seen = [], [], [], set()
    limit = max_side * (TEXT_FACTOR if source.text_rich else 1)
    temporary = files.records.with_suffix(".tmp")
    writer = array_record_module.ArrayRecordWriter(str(temporary), records.WRITER_OPTIONS)
    for found in source.reader(tree):
        if isinstance(found, Dropped):
            dropped[found.reason] += 1
            continue
        if isinstance(found.image, bytes):  # before the work of decoding
            raw = hashlib.sha256(found.image).digest()
            if raw in seen:
                dropped["exact duplicate"] += 1
                continue
            seen.add(raw)
        if source.per_group and in_group[found.group] >= source.per_group:
            dropped["frame of one animation"] += 1
            continue
        for made in _encoded(found, limit):
            if isinstance(made, str):
                dropped[made] += 1
                continue
            key, image, data = made
            in_group[found.group] += 1
            name = f"{source.name}/{key}"
            group = found.group or f"{source.name}/{found.key}"
            record = records.Record(
                data, found.captions, name, *image.size, source.name, found.topic
            )
            writer.write(records.encode(record))
            rows.append(
                {
                    "key": name,
                    "group": group,
                    "kind": found.kind,
                    "topic": found.topic,
                    "digest": hashlib.sha256(data).hexdigest()[:24],
                    "width": image.width,
                    "height": image.height,
                    "bytes": len(data),
                }
            )
            canvases.append(near_duplicates.canvas(_trimmed(image)))
            if len(canvases) == _DESCRIBED:
                banks.append(near_duplicates.describe(np.stack(canvases)))
                canvases.clear()
    writer.close()
    if canvases or not banks:
        shape = (len(canvases), near_duplicates.CANVAS, near_duplicates.CANVAS, 3)
        banks.append(near_duplicates.describe(np.array(canvases, np.uint8).reshape(shape)))
    joined = {k: np.concatenate([b[k] for b in banks]).astype(np.float16) for k in banks[0]}
    np.savez(files.bank, allow_pickle=False, **joined)
    temporary.replace(files.records)
    write_text(files.rows, json.dumps({"rows": rows, "dropped": dropped}))
    return len(rows)


def _encoded(found: Picture, limit: int) -> Iterator[tuple[str, Image.Image, bytes] | str]:
    """Yields (key, pixels, encoded bytes) of a picture and its crops, or why one is dropped."""
    original = None
    if isinstance(found.image, bytes):
        try:
            opened = decode.open_image(found.image)
            if opened.width * opened.height > MAX_PIXELS:
                yield _TOO_LARGE
                return
            reason = _unfit(opened.width, opened.height)
            if reason:
                yield reason
                return
            kept = opened.image.format in _KEPT_FORMATS and opened.orientation == 1
            # twice what is kept, so that the antialiasing filter still has something to do
            scale = 1.0 if found.crops else 2 * limit / max(opened.width, opened.height)
            image = opened.decode(scale).upright()
        except decode.TooManyPixelsError:
            yield _TOO_LARGE
            return
        except decode.DecodeError:
            yield "undecodable"
            return
        if kept and max(image.size) <= limit:
            original = found.image
    else:
        image = found.image
        reason = _unfit(*image.size)
        if reason:
            yield reason
            return
    if np.asarray(image.resize((32, 32), Image.Resampling.BOX).convert("L")).std() < _BLANK:
        yield "blank"
        return
    small = _shrunk(image, limit)
    yield found.key, small, original or _jpeg(small)
    rng = random.Random(digest(found.key))
    for number in range(found.crops):
        side = int(min(image.size) * rng.uniform(*_CROP))
        left, top = rng.randint(0, image.width - side), rng.randint(0, image.height - side)
        crop = image.crop((left, top, left + side, top + side))
        if side < limit // 2 or np.asarray(crop.reduce(8).convert("L")).std() < 2 * _BLANK:
            yield "crop small or nearly blank"
            continue
        crop = _shrunk(crop, limit)
        yield f"{found.key}#{number + 1}", crop, _jpeg(crop)


def _unfit(width: int, height: int) -> str | None:
    if min(width, height) < MIN_SIDE:
        return "too small"
    return "too thin" if max(width, height) > MAX_ASPECT * min(width, height) else None


def _shrunk(image: Image.Image, limit: int) -> Image.Image:
    """The image with a longer side of at most ``limit``, averaged down by whole factors first."""
    long = max(image.size)
    if long <= limit:
        return image
    size = [max(1, round(side * limit / long)) for side in image.size]
    return image.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0)


def _jpeg(image: Image.Image) -> bytes:
    """Without chroma subsampling: drawings and text have sharp coloured edges."""
    encoded = io.BytesIO()
    image.save(encoded, "JPEG", quality=QUALITY, subsampling=0)
    return encoded.getvalue()


def _trimmed(image: Image.Image) -> np.ndarray:
    """Pixels without the paper around the drawing: what near-duplicates are compared by."""
    pixels = np.asarray(image)
    ink = pixels.min(axis=-1) < _INK
    if not ink.any():
        return pixels
    rows, columns = np.flatnonzero(ink.any(axis=1)), np.flatnonzero(ink.any(axis=0))
    return pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
