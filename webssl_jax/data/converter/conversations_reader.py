"""Conversations about images as LLaVA and Cambrian-1 publish them, as input of the converter: JSON
lines, or one JSON list, of objects with ``conversations`` and perhaps ``image``, a path below a
folder or a member of tars.

A conversation without an image gets a small white one, which no token will stand for.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from webssl_jax.config import UserError
from webssl_jax.data import annotations as annotation
from webssl_jax.data.converter.folder_reader import key_of, read_file
from webssl_jax.data.converter.items import (
    MAX_BYTES,
    Candidate,
    Dropped,
    Item,
    Note,
    Unit,
    metadata_of,
    no_progress,
)
from webssl_jax.data.converter.plan import find_files, stamp
from webssl_jax.data.turns import DialogueError, take_turns

NAME = "conversations"
AT_ONCE = 64  # conversations of a unit
# What data sets write where there is no image; NaN too, which JSON does not know.
_NO_IMAGE = ("", "None", "none", "nan")
_TAR_SUFFIXES = (".tar",)
_SURROGATE = re.compile("[\ud800-\udfff]")
# 32 x 32 white pixels
BLANK = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAACAAAAAgCAAAAABWESUoAAAAGElEQVR42mP8z4AfMDGMKhhVMKpghCoAAKM9AT8q"
    "/1PbAAAAAElFTkSuQmCC"
)


@dataclasses.dataclass(frozen=True)
class ConversationsReader:
    """Reads what :func:`list_conversations` found. See ``items.Reader``.

    root: what files are relative to. images: the folder of images, or "" where they lie in tars.
    metadata: whether what else an object holds is kept as the annotation ``meta``.
    """

    root: str
    source: str
    images: str = ""
    metadata: bool = True

    def read(self, unit: Unit, advance: Callable[[int], None] = no_progress) -> Iterator[Item]:
        """See ``items.Reader``."""
        path = Path(self.root, unit["path"])
        try:
            with open(path, "rb") as file:
                file.seek(unit["begin"])
                lines = file.read(unit["end"] - unit["begin"])
        except OSError:
            yield Note(key_of(unit["path"]), "unreadable file")
            return
        for number, text in enumerate(_objects(lines, unit["lines"]), unit["first"]):
            key = f"{key_of(unit['path'])}:{number}"
            yield self._read(key, text, unit.get("places", {}))
            advance(1)

    def _read(self, key: str, text: bytes, places: Mapping[str, Any]) -> Item:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return Dropped(key, "no JSON")
        turns = value.get(NAME) if isinstance(value, dict) else None
        if not isinstance(turns, list):
            return Dropped(key, f"no list of {NAME}")
        image = value.get("image")
        if isinstance(image, list):
            return Dropped(key, "several images")
        shown = isinstance(image, str) and image not in _NO_IMAGE
        try:
            said = [{name: _text(one[name]) for name in ("from", "value")} for one in turns]
            messages = take_turns(said, image=shown)
        except (KeyError, TypeError):
            return Dropped(key, "a turn without from and value")
        except DialogueError as error:
            return Dropped(key, str(error))
        if not any(one["content"] for one in messages if one["role"] == "assistant"):
            return Dropped(key, "no answer to learn")
        data, problem = self._image(image, places) if shown else (BLANK, "")
        if problem:
            return Dropped(f"{key} ({key_of(_text(image))})", f"image: {problem}")
        rest = {name: x for name, x in value.items() if name != NAME}
        found: dict[str, bytes | str] = {NAME: annotation.encode_json(said)}
        found |= metadata_of(rest if self.metadata else {}, found)
        mended = any(_SURROGATE.search(one["value"]) for one in turns)
        notes = ("conversation not UTF-8, mended",) if mended else ()
        return Candidate(key, data, notes=notes, annotations=found)

    def _image(self, path: str, places: Mapping[str, Any]) -> tuple[bytes, str]:
        if self.images:
            if ".." in PurePosixPath(path).parts or os.path.isabs(path):
                return b"", "outside of the folder"
            return read_file(Path(self.images, path))
        if path not in places:
            return b"", "in none of the tars"
        tar, begin, size = places[path]
        if size > MAX_BYTES:
            return b"", "more bytes than the limit"
        try:
            with open(tar, "rb") as file:
                file.seek(begin)
                data = file.read(size)
        except OSError:
            return b"", "unreadable"
        return (data, "") if len(data) == size else (b"", "damaged tar")


def list_conversations(
    patterns: Sequence[str], images: str, advance: Callable[[int], None] = no_progress
) -> tuple[Path, str, list[Unit]]:
    """(folder that files are relative to, folder of images or "", units).

    patterns: of ``.jsonl`` and ``.json`` files. images: a folder, or a pattern of tars.

    Raises:
      UserError: if there is no such file or folder, a ``.json`` holds no list, or a tar is damaged.
    """
    root, files = find_files(patterns, "conversations")
    members: dict[str, tuple[str, int, int]] | None = None
    if not os.path.isdir(images):
        if not images.endswith(_TAR_SUFFIXES):
            raise UserError(f"--images {images}: no such folder; or give a pattern of .tar files")
        members = _members(images)
    units: list[Unit] = []
    for name in files:
        path = root / name
        with open(path, "rb") as file:
            spans = _list(path, file) if path.suffix == ".json" else _lines(file)
            for first, part in enumerate(_grouped(spans)):
                begin, end = part[0][0], part[-1][1]
                unit: dict[str, Any] = {
                    "path": name,
                    "begin": begin,
                    "end": end,
                    "first": first * AT_ONCE,
                    "lines": [[a - begin, b - begin] for a, b in part],
                    "size": len(part),
                    **stamp(path),
                }
                if members is not None:
                    unit["places"] = _places(path, begin, end, unit["lines"], members)
                units.append(unit)
                advance(len(part))
    if not units:
        raise UserError(f"--input: no conversation in {', '.join(map(str, files))}")
    return root, "" if members is not None else os.path.abspath(images), units


def _text(value: Any) -> str:
    """Text that UTF-8 can hold; JSON may escape half a character.

    Raises:
      TypeError: for a number or null, which is no text.
    """
    return _SURROGATE.sub("\ufffd", value)


_Span = tuple[int, int]  # bytes of one object in its file


def _lines(file: BinaryIO) -> Iterator[_Span]:
    place = 0
    for line in file:
        if line.strip():
            yield place, place + len(line)
        place += len(line)


def _list(path: Path, file: BinaryIO) -> Iterator[_Span]:
    """The objects of a JSON list, which must fit into memory once."""
    try:
        text = file.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is no UTF-8 ({error})") from None
    decode = json.JSONDecoder().raw_decode
    place, begin, blank = text.find("[") + 1, 0, " \t\r\n,"
    if not place or text[: place - 1].strip("\ufeff \t\r\n"):
        raise UserError(f"{path}: holds no JSON list; name JSON lines .jsonl")
    begin = len(text[:place].encode())
    while True:
        after = place
        while after < len(text) and text[after] in blank:
            after += 1
        begin += after - place
        if text[after : after + 1] == "]":
            return
        try:
            _, end = decode(text, after)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: its JSON is damaged ({error}); download it again") from None
        size = len(text[after:end].encode())
        yield begin, begin + size
        begin, place = begin + size, end


def _grouped(spans: Iterator[_Span]) -> Iterator[list[_Span]]:
    part: list[_Span] = []
    for span in spans:
        part.append(span)
        if len(part) == AT_ONCE:
            yield part
            part = []
    if part:
        yield part


def _objects(data: bytes, spans: Sequence[Sequence[int]]) -> Iterator[bytes]:
    return (data[begin:end] for begin, end in spans)


def _members(pattern: str) -> dict[str, tuple[str, int, int]]:
    """{name of a file in the tars: (tar, where its bytes begin, how many)}."""
    root, tars = find_files([pattern], "tars")
    found = {}
    for name in tars:
        path = str((root / name).absolute())
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    if member.isfile():
                        place = (path, member.offset_data, member.size)
                        found[member.name.removeprefix("./")] = place
        except (tarfile.TarError, OSError) as error:
            raise UserError(
                f"{path}: no plain tar can be read ({error}); unpack one that is compressed"
            ) from None
    return found


def _places(
    path: Path,
    begin: int,
    end: int,
    spans: Sequence[Sequence[int]],
    members: Mapping[str, tuple[str, int, int]],
) -> dict[str, tuple[str, int, int]]:
    """Where the images of a unit lie."""
    with open(path, "rb") as file:
        file.seek(begin)
        data = file.read(end - begin)
    found = {}
    for text in _objects(data, spans):
        try:
            image = json.loads(text).get("image")
        except (ValueError, AttributeError, RecursionError):
            continue  # the reader says so
        if isinstance(image, str) and image in members:
            found[image] = members[image]
    return found
