"""One image record, as it lies in an ArrayRecord shard.

Schema version 1. A record is a msgpack map, so any language reads it, and it describes itself:

=========  ===========  ==========================================================================
field      type         meaning
=========  ===========  ==========================================================================
version    int          schema version, 1
image      bytes        the encoded image, exactly as it was found or re-encoded (JPEG, PNG, WebP)
captions   list of str  zero or more texts; CLIP draws one at each visit
key        str          unique name inside its dataset, e.g. the path below the source folder
width      int          pixels, of the encoded image after EXIF rotation
height     int          pixels, of the encoded image after EXIF rotation
source     str          where it came from: a folder, a crawl, a package
label      str or nil   class name; nil when there is none
=========  ===========  ==========================================================================

Shards are named ``<split>-00000-of-00004.arrayrecord`` and written with ``group_size:1``, because
random access to larger groups decompresses the whole group for one image (16,000 against 600
records/s at group_size 64).
"""

from __future__ import annotations

import dataclasses

import msgpack

SCHEMA_VERSION = 1
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


def encode(record: Record) -> bytes:
    """Serialises a record, ready for an ArrayRecord writer."""
    return msgpack.packb(
        {"version": SCHEMA_VERSION, **dataclasses.asdict(record)}, use_bin_type=True
    )


def decode(data: bytes) -> Record:
    """Parses one record.

    Raises:
      RecordError: if the bytes are not a record, miss a field, hold a field of the wrong type, or
        come from a newer schema than this code knows.
    """
    try:
        fields = msgpack.unpackb(data, raw=False)
    except (msgpack.UnpackException, ValueError) as error:
        raise RecordError(f"not a record: {type(error).__name__}: {error}") from None
    if not isinstance(fields, dict) or "version" not in fields:
        raise RecordError("not a record: no version field")
    if fields["version"] != SCHEMA_VERSION:
        raise RecordError(
            f"record schema version {fields['version']!r}; this code reads {SCHEMA_VERSION}"
        )
    missing = [name for name in _FIELDS if name not in fields]
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
    return Record(
        **{name: fields[name] for name in _FIELDS} | {"captions": tuple(fields["captions"])}
    )


def shard_name(split: str, index: int, total: int) -> str:
    """``train-00003-of-00016.arrayrecord``."""
    return f"{split}-{index:05d}-of-{total:05d}.arrayrecord"
