"""Images as a user has them: a folder tree of image files, or shards of records."""

from __future__ import annotations

import functools
import hashlib
import pathlib

from webssl_jax.config import UserError
from webssl_jax.data import records
from webssl_jax.data.converter.folder_reader import FolderReader, key_of, list_folder
from webssl_jax.data.converter.items import Candidate, Dropped
from webssl_jax.data.pipeline import Source
from webssl_jax.data.sources import SUFFIX, ArrayRecordSource, DamagedRecord


def open_images(images: str, flag: str = "images") -> Source:
    """A folder with image files anywhere below it, or shards as :class:`ArrayRecordSource` takes
    them. flag: what named ``images``, for messages.

    Raises:
      UserError: if there is neither.
    """
    folder = pathlib.Path(images)
    if not folder.is_dir() or any(folder.glob(f"*{SUFFIX}")):
        return ArrayRecordSource(images)
    try:
        return ImageFolder(folder)
    except UserError as error:
        raise UserError(f"{flag} {images}: no image files and no *{SUFFIX} in it") from error


class ImageFolder:
    """A folder tree of image files as a source of records, sorted by path; the first folder below
    the root is an image's label, its path below the root its key."""

    def __init__(self, folder: pathlib.Path):
        self._units = list_folder(folder)
        self._folder = folder
        self._reader = FolderReader(str(folder), folder.name, label_from="folder")

    def __len__(self) -> int:
        return len(self._units)

    def __getitem__(self, index: int) -> bytes:
        """An encoded record.

        Raises:
          DamagedRecord: if the file cannot be read.
        """
        (item,) = self._reader.read(self._units[index])
        if isinstance(item, Dropped):
            raise DamagedRecord(item.reason)
        assert isinstance(item, Candidate)  # the reader makes notes of no file
        # The size is not asked for, and to know it would mean to decode.
        return records.encode(records.Record(item.data, (), item.key, 0, 0, "", item.label))

    def key(self, index: int) -> str:
        """Of an image, also of one that cannot be read."""
        return key_of(self._units[index]["path"])

    def describe(self, index: int) -> str:
        """For messages."""
        return str(self._folder / self._units[index]["path"])

    @functools.cached_property
    def identity(self) -> str:
        """A digest of all paths."""
        return hashlib.sha256("\0".join(map(self.key, range(len(self)))).encode()).hexdigest()
