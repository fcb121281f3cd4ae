"""Folder trees of image files as input of the converter: what is in them, and how one is read."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath

from webssl_jax.config import UserError
from webssl_jax.data.converter.fields import captions_of
from webssl_jax.data.converter.items import (
    MAX_BYTES,
    MISSING,
    SUFFIXES,
    Candidate,
    Dropped,
    Item,
    Note,
    Unit,
    Wanted,
    no_progress,
)
from webssl_jax.data.decode import MAGIC_BYTES, format_of

LABELS = ("none", "folder")
CAPTIONS = ("none", "sidecar-txt", "filename")
EXAMPLES = 5  # names kept of files that are no images
# Of these no file is opened to look: there may be one beside each image.
_NO_IMAGES = frozenset(".txt .json .xml .csv .tsv .yaml .npy .npz .pt .md .html".split())
_FIELD = re.compile(r"\{(path|folder|stem)(?:([%#])([^{}]+))?\}")


@dataclasses.dataclass(frozen=True)
class FolderReader:
    """Reads the files that :func:`list_folder` found. See ``items.Reader``.

    ``label_from``: "folder" takes the first folder below the root. ``captions``: "sidecar-txt"
    takes each line of the text file beside the image as one caption, "filename" the name's words.
    ``annotations`` are files, named as :func:`annotation_path` says.
    """

    root: str
    source: str
    label_from: str = "none"
    captions: str = "none"
    annotations: Wanted = ()

    def read(self, unit: Unit, advance: Callable[[int], None] = no_progress) -> Iterator[Item]:
        if "count" in unit:
            for place in range(unit["count"]):
                yield Note(unit["examples"][min(place, len(unit["examples"]) - 1)], unit["note"])
            return
        path = PurePosixPath(unit["path"])
        key = key_of(unit["path"])
        if "drop" in unit:
            yield Dropped(key, unit["drop"])
            return
        full = Path(self.root) / path
        data, problem = read_file(full)
        if problem:
            yield Dropped(key, problem)
            return
        texts, lost = self._captions(full)
        captions, notes = captions_of(texts)
        folder = path.parts[0] if len(path.parts) > 1 else None
        label = key_of(folder) if self.label_from == "folder" and folder else None
        found = {name: self._annotation(pattern, path) for name, pattern in self.annotations}
        yield Candidate(key, data, captions, label, notes + lost, found)

    def _annotation(self, pattern: str, path: PurePosixPath) -> bytes | str:
        file = Path(self.root) / annotation_path(pattern, str(path))
        data, problem = read_file(file)
        return data or (problem if os.path.lexists(file) else MISSING)

    def _captions(self, path: Path) -> tuple[Sequence[str | bytes], tuple[str, ...]]:
        """The texts, and a note if there is a file of them that cannot be read."""
        if self.captions == "filename":
            return [re.sub(r"[\W_]+", " ", key_of(path.stem))], ()
        if self.captions == "sidecar-txt":
            beside = path.with_suffix(".txt")
            data, problem = read_file(beside)
            lost = problem and problem != "empty file" and os.path.lexists(beside)
            return data.splitlines(), (f"text beside an image: {problem}",) if lost else ()
        return [], ()


def read_file(path: Path) -> tuple[bytes, str]:
    """A file's bytes and an empty string, or no bytes and the reason why it has to be dropped."""
    try:
        # A pipe that came in the place of a file since the listing must not block.
        with open(path, "rb", opener=lambda p, f: os.open(p, f | os.O_NONBLOCK)) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                return b"", "unreadable"
            if not status.st_size:
                return b"", "empty file"
            if status.st_size > MAX_BYTES:
                return b"", "more bytes than the limit"
            return file.read(MAX_BYTES + 1), ""
    except (OSError, ValueError):  # gone, or not ours to read; a zero byte in the name
        return b"", "unreadable"


def key_of(path: str) -> str:
    """A path as valid Unicode, unique: names that are not UTF-8 get a digest of their bytes."""
    data = os.fsencode(path)
    text = data.decode("utf-8", "replace")
    if text.encode() == data:
        return text
    return f"{text}#{hashlib.sha256(data).hexdigest()[:8]}"


def annotation_path(pattern: str, path: str) -> str:
    """Where an image's annotation lies, relative to the input's folder, as ``path`` is.

    ``{path}`` is ``path`` without its suffix, ``{folder}`` and ``{stem}`` are its two parts. As in
    a shell ``{stem%_rgb}`` is without the ending ``_rgb``, ``{path#images/}`` without that
    beginning.
    """
    whole = os.path.splitext(path)[0]
    fields = {"path": whole, "folder": os.path.dirname(whole) or "."}
    fields["stem"] = os.path.basename(whole)

    def fill(match: re.Match) -> str:
        name, side, part = match.groups()
        value = fields[name]
        if side:
            value = value.removesuffix(part) if side == "%" else value.removeprefix(part)
        return value.lstrip("/")

    return os.path.normpath(_FIELD.sub(fill, pattern))


def list_folder(
    root: Path,
    progress: Callable[[int], None] = no_progress,
    annotations: Wanted = (),
    captions: str = "none",
) -> list[Unit]:
    """Every image below ``root``, by path, but none that is the annotation of another. What is an
    image is told by the suffix, of other files by their first bytes; those that are none are
    counted by suffix, in a last unit for each.

    Links are followed, loops are not: a folder is entered once. What cannot be opened is listed
    too, so that it is counted.

    Args:
      progress: called with the number of files found since the last call.
      annotations, captions: as the reader has them.

    Raises:
      UserError: if there is no such folder, or no image in it; if a pattern of an annotation
        does not tell images apart.
    """
    for name, pattern in annotations:
        fields = {match[1] for match in _FIELD.finditer(pattern)}
        if not fields & {"path", "stem"} or re.search("[{}]", _FIELD.sub("", pattern)):
            raise UserError(
                f"--annotation {name}={pattern}: give a path with {{path}} or {{stem}} in it, such "
                "as ../masks/{path}.png"
            )
    if not root.is_dir():
        raise UserError(f"--input {root}: {'not a folder' if root.exists() else 'no such folder'}")
    found: list[str] = []
    broken: list[str] = []
    others: dict[str, list[str]] = collections.defaultdict(list)
    used = {os.path.splitext(pattern)[1].lower() for _, pattern in annotations}
    used |= {".txt"} if captions == "sidecar-txt" else set()
    entered = {(root.stat().st_dev, root.stat().st_ino)}

    def unreadable(error: OSError) -> None:
        broken.append(os.path.relpath(error.filename, root))

    for folder, subfolders, files in os.walk(root, followlinks=True, onerror=unreadable):
        subfolders.sort()
        subfolders[:] = [name for name in subfolders if _enter(Path(folder, name), entered)]
        before = len(found)
        for name in files:
            path = os.path.relpath(os.path.join(folder, name), root)
            suffix = os.path.splitext(name)[1].lower()
            if suffix in SUFFIXES or _is_image(suffix, os.path.join(folder, name)):
                found.append(path)
            elif suffix not in used:
                others[suffix].append(path)
        progress(len(found) - before)
    if not found:
        detail = f" ({len(broken)} folders could not be read)" if broken else ""
        kinds = ", ".join(
            f"{len(paths):,} of {name or 'no suffix'}" for name, paths in others.items()
        )
        detail += f"; other files: {kinds}" if others else ""
        raise UserError(f"--input {root}: no image files in it{detail}")
    units: list[Unit] = [{"path": path, "drop": "unreadable folder"} for path in broken]
    patterns = [pattern for _, pattern in annotations]
    theirs = {path: {annotation_path(p, path) for p in patterns} for path in found if patterns}
    taken = {other for path, others in theirs.items() for other in others - {path}}
    for path in found:
        if path in theirs.get(path, ()) and path not in taken:
            units.append({"path": path, "drop": "annotation without image"})
        elif path not in taken:
            units.append({"path": path})
    units.sort(key=lambda unit: os.fsencode(unit["path"]))
    for suffix, paths in sorted(others.items()):
        note = f"file of another kind, ignored: {key_of(suffix) or 'no suffix'}"
        examples = [key_of(path) for path in sorted(paths)[:EXAMPLES]]
        more = {"note": note, "count": len(paths), "examples": examples}
        units.append({"path": suffix, "size": 0, **more})
    return units


def _is_image(suffix: str, path: str) -> bool:
    """Whether a file of an unknown suffix begins as images do."""
    if suffix in _NO_IMAGES:
        return False
    try:
        with open(path, "rb", opener=lambda p, f: os.open(p, f | os.O_NONBLOCK)) as file:
            regular = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
            return regular and format_of(file.read(MAGIC_BYTES)) is not None
    except OSError:
        return False


def _enter(folder: Path, entered: set[tuple[int, int]]) -> bool:
    try:
        status = folder.stat()
    except OSError:
        return True  # os.walk will meet the same error and report it
    identity = (status.st_dev, status.st_ino)
    if identity in entered:
        return False
    entered.add(identity)
    return True
