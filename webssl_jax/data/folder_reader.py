"""Folder trees of image files as input of the converter: what is in them, and how one is read."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from webssl_jax.config import UserError
from webssl_jax.data.converter import Candidate, Dropped, Unit

SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .webp .gif .bmp .tif .tiff .ppm .pgm .avif .jp2 .tga .mpo".split()
)
LABELS = ("none", "folder")
CAPTIONS = ("none", "sidecar-txt", "filename")
_HEAD = 1 << 14  # bytes that tell nearly all files of one size apart


@dataclasses.dataclass(frozen=True)
class FolderReader:
    """Reads the files that :func:`list_folder` found. See ``converter.Reader``.

    ``label_from``: "folder" takes the first folder below the root. ``captions``: "sidecar-txt"
    takes each line of the text file beside the image as one caption, "filename" the name's words.
    """

    root: str
    source: str
    label_from: str = "none"
    captions: str = "none"

    def read(self, unit: Unit) -> Iterator[Candidate | Dropped]:
        path = PurePosixPath(unit["path"])
        key = key_of(unit["path"])
        if "drop" in unit:
            yield Dropped(key, unit["drop"])
            return
        full = Path(self.root) / path
        try:
            data = full.read_bytes()
            captions = self._captions(full)
        except OSError:  # gone, or not ours to read, since the listing
            yield Dropped(key, "unreadable")
            return
        if not data:
            yield Dropped(key, "empty file")
            return
        folder = path.parts[0] if len(path.parts) > 1 else None
        label = key_of(folder) if self.label_from == "folder" and folder else None
        yield Candidate(key, data, captions, label)

    def _captions(self, path: Path) -> tuple[str, ...]:
        if self.captions == "filename":
            words = re.sub(r"[\W_]+", " ", key_of(path.stem)).strip()
            return (words,) if words else ()
        if self.captions == "sidecar-txt":
            try:
                lines = path.with_suffix(".txt").read_text("utf-8-sig", "replace").splitlines()
            except FileNotFoundError:
                return ()
            return tuple(line.strip() for line in lines if line.strip())
        return ()


def key_of(path: str) -> str:
    """A path as valid Unicode, unique: names that are not UTF-8 get a digest of their bytes."""
    data = os.fsencode(path)
    text = data.decode("utf-8", "replace")
    if text.encode() == data:
        return text
    return f"{text}#{hashlib.sha256(data).hexdigest()[:8]}"


def list_folder(root: Path, progress: Callable[[int], None] = lambda n: None) -> list[Unit]:
    """Every file with an image's suffix below ``root``, by path, with those marked that are
    doubles.

    Links are followed, loops are not: a folder is entered once. Of files with equal bytes the first
    by path is the one kept. What cannot be opened is listed too, so that it is counted.

    Args:
      progress: called with the number of files found since the last call.

    Raises:
      UserError: if there is no such folder, or no image in it.
    """
    if not root.is_dir():
        raise UserError(f"--input {root}: {'not a folder' if root.exists() else 'no such folder'}")
    found: dict[str, int | None] = {}  # path -> size; None where that cannot be had
    broken: list[str] = []
    entered = {(root.stat().st_dev, root.stat().st_ino)}

    def unreadable(error: OSError) -> None:
        broken.append(os.path.relpath(error.filename, root))

    for folder, subfolders, files in os.walk(root, followlinks=True, onerror=unreadable):
        subfolders.sort()
        subfolders[:] = [name for name in subfolders if _enter(Path(folder, name), entered)]
        before = len(found)
        for name in files:
            if os.path.splitext(name)[1].lower() in SUFFIXES:
                path = os.path.join(folder, name)
                found[os.path.relpath(path, root)] = _size(path)
        progress(len(found) - before)
    if not found:
        detail = f" ({len(broken)} folders could not be read)" if broken else ""
        raise UserError(f"--input {root}: no image files in it{detail}")
    doubles = _doubles(root, found)
    units: list[Unit] = [{"path": path, "drop": "unreadable folder"} for path in broken]
    for path, size in found.items():
        if size is None:
            units.append({"path": path, "drop": "unreadable"})
        elif path in doubles:
            units.append({"path": path, "drop": "duplicate"})
        else:
            units.append({"path": path})
    return sorted(units, key=lambda unit: os.fsencode(unit["path"]))


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


def _size(path: str) -> int | None:
    """Bytes of a regular file; None for a broken link, a pipe, a device."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def _doubles(root: Path, sizes: dict[str, int | None]) -> set[str]:
    """Paths whose bytes another path before them has. Reads only files that share size and head."""
    doubles: set[str] = set()
    by_size = collections.defaultdict(list)
    for path in sorted(sizes, key=os.fsencode):
        if sizes[path]:
            by_size[sizes[path]].append(path)
    for same_size in by_size.values():
        for same_head in _group(root, same_size, _HEAD):
            for same in _group(root, same_head, None):
                doubles.update(same[1:])
    return doubles


def _group(root: Path, paths: list[str], length: int | None) -> list[list[str]]:
    """Groups of two or more with equal digests of the first ``length`` bytes (None: of all)."""
    if len(paths) < 2:
        return []
    groups = collections.defaultdict(list)
    for path in paths:
        digest = hashlib.sha256()
        try:
            with open(root / path, "rb") as file:
                if length is not None:
                    digest.update(file.read(length))
                else:
                    while block := file.read(1 << 20):
                        digest.update(block)
        except OSError:
            continue  # the reader will count it as unreadable
        groups[digest.digest()].append(path)
    return [group for group in groups.values() if len(group) > 1]
