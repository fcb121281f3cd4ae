"""Tars of img2dataset, webdataset and MetaCLIP as input of the converter.

A sample is a run of members that share a folder and the name up to the first dot (webdataset's
definition), for example ``00012.jpg 00012.txt 00012.json``. A part that begins with a digit still
belongs to the name, so ``22.05.jpg`` and ``22.10.jpg`` are two samples; ``cut_names`` "last-dot"
takes all but the last part. What is taken from a sample:

* the image: the one without a second extension (``jpg`` before ``depth.png``), by its suffix or, if
  that is unknown, by its content; or the member that ``image_member`` names. Another that is as
  good is dropped and counted;
* captions: the whole of ``txt``, then ``caption``, ``captions`` and ``texts`` of the json (MetaCLIP
  writes ``texts: [[kind, text], ...]``); or the members and fields that are named;
* the label: ``cls``, or the field of the json that ``label_field`` names;
* annotations: members by what follows the name, such as ``seg.png``. One that is ``txt``, ``json``
  or ``cls`` is both, an annotation and a text as above;
* the annotation ``meta``: the rest of the json (url, sha256, scores, sizes before resizing).

MetaCLIP puts shard ``n`` in ``<n % 100>/<n>.tar``. A plain tar of more than 2 GiB is split between
samples into units of about 1 GiB.
"""

from __future__ import annotations

import array
import contextlib
import dataclasses
import itertools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from webssl_jax.config import UserError
from webssl_jax.data import decode
from webssl_jax.data.converter import buckets
from webssl_jax.data.converter.fields import MAX_TEXT_BYTES, captions_of, label_of
from webssl_jax.data.converter.folder_reader import key_of
from webssl_jax.data.converter.items import (
    APART,
    EMPTY,
    MAX_BYTES,
    MISSING,
    SECOND_IMAGE,
    SUFFIXES,
    Candidate,
    Dropped,
    Item,
    Note,
    Unit,
    Wanted,
    metadata_of,
    no_progress,
)
from webssl_jax.data.converter.plan import find_files, stamp, stamps
from webssl_jax.data.converter.tar_stream import Member, Piece, TarDamage, members, open_tar

PIECE = 1 << 30  # bytes of a tar that one worker reads
CUTS = ("first-dot", "last-dot")
_CAPTIONS = ("caption", "captions", "texts")
_MISSING = "shard missing"
_OVERSIZE = "more bytes than the limit"


@dataclasses.dataclass(frozen=True)
class TarReader:
    """Reads the tars that :func:`list_tars` or :func:`list_metaclip` found, one a unit, streaming:
    one sample is in memory, and 8 bytes or so of each that lacks its image or its text. See
    ``items.Reader``.

    ``image_member``, ``caption_members``: extensions, such as ``rgb.jpg``. ``caption_fields``,
    ``label_field``: of the json; ``a.b`` is ``b`` of the object ``a``. If captions are named, only
    those are taken.
    """

    root: str
    source: str
    label_field: str | None = None
    annotations: Wanted = ()
    image_member: str | None = None
    caption_members: tuple[str, ...] = ()
    caption_fields: tuple[str, ...] = ()
    cut_names: str = CUTS[0]
    metadata: bool = True

    def read(self, unit: Unit, advance: Callable[[int], None] = no_progress) -> Iterator[Item]:
        name = key_of(unit["path"])
        if "note" in unit:
            yield Note(name, unit["note"])
            return
        opened = contextlib.ExitStack()
        try:
            if self.root.startswith(buckets.SCHEME):
                copy = opened.enter_context(buckets.local_copy(f"{self.root}/{unit['path']}"))
            else:
                copy = Path(self.root) / unit["path"]
            file = opened.enter_context(open(copy, "rb"))
        except OSError as error:
            opened.close()
            yield Note(f"{name}: {error.strerror}", "unreadable file")
            return
        with opened:
            yield from _Samples(self, name).read(file, unit, advance)

    def split_name(self, name: str) -> tuple[str, str]:
        return split_name(name, self.cut_names)

    def text_of(self, extension: str) -> str | None:
        """As which text of a sample a member of this extension is taken; None: as none."""
        asked = any(extension == wanted for _, wanted in self.annotations)
        if asked and extension not in ("txt", "json", "cls", *self.caption_members):
            return None
        suffix = extension.rpartition(".")[2]
        if suffix in ("json", "cls"):
            return suffix
        if self.caption_members:
            return extension if extension in self.caption_members else None
        return "txt" if suffix == "txt" and not self.caption_fields else None

    def limit(self, name: str) -> int:
        """Bytes of the largest member of this name that is read."""
        extension = self.split_name(name)[1]
        return MAX_TEXT_BYTES if self.text_of(extension) else MAX_BYTES

    def rank(self, extension: str, data: bytes | None) -> int | None:
        """How fit a member is as the image of its sample, 0 most; None: it is no image."""
        if self.image_member:
            return 0 if extension == self.image_member else None
        suffix = f".{extension.rpartition('.')[2]}"
        if suffix in SUFFIXES:
            return int("." in extension)
        return 2 if data and decode.format_of(data) else None


class _Samples:
    """What is in one tar."""

    def __init__(self, reader: TarReader, name: str):
        self.reader, self.name = reader, name
        self.prefix = os.path.splitext(name)[0]
        self.images: set[int] = set()  # digests of samples that have no text
        self.texts: set[int] = set()  # and of those that have no image

    def read(self, file: Any, unit: Unit, advance: Callable[[int], None]) -> Iterator[Item]:
        sample = _Sample(self, "")
        images = 0
        try:
            begin = unit.get("begin", 0)
            if "begin" in unit:
                last = unit["end"] == unit["bytes"]
                stream: Any = Piece(file, begin, unit["end"])
            else:
                last, stream = True, open_tar(file)
            seen = begin // 1000
            for member in members(stream, self.reader.limit, begin, last):
                advance(file.tell() // 1000 - seen)
                seen = file.tell() // 1000
                if member.kind == "gap":
                    reason = "zeros inside a tar: a part is overwritten, or tars were joined"
                    yield Note(f"{self.name} at {member.name}", reason)
                    continue
                problem = _problem(member)
                if problem:
                    yield Dropped(self.key_of(member.name), problem)
                elif member.kind == "file":
                    stem, _ = self.reader.split_name(member.name)
                    if stem != sample.stem:
                        yield from sample.items()
                        sample = _Sample(self, stem)
                    yield from sample.add(member)
                    images += sample.image is not None or sample.dropped
            yield from sample.items()
            if not images and "begin" not in unit:
                yield Note(self.name, f"{EMPTY} tar: no image in it")
        except (TarDamage, OSError) as damage:
            yield from sample.items()
            yield Note(f"{self.name} at {damage}", "damaged tar: what lies behind is lost")

    def key_of(self, name: str) -> str:
        return f"{self.prefix}/{key_of(name)}"

    def alone(self, stem: str, mine: set[int], others: set[int]) -> bool:
        """Remembers half a sample. False if its other half came before, elsewhere in the tar."""
        mine.add(hash(stem))
        return hash(stem) not in others


class _Sample:
    """What belongs together, while it is being collected."""

    def __init__(self, tar: _Samples, stem: str):
        self.tar, self.reader, self.stem = tar, tar.reader, stem
        self.extensions = frozenset(extension for _, extension in self.reader.annotations)
        self.annotations: dict[str, bytes | str] = {}  # by extension
        self.image: bytes | None = None
        self.rank, self.extension = 0, ""  # of the image
        self.dropped = False  # its image was, for a reason of its own
        self.texts: dict[str, bytes] = {}
        self.notes: list[str] = []

    def add(self, member: Member) -> Iterator[Item]:
        """Takes a member in; yields what becomes of those that are no part of the sample."""
        key = self.tar.key_of(member.name)
        stem, extension = self.reader.split_name(member.name)
        text = self.reader.text_of(extension)
        if extension in self.extensions:
            if extension in self.annotations:
                self.notes.append("second annotation of its kind in a sample, ignored")
            else:
                self.annotations[extension] = _OVERSIZE if member.data is None else member.data
            if text is None:
                return
        if text is not None:
            if member.data is None:
                self.notes.append("text larger than the limit, ignored")
            elif text in self.texts:
                self.notes.append("second text of its kind in a sample, ignored")
            else:
                self.texts[text] = member.data
            return
        rank = self.reader.rank(extension, member.data) if stem else None
        if rank is None:
            yield Note(key, f"member of another kind, ignored: {_suffix(extension)}")
        elif self.image is not None and rank == self.rank:
            yield Dropped(key, SECOND_IMAGE)
        elif self.image is not None and rank > self.rank:
            yield Note(key, f"image beside the one taken, ignored: {_suffix(extension)}")
        elif member.data is None:
            self.dropped = True
            yield Dropped(key, _OVERSIZE)
        else:
            if self.image is not None:
                note = f"image beside the one taken, ignored: {_suffix(self.extension)}"
                yield Note(f"{self.tar.key_of(self.stem)}.{self.extension}", note)
            self.image, self.rank, self.extension = member.data, rank, extension

    def items(self) -> Iterator[Item]:
        key, tar = self.tar.key_of(self.stem), self.tar
        if self.image is None:
            if self.texts and not self.dropped:
                alone = tar.alone(self.stem, tar.texts, tar.images)
                yield Dropped(key, "caption without image" if alone else APART)
            elif self.annotations and not self.dropped:
                yield Dropped(key, "annotation without image")
            return
        if not self.texts and not tar.alone(self.stem, tar.images, tar.texts):
            yield Note(key, APART)
        notes = list(self.notes)
        fields = self._fields(notes)
        captions = [
            self.texts[name]
            for name in self.reader.caption_members or ("txt",)
            if name in self.texts
        ]
        kept, more = captions_of([captions, self._captions(fields, notes)])
        label, about = label_of(self.texts.get("cls"))
        if self.reader.label_field:
            found = _field(fields, self.reader.label_field)
            if found is None:
                notes.append(f"no field {self.reader.label_field!r} beside an image")
            else:
                label, about = label_of(found)
        annotations = {
            name: self.annotations.get(extension, MISSING)
            for name, extension in self.reader.annotations
        }
        if self.reader.metadata:
            used = self.reader.caption_fields or _CAPTIONS
            rest = {name: value for name, value in fields.items() if name not in used}
            annotations |= metadata_of(rest, annotations)
        notes = [*dict.fromkeys(notes), *more, *about]
        yield Candidate(key, self.image, kept, label, tuple(notes), annotations)

    def _fields(self, notes: list[str]) -> dict[str, Any]:
        """Those of the json; none if it is bad."""
        if "json" not in self.texts:
            return {}
        try:
            fields = json.loads(self.texts["json"])
        except (ValueError, RecursionError):
            fields = None
        if isinstance(fields, dict):
            return fields
        notes.append("bad json beside an image")
        return {}

    def _captions(self, fields: dict[str, Any], notes: list[str]) -> list[Any]:
        """What is in the fields of the json that hold captions."""
        named = self.reader.caption_fields
        if self.reader.caption_members and not named:
            return []
        found = {name: _field(fields, name) for name in named or _CAPTIONS}
        notes += [f"no field {name!r} beside an image" for name in named if found[name] is None]
        texts = found.get("texts")
        if isinstance(texts, list) and all(isinstance(v, list) and len(v) == 2 for v in texts):
            found["texts"] = [text for _, text in texts]  # MetaCLIP's kind and text
        return list(found.values())


def split_name(name: str, cut_names: str) -> tuple[str, str]:
    """("folder/00012", "seg.png") of ``./folder/00012.seg.png``."""
    folder, _, base = name.removeprefix("./").rpartition("/")
    parts = base.split(".")
    end = len(parts) - 1 if cut_names == "last-dot" else 1
    while end < len(parts) - 1 and parts[end][:1].isdigit():
        end += 1
    stem = ".".join(parts[: max(end, 1)])
    extension = ".".join(parts[max(end, 1) :]).lower()
    return f"{folder}/{stem}" if folder and stem else stem, extension


def _field(fields: Any, path: str) -> Any:
    """The value of ``a.b``, None if there is none. A name may have dots itself."""
    if not isinstance(fields, dict):
        return None
    if path in fields:
        return fields[path]
    name, _, rest = path.partition(".")
    return _field(fields.get(name), rest) if rest else None


def _suffix(extension: str) -> str:
    return f".{extension}"[:20] if extension else "no suffix"


def _problem(member: Member) -> str | None:
    """Why a member is dropped unseen."""
    parts = member.name.split("/")
    if member.name.startswith("/") or ".." in parts or "\0" in member.name:
        return "path that leaves the tar"
    return "link, device or sparse file in a tar" if member.kind == "other" else None


def list_tars(patterns: list[str], cut_names: str = CUTS[0]) -> tuple[Path, list[Unit]]:
    """The tars that match, by path: their common folder, and units whose size is in kB.

    Args: cut_names: as the reader has it.

    Raises: as :func:`plan.find_files`.
    """
    root, paths = find_files(patterns, "tar files", remote=True)
    marks = stamps(root, paths)
    return root, [unit for path in paths for unit in _units(root, path, marks[path], cut_names)]


def list_metaclip(
    root: Path, first: int | None, last: int | None, cut_names: str = CUTS[0]
) -> list[Unit]:
    """Shards ``<root>/<n % 100>/<n>.tar`` by number.

    Args:
      first, last: the shards there should be. Missing ones are noted in the summary. None: those
        that are there.

    Raises:
      UserError: if there is no such folder, or not one shard of the range in it.
    """
    if not root.is_dir():
        raise UserError(f"--input {root}: {'not a folder' if root.exists() else 'no such folder'}")
    there = {}
    for path in root.glob("*/*.tar"):
        if path.stem.isascii() and path.stem.isdigit() and path.is_file():
            number = int(path.stem)
            if path.parent.name == str(number % 100) and path.stem == str(number):
                there[number] = path
    low = min(there, default=0) if first is None else first
    high = max(there, default=-1) if last is None else last
    chosen = {number: path for number, path in there.items() if low <= number <= high}
    if not chosen:
        raise UserError(
            f"--input {root}: no MetaCLIP shard such as {root}/{low % 100}/{low}.tar"
            + (f" ({len(there)} of other numbers)" if there else "")
        )
    numbers = sorted(chosen) if first is None or last is None else range(low, high + 1)
    units: list[Unit] = []
    for n in numbers:
        name = f"{n % 100}/{n}.tar"
        found: list[Unit] = [{"path": name, "note": _MISSING}]
        if n in chosen:
            found = _units(root, name, stamp(chosen[n]), cut_names)
        units += found
    return units


def _units(root: Path, path: str, marks: dict[str, Any], cut_names: str) -> list[Unit]:
    ends = [marks["bytes"]]
    if ends[0] >= 2 * PIECE and not str(root).startswith(buckets.SCHEME):  # those come whole
        ends = [*_cuts(root / path, cut_names), *ends]
    if len(ends) == 1:
        return [{"path": path, "size": max(1, ends[0] // 1000), **marks}]
    return [
        {"path": path, "size": max(1, (end - begin) // 1000), "begin": begin, "end": end, **marks}
        for begin, end in itertools.pairwise([0, *ends])
    ]


def _cuts(path: Path, cut_names: str) -> list[int]:
    """Where a tar can be cut, about every ``PIECE`` bytes: before a sample. Nowhere if it is
    compressed or damaged, or if members of one sample lie apart."""
    cuts: list[int] = []
    stems, last = array.array("q"), None
    with open(path, "rb") as file:
        try:
            if open_tar(file) is not file:
                return []
            for member in members(file, lambda name: -1, seek=True):
                if member.kind == "gap":
                    return []
                stem, _ = split_name(member.name, cut_names)
                if member.kind != "file" or stem == last:
                    continue
                last = stem
                stems.append(hash(stem))
                if member.offset - (cuts[-1] if cuts else 0) >= PIECE:
                    cuts.append(member.offset)
        except (TarDamage, OSError):  # whoever reads it will tell
            return []
    return cuts if len(np.unique(np.frombuffer(stems, np.int64))) == len(stems) else []
