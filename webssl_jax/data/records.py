"""One image record, as it lies in an ArrayRecord shard.

A record is a msgpack map, so any language reads it, and it describes itself:

===========  ===========  ========================================================================
field        type         meaning
===========  ===========  ========================================================================
version      int          schema version, 1 or 2
image        bytes        the encoded image, exactly as it was found or re-encoded (JPEG, PNG, ...)
captions     list of str  zero or more texts; CLIP draws one at each visit
key          str          unique name inside its dataset, e.g. the path below the source folder
width        int          pixels, of the encoded image after EXIF rotation
height       int          pixels, of the encoded image after EXIF rotation
source       str          where it came from: a folder, a crawl, a package
label        str or nil   class name; nil when there is none
annotations  map          name -> bytes: masks, depth, questions, ... (``data.annotations`` says
                          what each holds). Only in version 2, and training does not look at them
===========  ===========  ========================================================================

Both versions are read. A record is written in the lowest version that can hold it: without
annotations in version 1, so its bytes do not depend on what other records carry.

Shards are named ``<split>-00000-of-00004.arrayrecord`` and written with ``group_size:1``, because
random access to larger groups decompresses the whole group for one image (16,000 against 600
records/s at group_size 64).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import msgpack

SCHEMA_VERSIONS = (1, 2)
ANNOTATION_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
WRITER_OPTIONS = "group_size:1"
_FIELDS = ("image", "captions", "key", "width", "height", "source", "label")


class RecordError(ValueError):
    """A record that does not hold what the schema promises. The message says what is wrong."""


@dataclasses.dataclass(frozen=True)
class Record:
    """See the module's table. ``image`` is encoded bytes; sizes are in pixels."""

    image: bytes
    captions: tuple[str, ...]
    key: str
    width: int
    height: int
    source: str
    label: str | None = None
    annotations: Mapping[str, bytes] = dataclasses.field(default_factory=dict, hash=False)


def encode(record: Record) -> bytes:
    """Serialises a record, ready for an ArrayRecord writer. Annotations are sorted by name, so
    that equal records have equal bytes.

    Raises:
      RecordError: if an annotation's name is not allowed, or it is not bytes.
    """
    fields: dict[str, Any] = {"version": 2 if record.annotations else 1}
    fields |= {name: getattr(record, name) for name in _FIELDS}
    if record.annotations:
        _check_annotations(record.annotations)
        fields["annotations"] = dict(sorted(record.annotations.items()))
    return msgpack.packb(fields, use_bin_type=True)


def decode(data: bytes) -> Record:
    """Parses one record.

    Raises:
      RecordError: if the bytes are not a record, miss a field, hold a field or an annotation of
        the wrong type, or come from a newer schema than this code knows.
    """
    try:
        fields = msgpack.unpackb(data, raw=False)
    except (msgpack.UnpackException, ValueError) as error:
        raise RecordError(f"not a record: {type(error).__name__}: {error}") from None
    if not isinstance(fields, dict) or "version" not in fields:
        raise RecordError("not a record: no version field")
    version = fields["version"]
    if version not in SCHEMA_VERSIONS:
        known = " and ".join(map(str, SCHEMA_VERSIONS))
        raise RecordError(f"record schema version {version!r}; this code reads {known}")
    names = _FIELDS if version == 1 else (*_FIELDS, "annotations")
    missing = [name for name in names if name not in fields]
    if missing:
        raise RecordError(f"record without {', '.join(missing)}")
    types = {"image": bytes, "key": str, "width": int, "height": int, "source": str}
    for name, kind in types.items():
        if not isinstance(fields[name], kind):
            raise RecordError(
                f"record field {name!r} is {type(fields[name]).__name__}, not {kind.__name__}"
            )
    if fields["label"] is not None and not isinstance(fields["label"], str):
        raise RecordError(
            f"record field 'label' is {type(fields['label']).__name__}, not str or nil"
        )
    if not isinstance(fields["captions"], list) or not all(
        isinstance(c, str) for c in fields["captions"]
    ):
        raise RecordError("record field 'captions' is not a list of str")
    if version == 2:
        _check_annotations(fields["annotations"])
    values = {name: fields[name] for name in names}
    return Record(**values | {"captions": tuple(fields["captions"])})


def _check_annotations(annotations: Any) -> None:
    if not isinstance(annotations, Mapping):
        raise RecordError(f"record field 'annotations' is {type(annotations).__name__}, not a map")
    for name, value in annotations.items():
        if not isinstance(name, str) or not ANNOTATION_NAME.fullmatch(name):
            raise RecordError(
                f"annotation {name!r}: names are up to 64 lower-case letters, digits and _, the "
                "first a letter"
            )
        if not isinstance(value, bytes):
            raise RecordError(f"annotation {name!r} is {type(value).__name__}, not bytes")


def shard_name(split: str, index: int, total: int) -> str:
    """``train-00003-of-00016.arrayrecord``."""
    return f"{split}-{index:05d}-of-{total:05d}.arrayrecord"
