"""Which records an evaluation judges by, what identifies them, and their classes."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import re
from collections.abc import Collection, Sequence
from typing import Any

import grain
import numpy as np

from webssl_jax.config import UserError
from webssl_jax.data import identity, records
from webssl_jax.data.decode import DecodeError, decode_image
from webssl_jax.data.pipeline import Source
from webssl_jax.data.sources import ArrayRecordSource

LABELLED, CAPTIONED = "label", "captions"
MASKS, DEPTH = "mask", "depth"  # annotations
_WORDS = {LABELLED: "labelled", CAPTIONED: "captioned", MASKS: "masked", DEPTH: "depth"}


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Records of a source: of those with the numbers ``indices`` (n,), rising, the ones that have
    what is ``needed``, a label, captions, or an annotation. ``identity``: a fingerprint of them."""

    source: Source
    indices: np.ndarray
    needed: str
    identity: str

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def needed_word(self) -> str:
        """For messages: ``labelled``, ``captioned``, ..."""
        return _WORDS[self.needed]


@dataclasses.dataclass(frozen=True)
class Subset:
    """A source that holds of another the records with the numbers ``indices`` (n,)."""

    source: Source
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> bytes:
        return self.source[int(self.indices[index])]

    def describe(self, index: int) -> str:
        return self.source.describe(int(self.indices[index]))


@dataclasses.dataclass(frozen=True)
class Greyscale:
    """The records of a source with greyscale copies of their images: what is left of a picture
    when its colours are gone. Grey is luma, as ``Image.convert("L")`` has it. A record whose image
    cannot be decoded stays as it is, for whoever reads it to count."""

    source: Source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> bytes:
        data = self.source[index]
        try:
            record = records.decode(data)
            image = decode_image(record.image).convert("L")
        except (DecodeError, records.RecordError):
            return data
        file = io.BytesIO()
        image.save(file, "PNG", compress_level=1)
        width, height = image.size
        grey = dataclasses.replace(record, image=file.getvalue(), width=width, height=height)
        return records.encode(grey)

    def describe(self, index: int) -> str:
        return self.source.describe(index)


def check_options(max_images: int, needed: str, **shards: str) -> None:
    """Refuses keys of a row that name no records.

    Args:
      shards: {key: value} of the keys that name shards with what is ``needed``.

    Raises:
      ValueError: for an empty one, or a negative ``max_images``.
    """
    for name, value in shards.items():
        if not value:
            raise ValueError(f"{name} = '': give {_WORDS[needed]} shards")
    if max_images < 0:
        raise ValueError(f"max_images = {max_images} must be zero (all) or positive")


def open_dataset(pattern: str, needed: str, limit: int = 0, *, greyscale: bool = False) -> Dataset:
    """The records of shards, or greyscale copies of them; see :func:`dataset_of`.

    Raises:
      UserError: if there are no such shards, or no record in them.
    """
    source = ArrayRecordSource(pattern)
    return dataset_of(Greyscale(source) if greyscale else source, needed, limit)


def dataset_of(source: Source, needed: str, limit: int = 0) -> Dataset:
    """The records of a source that have what is ``needed`` (:data:`LABELLED`, :data:`CAPTIONED`,
    :data:`MASKS` or :data:`DEPTH`), among at most ``limit`` of them (0: all), drawn evenly from the
    whole by a fixed shuffle, because shards are often sorted by class.

    The fingerprint is of their number and of the bytes of 256 of them, evenly spaced: cheap for any
    number of records, and the same wherever the shards lie.
    """
    count = len(source)
    if not count:
        raise UserError(f"{source.describe(0)}: holds no records")
    if limit and limit < count:
        order = grain.MapDataset.range(count).shuffle(seed=0)
        indices = np.sort(np.array([order[i] for i in range(limit)], np.int64))
    else:
        indices = np.arange(count)
    known = f"{count} {len(indices)} {needed}"
    return Dataset(source, indices, needed, sampled_digest(source, indices, known))


def sampled_digest(source: Source, indices: Sequence[int] | np.ndarray, known: str) -> str:
    """16 hexadecimal digits of what is ``known`` of some records and of the bytes of 256 of them,
    evenly spaced."""
    digest = hashlib.sha256(known.encode())
    for place in identity.sampled(len(indices)):
        digest.update(identity.bytes_of(source, int(indices[place])))
    return digest.hexdigest()[:16]


def fingerprint(*known: Any) -> str:
    """12 hexadecimal digits of texts, numbers and arrays."""
    digest = hashlib.sha256()
    for part in known:
        digest.update(part.tobytes() if isinstance(part, np.ndarray) else repr(part).encode())
    return digest.hexdigest()[:12]


def in_order(labels: Collection[str]) -> tuple[str, ...]:
    """Labels sorted: as numbers if all are whole numbers ("2" before "10"), else as texts."""
    numbers = all(re.fullmatch(r"-?\d{1,18}", label, re.ASCII) for label in labels)
    return tuple(sorted(labels, key=lambda label: (int(label) if numbers else 0, label)))


def class_names(labels: Sequence[str | None], dataset: Dataset, least: int = 1) -> tuple[str, ...]:
    """All classes that occur among ``labels`` of ``dataset``, in the order of :func:`in_order`.

    Raises:
      UserError: if there are fewer than ``least``.
    """
    names = in_order({label for label in labels if label is not None})
    where = f"{len(dataset):,} records ({dataset.source.describe(0)}, ...)"
    if not names:
        raise UserError(
            f"no labelled image in {where}; give records with labels (folder names become labels), "
            "or leave this evaluation out"
        )
    if len(names) < least:
        raise UserError(
            f"evaluation needs training images of at least {least} classes; all in {where} are "
            f"{names[0]!r}"
        )
    return names


def class_ids(
    labels: Sequence[str | None], names: Sequence[str], dataset: Dataset
) -> tuple[np.ndarray, np.ndarray]:
    """(rows that have a label, their classes), both (n,) int.

    Raises:
      UserError: for a label that is none of ``names``, or if there is none at all.
    """
    ids = {name: i for i, name in enumerate(names)}
    rows = np.array([i for i, label in enumerate(labels) if label is not None], np.int64)
    unknown = sorted({labels[i] for i in rows.tolist()} - ids.keys())
    if unknown:
        raise UserError(
            f"{dataset.source.describe(0)}, ...: label {unknown[0]!r} is none of the {len(names)} "
            f"known classes ({', '.join(list(names)[:3])}, ...)"
        )
    if not len(rows):
        class_names(labels, dataset)
    return rows, np.array([ids[labels[i]] for i in rows.tolist()], np.int32)
