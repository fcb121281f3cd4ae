"""TFDS datasets as input of the converter, without TensorFlow.

Any dataset that lies prepared in a folder (``features.json`` and ``dataset_info.json`` beside the
shards), as ArrayRecord or as TFRecord, TFDS's default; or one by name, which is prepared as
ArrayRecord if need be. Images stay the encoded bytes that TFDS stored. A unit is one file of a
split, or the part of it that a sub-split such as ``train[:10%]`` asks for. Of annotations, images
and text stay as they are stored, arrays of a uint8 or uint16 a pixel become PNG, and all else JSON.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python import array_record_module

from webssl_jax.config import UserError, suggest
from webssl_jax.data.annotations import AnnotationError, encode_json, encode_mask
from webssl_jax.data.converter.fields import captions_of, key_of_value, label_of
from webssl_jax.data.converter.folder_reader import key_of
from webssl_jax.data.converter.items import (
    MAX_BYTES,
    Candidate,
    Dropped,
    Item,
    Note,
    Unit,
    Wanted,
    no_progress,
)
from webssl_jax.data.converter.plan import stamp

_DAMAGED = "damaged TFDS file: examples are lost"
_BATCH = 16


@dataclasses.dataclass(frozen=True)
class Features:
    """Paths of features, such as ``image`` or ``captions/text``; None: see :func:`list_tfds`."""

    image: str | None = None
    captions: tuple[str, ...] = ()
    key: str | None = None
    label: str | None = None
    annotations: Wanted = ()


@dataclasses.dataclass(frozen=True)
class TfdsReader:
    """Reads the files that :func:`list_tfds` found in the dataset's folder ``root``. See
    ``items.Reader``."""

    root: str
    source: str
    features: Features

    def read(self, unit: Unit, advance: Callable[[int], None] = no_progress) -> Iterator[Item]:
        decode, class_names = _decoder(self.root, self.features)
        name = key_of(unit["path"])
        done, problem = 0, "fewer examples than dataset_info.json promises"
        try:
            path = os.path.join(self.root, unit["path"])
            for data in _examples(path, unit["skip"], unit["size"]):
                key = f"{name}/{unit['skip'] + done:08d}"
                done += 1
                try:
                    example = decode(data)
                except Exception:  # whatever a protocol buffer's parser says to hostile bytes
                    yield Dropped(key, "undecodable example")
                else:
                    yield self._item(example, key, class_names)
                advance(1)
        except (OSError, ValueError, RuntimeError, IndexError) as error:
            problem = f"{type(error).__name__}: {error}"
        if done < unit["size"]:
            where = f"{name}, {unit['size'] - done:,} examples"
            yield Note(f"{where}: {' '.join(problem.split())[:200]}", _DAMAGED)

    def _item(self, example: Any, key: str, class_names: list[str]) -> Item:
        features = self.features
        if features.key:
            key = key_of_value(_value(example, features.key)) or key
        assert features.image is not None  # list_tfds has found it
        data = _value(example, features.image)
        if not isinstance(data, bytes):
            return Dropped(key, "no image in the example")
        captions, notes = captions_of([_value(example, path) for path in features.captions])
        label = _value(example, features.label) if features.label else None
        label, more = label_of(label, class_names)
        found = {name: _annotation(_value(example, path)) for name, path in features.annotations}
        return Candidate(key, data, captions, label, notes + more, found)


def list_tfds(
    dataset: str, data_dir: Path | None, split: str, asked: Features
) -> tuple[Path, str, Features, list[Unit]]:
    """What a dataset holds: its folder, its name, the features to read, and units whose size is in
    examples.

    Args:
      dataset: a prepared dataset's folder, or a name such as ``cifar10`` or ``coco/2017``.
      data_dir: where datasets by name lie (None: TFDS's own folder).
      split: TFDS's language: ``train``, ``train[:10%]``, ``train+test``.
      asked: image None: the only image feature there is; label None: the only class label, if there
        is one.

    Raises:
      UserError: if there is no such dataset, split or feature, or it cannot be prepared.
    """
    image, key, label = asked.image, asked.key, asked.label
    builder = _builder(dataset, data_dir)
    flat = _flatten(builder.info.features)
    images = [path for path, feature in flat.items() if type(feature).__name__ == "Image"]
    labels = [path for path, feature in flat.items() if type(feature).__name__ == "ClassLabel"]
    if image is None:
        if len(images) != 1:
            found = ", ".join(images) or "none"
            raise UserError(f"--input {dataset}: give --image-feature (images here: {found})")
        image = images[0]
    if label is None and len(labels) == 1:
        label = labels[0]
    for flag, path, options in (
        ("image", image, images),
        *(("caption", path, list(flat)) for path in asked.captions),
        ("key", key, list(flat)),
        ("label", label, list(flat)),
    ):
        if path is not None and path not in options:
            raise UserError(f"--{flag}-feature {path}: no such feature; {suggest(path, options)}")
    nodes = sorted({path.rsplit("/", n)[0] for path in flat for n in range(path.count("/") + 1)})
    for name, path in asked.annotations:
        if path not in nodes:
            raise UserError(f"--annotation {name}={path}: no such feature; {suggest(path, nodes)}")
    try:
        instructions = builder.info.splits[split].file_instructions
    except (KeyError, ValueError, AssertionError):
        raise UserError(
            f"--tfds-split {split}: not in {dataset}; {suggest(split, builder.info.splits)}"
        ) from None
    root = Path(builder.data_dir)
    units: list[Unit] = [
        {
            "path": os.path.relpath(i.filename, root),
            "skip": i.skip,
            "size": i.take,
            **(stamp(Path(i.filename)) if os.path.exists(i.filename) else {}),
        }
        for i in instructions
    ]
    suffix = sorted({_format(unit["path"]) for unit in units} - {"array_record", "tfrecord"})
    if suffix or not units:
        problem = f"files of kind {suffix[0]} cannot be read" if suffix else "no files"
        raise UserError(f"--input {dataset}: {problem}; prepare it as array_record")
    features = dataclasses.replace(asked, image=image, label=label)
    return root, builder.info.name, features, units


def _builder(dataset: str, data_dir: Path | None) -> Any:
    import tensorflow_datasets as tfds

    try:
        if os.path.isdir(dataset):
            return tfds.builder_from_directory(dataset)
        builder = tfds.builder(dataset, data_dir=data_dir, try_gcs=False)
        if not builder.info.splits:
            builder = tfds.builder(
                dataset, data_dir=data_dir, try_gcs=False, file_format="array_record"
            )
            builder.download_and_prepare()
        return builder
    except Exception as error:  # a registry, a download and a user's generator can fail in any way
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"--input {dataset}: neither a prepared folder nor a dataset that TFDS can prepare "
            f"here: {type(error).__name__}: {reason}"
        ) from None


def _flatten(features: Any, prefix: str = "") -> dict[str, Any]:
    """{path: leaf feature}; a sequence's name leads to what it is a sequence of."""
    inner = getattr(features, "feature", None)
    if inner is not None and type(features).__name__ in ("Sequence", "Dataset"):
        return _flatten(inner, prefix)
    if hasattr(features, "items"):
        found: dict[str, Any] = {}
        for name, feature in features.items():
            found |= _flatten(feature, f"{prefix}/{name}" if prefix else name)
        return found
    return {prefix: features}


@functools.lru_cache(maxsize=1)
def _decoder(root: str, features: Features) -> tuple[Callable[[bytes], Any], list[str]]:
    """How one example is parsed, images left encoded, and the names of the label's integers."""
    import tensorflow_datasets as tfds

    everything = tfds.builder_from_directory(root).info.features
    flat = _flatten(everything)
    named = [features.image, *features.captions, features.key, features.label]
    named += dict(features.annotations).values()
    # Of the rest nothing is parsed: much of it (audio, video) would need TensorFlow.
    top = {path.split("/")[0] for path in named if path}
    wanted = tfds.features.FeaturesDict({name: everything[name] for name in top})
    skip: dict[str, Any] = {}
    for path, feature in flat.items():
        *folders, leaf = path.split("/")
        kinds = {kind.__name__ for kind in type(feature).__mro__}  # masks: a LabeledImage
        if path.split("/")[0] in top and "Image" in kinds:
            at = skip
            for name in folders:
                at = at.setdefault(name, {})
            at[leaf] = tfds.decode.SkipDecoding()

    def decode(data: bytes) -> Any:
        return wanted.deserialize_example_np(data, decoders=skip)

    label = flat.get(features.label) if features.label else None
    return decode, list(getattr(label, "names", None) or [])


def _value(example: Any, path: str) -> Any:
    for name in path.split("/"):
        example = example[name]
    return example


def _annotation(value: Any) -> bytes | str:
    """A value's bytes, or what is wrong with it."""
    if isinstance(value, bytes):
        return value
    try:
        if isinstance(value, np.ndarray) and value.dtype in (np.uint8, np.uint16):
            flat = value[..., 0] if value.ndim == 3 and value.shape[2] == 1 else value
            if flat.ndim == 2:
                return encode_mask(flat)
        return encode_json(_plain(value))
    except (AnnotationError, UnicodeDecodeError) as error:
        return str(error)


def _plain(value: Any) -> Any:
    """Python's own values of NumPy's, text as str.

    Raises: UnicodeDecodeError where bytes are no text.
    """
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value


def _format(path: str) -> str:
    """``tfrecord`` of ``mnist-train.tfrecord-00000-of-00001``."""
    return os.path.basename(path).rpartition(".")[2].partition("-")[0]


def _examples(path: str, skip: int, count: int) -> Iterator[bytes]:
    """Serialised examples of one file.

    Raises: OSError, ValueError or RuntimeError where the file is damaged.
    """
    if _format(path) == "tfrecord":
        yield from itertools.islice(_tfrecords(path), skip, skip + count)
        return
    reader = array_record_module.ArrayRecordReader(path)
    try:
        for begin in range(skip, skip + count, _BATCH):
            yield from reader.read(begin, min(begin + _BATCH, skip + count))
    finally:
        reader.close()


def _tfrecords(path: str) -> Iterator[bytes]:
    """TFRecord: little-endian length (8 bytes), its checksum (4), data, the data's checksum (4).

    The length's checksum is checked, the data's is not: in plain Python it would cost more than
    decoding the image, which tells damage, too.
    """
    with open(path, "rb") as file:
        while head := file.read(12):
            if len(head) < 12:
                raise ValueError("truncated")
            length, checksum = struct.unpack("<QI", head)
            if _masked_crc32c(head[:8]) != checksum or length > 2 * MAX_BYTES:
                raise ValueError(f"byte {file.tell() - 12:,}: no valid length")
            data = file.read(length + 4)
            if len(data) < length + 4:
                raise ValueError("truncated")
            yield data[:-4]


def _masked_crc32c(data: bytes) -> int:
    """CRC-32C (Castagnoli, RFC 3720) as TFRecord stores it: rotated and shifted."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 & -(crc & 1))
    crc ^= 0xFFFFFFFF
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF
