"""Tars of img2dataset, webdataset and MetaCLIP as input of the converter.

A sample is a run of members that share a folder and the name up to the first dot (webdataset's
definition), for example ``00012.jpg 00012.txt 00012.json``. MetaCLIP puts ``json`` before ``jpeg``,
keeps its captions in the json as ``texts: [[kind, text], ...]``, and shard ``n`` in
``<n % 100>/<n>.tar``. What is taken from a sample:

* the image: the first member with an image's suffix; others of the sample are dropped and counted;
* captions: the whole of ``txt``, then ``caption``, ``captions`` and ``texts`` of the json;
* the label: ``cls``, or the field of the json that ``label_field`` names;
* annotations: members by what follows the first dot of their names, such as ``seg.png``. One that
  is ``txt``, ``json`` or ``cls`` is both, an annotation and a text as above.

The rest of img2dataset's json (url, sha256, sizes before resizing) is not kept, unless the json is
asked for as an annotation.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from webssl_jax.config import UserError
from webssl_jax.data.converter.folder_reader import key_of
from webssl_jax.data.converter.items import (
    MAX_BYTES,
    MAX_TEXT_BYTES,
    MISSING,
    SUFFIXES,
    Candidate,
    Dropped,
    Item,
    Note,
    Unit,
    Wanted,
    clean_captions,
    no_progress,
    text_of,
)
from webssl_jax.data.converter.plan import find_files
from webssl_jax.data.converter.tar_stream import Member, TarDamage, members, open_tar

_TEXTS = (".txt", ".json", ".cls")
_UNKNOWN = "member of another kind, ignored"


@dataclasses.dataclass(frozen=True)
class TarReader:
    """Reads the tars that :func:`list_tars` or :func:`list_metaclip` found, one a unit, streaming:
    one sample is in memory. See ``items.Reader``."""

    root: str
    source: str
    label_field: str | None = None
    annotations: Wanted = ()

    def read(self, unit: Unit, advance: Callable[[int], None] = no_progress) -> Iterator[Item]:
        name = key_of(unit["path"])
        if "note" in unit:
            yield Note(name, unit["note"])
            return
        try:
            file = open(Path(self.root) / unit["path"], "rb")
        except OSError as error:
            yield Note(f"{name}: {error.strerror}", "unreadable file")
            return
        with file:
            extensions = frozenset(extension for _, extension in self.annotations)
            limit = functools.partial(_limit, extensions)
            sample = _Sample(os.path.splitext(name)[0], "", extensions)
            seen = 0
            try:
                for member in members(open_tar(file), limit):
                    advance(file.tell() // 1000 - seen)
                    seen = file.tell() // 1000
                    if member.kind == "gap":
                        reason = "zeros inside a tar: a part is overwritten, or tars were joined"
                        yield Note(f"{name} at {member.name}", reason)
                        continue
                    problem = _problem(member, limit)
                    if problem:
                        yield problem(sample.key_of(member.name))
                    elif member.kind == "file":
                        stem = _stem(member.name)
                        if stem != sample.stem:
                            yield from sample.items(self.label_field, self.annotations)
                            sample = _Sample(sample.prefix, stem, extensions)
                        dropped = sample.add(member)
                        if dropped:
                            yield dropped
                yield from sample.items(self.label_field, self.annotations)
            except (TarDamage, OSError) as damage:
                yield from sample.items(self.label_field, self.annotations)
                yield Note(f"{name} at {damage}", "damaged tar: what lies behind is lost")


class _Sample:
    """What belongs together, while it is being collected."""

    def __init__(self, prefix: str, stem: str, extensions: frozenset[str]):
        self.prefix, self.stem = prefix, stem
        self.extensions = extensions  # of annotations
        self.annotations: dict[str, bytes | str] = {}  # by extension
        self.image: bytes | None = None
        self.dropped = False  # its image was, for a reason of its own
        self.texts: dict[str, bytes] = {}
        self.notes: list[str] = []

    def key_of(self, name: str) -> str:
        return f"{self.prefix}/{key_of(name)}"

    def add(self, member: Member) -> Dropped | None:
        suffix, extension = os.path.splitext(member.name)[1].lower(), _extension(member.name)
        if extension in self.extensions:
            if extension in self.annotations:
                self.notes.append("second annotation of its kind in a sample, ignored")
            else:
                data = "more bytes than the limit" if member.data is None else member.data
                self.annotations[extension] = data
            if f".{extension}" not in _TEXTS:
                return None
        if suffix in _TEXTS:
            if member.data is None:
                self.notes.append("text larger than the limit, ignored")
            elif suffix in self.texts:
                self.notes.append("second text of its kind in a sample, ignored")
            else:
                self.texts[suffix] = member.data
            return None
        if self.image is not None:
            return Dropped(self.key_of(member.name), "second image of a sample")
        if member.data is None:
            self.dropped = True
            return Dropped(self.key_of(member.name), "more bytes than the limit")
        self.image = member.data
        return None

    def items(self, label_field: str | None, wanted: Wanted) -> Iterator[Item]:
        key = self.key_of(self.stem)
        if self.image is None:
            if (self.texts or self.annotations) and not self.dropped:
                yield Dropped(key, f"{'caption' if self.texts else 'annotation'} without image")
            return
        captions: list[Any] = [self.texts[".txt"]] if ".txt" in self.texts else []
        label = text_of(self.texts[".cls"])[0] if ".cls" in self.texts else None
        notes = list(self.notes)
        if ".json" in self.texts:
            try:
                fields = json.loads(self.texts[".json"])
                if not isinstance(fields, dict):
                    raise ValueError
            except (ValueError, RecursionError):
                notes.append("bad json beside an image")
            else:
                captions += _captions(fields)
                value = fields.get(label_field) if label_field else None
                if isinstance(value, str | int | float):
                    label = text_of(str(value))[0]
        kept, more = clean_captions(captions)
        notes = [*dict.fromkeys(notes), *more]
        found = {name: self.annotations.get(extension, MISSING) for name, extension in wanted}
        yield Candidate(key, self.image, kept, label or None, tuple(notes), found)


def _captions(fields: dict[str, Any]) -> list[str]:
    """img2dataset's ``caption``, lists of captions, and MetaCLIP's [kind, text] pairs."""
    values: list[Any] = [fields.get("caption")]
    for name in ("captions", "texts"):
        more = fields.get(name)
        values += more if isinstance(more, list) else [more]
    values = [v[-1] if isinstance(v, list) and len(v) == 2 else v for v in values]
    return [value for value in values if isinstance(value, str)]


def _stem(name: str) -> str:
    """ "folder/00012" of ``./folder/00012.seg.png``."""
    folder, _, base = name.removeprefix("./").rpartition("/")
    stem = base.partition(".")[0]
    return f"{folder}/{stem}" if folder else stem


def _extension(name: str) -> str:
    """ "seg.png" of ``./folder/00012.seg.png``."""
    return name.rpartition("/")[2].partition(".")[2].lower()


def _limit(extensions: frozenset[str], name: str) -> int:
    """Bytes of the largest member of this name that is read; negative if none is."""
    suffix, extension = os.path.splitext(name)[1].lower(), _extension(name)
    if f".{extension}" in _TEXTS or (suffix in _TEXTS and extension not in extensions):
        return MAX_TEXT_BYTES
    return MAX_BYTES if suffix in SUFFIXES or extension in extensions else -1


def _problem(member: Member, limit: Callable[[str], int]) -> Callable[[str], Item] | None:
    """What a member becomes that is no part of a sample."""
    parts = member.name.split("/")
    if member.name.startswith("/") or ".." in parts or "\0" in member.name:
        return lambda key: Dropped(key, "path that leaves the tar")
    if member.kind == "other":
        return lambda key: Dropped(key, "link, device or sparse file in a tar")
    if member.kind == "file" and (not parts[-1].partition(".")[0] or limit(member.name) < 0):
        return lambda key: Note(key, _UNKNOWN)
    return None


def list_tars(patterns: list[str]) -> tuple[Path, list[Unit]]:
    """The tars that match, by path: their common folder, and units whose size is in kB.

    Raises: as :func:`plan.find_files`.
    """
    root, paths = find_files(patterns, "tar files")
    return root, [{"path": path, "size": _kilobytes(root / path)} for path in paths]


def list_metaclip(root: Path, first: int | None, last: int | None) -> list[Unit]:
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
    return [
        {"path": f"{n % 100}/{n}.tar", "size": _kilobytes(chosen[n])}
        if n in chosen
        else {"path": f"{n % 100}/{n}.tar", "note": "shard missing"}
        for n in numbers
    ]


def _kilobytes(path: Path) -> int:
    return max(1, path.stat().st_size // 1000)
