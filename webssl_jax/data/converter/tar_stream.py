"""Tar files as a stream of members, with every damage found instead of taken for the end.

``tarfile`` ends quietly at a header that it cannot read, and at a file that stops between two
members. Here each is a :class:`TarDamage`, because what lies behind is lost and somebody must hear
of it. One thing cannot be seen: that zeros have overwritten the last 10 kB, for zeros are how tars
end. POSIX ustar, PAX and GNU long names; plain, gzip or zstd, told apart by content. Nothing is
ever written to disk.
"""

from __future__ import annotations

import dataclasses
import gzip
import os
import tarfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import pyarrow

_BLOCK = 512
_CHUNK = 1 << 20
_MOST_PADDING = 1024 + 10240  # end marker, and what tar fills its last record with
_MAX_EXTENSION = 1 << 20  # bytes of a PAX header or a long name
_FILE_TYPES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_WITHOUT_DATA = (
    tarfile.LNKTYPE,
    tarfile.SYMTYPE,
    tarfile.CHRTYPE,
    tarfile.BLKTYPE,
    tarfile.DIRTYPE,
    tarfile.FIFOTYPE,
)
_ERRORS = (OSError, EOFError, zlib.error, pyarrow.ArrowException)


class TarDamage(Exception):
    """The archive cannot be read on. ``offset`` counts bytes of the tar, not of its gzip."""

    def __init__(self, offset: int, problem: str):
        super().__init__(f"byte {offset:,}: {problem}")


@dataclasses.dataclass(frozen=True)
class Member:
    """``kind`` is "file", "folder", "other" (links, devices, sparse files) or "gap": there are
    members behind an end marker, so the tar was joined from several, or a part was overwritten.

    ``data`` is None where the file is larger than the limit given for its name. ``offset``: of its
    first header, in the tar's own bytes.
    """

    name: str
    kind: str
    data: bytes | None = None
    offset: int = 0


def open_tar(file: BinaryIO) -> Any:
    """A stream of the tar's own bytes, whatever the name says of its compression.

    Raises:
      OSError: if the file cannot be read.
    """
    magic = file.read(4)
    file.seek(0)
    if magic[:2] == b"\x1f\x8b":
        return gzip.GzipFile(fileobj=file)
    if magic == b"\x28\xb5\x2f\xfd":
        return pyarrow.CompressedInputStream(pyarrow.PythonFile(file, "r"), "zstd")
    return file


class Piece:
    """A part of a plain tar, as a stream."""

    def __init__(self, file: BinaryIO, begin: int, end: int):
        file.seek(begin)
        self._file, self._left = file, end - begin

    def read(self, size: int) -> bytes:
        data = self._file.read(min(size, self._left))
        self._left -= len(data)
        return data


def members(
    stream: Any, limit: Callable[[str], int], begin: int = 0, last: bool = True, seek: bool = False
) -> Iterator[Member]:
    """Members in the order of the archive, one in memory at a time.

    Args:
      stream: what :func:`open_tar` returned.
      limit: from a member's name the largest file to load, in bytes; negative: none.
      begin, last: of a piece where it begins in the tar, and whether it is the last.
      seek: what is not loaded is jumped over instead of read. For plain files.

    Raises:
      TarDamage: when nothing more can be read, after all members that lie before.
    """
    source = _Source(stream, begin, seek)
    overrides: dict[str, str] = {}
    ended = 0  # bytes of zeros
    offset = begin  # of the first header of a member
    while block := source.block():
        if not block.strip(b"\0"):
            ended += _BLOCK
            continue
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            where = "bytes behind the end" if ended else "no valid header"
            raise TarDamage(source.offset - _BLOCK, where) from None
        if ended:
            ended = 0
            offset = source.offset - _BLOCK
            yield Member(f"byte {offset:,}", "gap")
        size = _number(overrides.get("size", header.size), source)
        if header.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
            overrides |= _pax(source.extension(size), source)
        elif header.type == tarfile.XGLTYPE:
            source.extension(size)  # of all members: dates and owners, in practice
        elif header.type == tarfile.GNUTYPE_LONGNAME:
            long_name = source.extension(size).split(b"\0", 1)[0]
            overrides["path"] = long_name.decode("utf-8", "surrogateescape")
        elif header.type == tarfile.GNUTYPE_LONGLINK:
            source.extension(size)
        else:
            name = overrides.get("path", header.name)
            sparse = any(key.startswith("GNU.sparse.") for key in overrides)
            overrides = {}
            if header.type == tarfile.DIRTYPE:
                kind = "folder"
            else:
                kind = "file" if header.type in _FILE_TYPES and not sparse else "other"
            if header.type in _WITHOUT_DATA:  # whatever their size says (POSIX)
                size = 0
            wanted = kind == "file" and size <= limit(name)
            yield Member(name, kind, source.read(size, wanted), offset)
            offset = source.offset
    if overrides:
        raise TarDamage(source.offset, "ends before the member that a long name announces")
    if not ended and last:
        problem = "ends without its end marker" if source.offset else "zero bytes"
        raise TarDamage(source.offset, problem)
    if ended > _MOST_PADDING:
        raise TarDamage(source.offset, f"{ended:,} zeros where tars end with less")


class _Source:
    """Reads whole blocks and knows where it is."""

    def __init__(self, stream: Any, offset: int, seek: bool):
        self._stream, self._seek = stream, seek
        self.offset = offset

    def _exactly(self, size: int) -> bytes:
        parts, left = [], size
        while left:
            try:
                part = self._stream.read(min(left, _CHUNK))
            except _ERRORS as error:
                raise TarDamage(self.offset, f"{type(error).__name__}: {error}") from None
            if not part:
                break
            parts.append(part)
            left -= len(part)
            self.offset += len(part)
        return b"".join(parts)

    def block(self) -> bytes:
        """512 bytes, or none at the end of the file."""
        block = self._exactly(_BLOCK)
        if 0 < len(block) < _BLOCK:
            raise TarDamage(self.offset, "truncated")
        return block

    def read(self, size: int, wanted: bool) -> bytes | None:
        """A member's data, and past its padding; None if it is not wanted."""
        padding = -size % _BLOCK
        if wanted:
            data = self._exactly(size)
            if len(data) < size or len(self._exactly(padding)) < padding:
                raise TarDamage(self.offset, "truncated")
            return data
        left = size + padding
        if self._seek:
            self._stream.seek(left, os.SEEK_CUR)
            self.offset += left
            return None
        while left:
            part = len(self._exactly(min(left, _CHUNK)))
            if not part:
                raise TarDamage(self.offset, "truncated")
            left -= part
        return None

    def extension(self, size: int) -> bytes:
        data = self.read(size, size <= _MAX_EXTENSION)
        if data is None:
            raise TarDamage(self.offset, "a header of more than 1 MiB")
        return data


def _number(value: int | str, source: _Source) -> int:
    if isinstance(value, str):
        value = int(value) if value.isascii() and value.isdigit() and len(value) < 20 else -1
    if value < 0:
        raise TarDamage(source.offset, "a member's size is no number")
    return value


def _pax(data: bytes, source: _Source) -> dict[str, str]:
    """Records ``<length> <key>=<value>\\n`` of a PAX header: those that are of interest here."""
    found = {}
    while data:
        length, _, _ = data[:20].partition(b" ")
        end = int(length) if length.isdigit() else 0
        key, equals, value = data[len(length) + 1 : end - 1].partition(b"=")
        if not equals or end > len(data) or data[end - 1 : end] != b"\n":
            raise TarDamage(source.offset, "broken PAX header")
        name = key.decode("utf-8", "replace")
        if name in ("path", "size") or name.startswith("GNU.sparse."):
            found[name] = value.decode("utf-8", "surrogateescape")
        data = data[end:]
    return found
