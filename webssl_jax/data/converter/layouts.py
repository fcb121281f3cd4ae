"""Data sets as their owners distribute them, as input of the converter: folders, or the zip itself.

============  ============================================================  ==========
layout        where, below the input or one or two folders deeper           annotation
============  ============================================================  ==========
ade20k        images/training/*.jpg, annotations/training/*.png             mask
voc2012       the list ImageSets/Segmentation/train.txt; JPEGImages,        mask
              SegmentationClass (SegmentationClassAug for trainaug)
cityscapes    leftImg8bit/train/CITY/*_leftImg8bit.png,                     mask
              gtFine/train/CITY/*_gtFine_labelIds.png
pairs         a list: in each line an image and its depth, with spaces      depth
              between (NYUd, KITTI, SUN as the depth literature lists them)
imagenet      labelled images: see ``imagenet_layout.py``
============  ============================================================  ==========

Masks and depths stay as they are; what their numbers mean is the evaluation's to say.
"""

from __future__ import annotations

import dataclasses
import functools
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath

from webssl_jax.config import UserError
from webssl_jax.data.converter.folder_reader import key_of, read_file
from webssl_jax.data.converter.imagenet_layout import list_imagenet
from webssl_jax.data.converter.items import MAX_BYTES, Candidate, Dropped, Item, Unit, no_progress

MASKS = ("ade20k", "voc2012", "cityscapes")
LAYOUTS = (*MASKS, "pairs", "imagenet")
# What the data sets call the parts that everybody calls train and val.
_PARTS = {"ade20k": {"train": "training", "val": "validation"}}
_NO_DEPTH = "None"  # how KITTI's list writes that an image has none


@dataclasses.dataclass(frozen=True)
class PairReader:
    """Reads the pairs that :func:`list_layout` found. See ``items.Reader``.

    annotation: its name; "" of labelled images, which have none. root, other: folders that images
    and annotations are relative to; or ``root`` is a zip of both.
    """

    root: str
    other: str
    source: str
    annotation: str

    def read(self, unit: Unit, advance: Callable[[int], None] = no_progress) -> Iterator[Item]:
        """See ``items.Reader``."""
        key = key_of(unit["path"])
        data, problem = self._read(self.root, unit["path"])
        if problem:
            yield Dropped(key, problem)
            return
        if not self.annotation:
            yield Candidate(key, data, label=unit["label"])
            return
        if not unit["beside"]:
            yield Dropped(key, f"image without annotation {self.annotation!r}")
            return
        beside, problem = self._read(self.other, unit["beside"])
        yield Candidate(key, data, annotations={self.annotation: beside or problem})

    def _read(self, root: str, path: str) -> tuple[bytes, str]:
        if not _is_zip(root):
            return read_file(Path(root, path))
        try:
            archive = _opened(root)
            if archive.getinfo(path).file_size > MAX_BYTES:
                return b"", "more bytes than the limit"
            data = archive.read(path)
        except KeyError:
            return b"", "unreadable"
        except (zipfile.BadZipFile, OSError, zlib.error, RuntimeError, NotImplementedError):
            return b"", "damaged member of a zip"
        return (data, "") if data else (b"", "empty file")


def list_layout(
    layout: str, root: Path, part: str, files: Path | None = None, other: Path | None = None
) -> tuple[str, str, list[Unit]]:
    """The folder (or zip) of images, that of annotations, and the pairs, by path.

    Args:
      root: as given to ``--input``. part: train, val or another that the data set has.
      files, other: of ``pairs``: the list, and the folder of depths where that is another one.
        files: of ``imagenet``: see ``list_imagenet``.

    Raises:
      UserError: if the data set is not there, or a line of a list cannot be read.
    """
    if not root.exists():
        raise UserError(f"--input {root}: no such folder or zip")
    if layout == "imagenet":
        if not root.is_dir() or other:
            raise UserError(
                "--layout imagenet: --input must be a folder, without --annotation-root"
            )
        return str(root), str(root), list_imagenet(root, part, files)
    if layout == "pairs":
        if files is None:
            raise UserError("--layout pairs: give the list of its files with --list")
        return str(root), str(other or root), _listed_pairs(files)
    if files or other:
        raise UserError(f"--list, --annotation-root: not with --layout {layout}")
    folder = _PARTS.get(layout, {}).get(part, part)
    names = _zip_names(root) if root.is_file() else None
    find = {"ade20k": _ade20k, "voc2012": _voc2012, "cityscapes": _cityscapes}[layout]
    tree = _Tree(root, names)
    units = find(tree, folder)
    if not units:
        raise UserError(
            f"--input {root}: no {layout} in it, or no part {part!r} of it; expected "
            f"{_EXPECTED[layout].format(part=folder)}"
        )
    return str(root), str(root), sorted(units, key=lambda unit: unit["path"])


_EXPECTED = {
    "ade20k": "images/{part}/*.jpg and annotations/{part}/*.png",
    "voc2012": "ImageSets/Segmentation/{part}.txt, JPEGImages and SegmentationClass",
    "cityscapes": "leftImg8bit/{part}/*/*_leftImg8bit.png and gtFine/{part}",
}


class _Tree:
    """Files of a folder or of a zip (``names``), by patterns below any of the first folders."""

    def __init__(self, root: Path, names: Sequence[str] | None):
        self._root, self._names = root, names
        self._known = frozenset(names or ())

    def match(self, pattern: str) -> list[str]:
        """Paths that match, at the top or one or two folders deeper."""
        patterns = [prefix + pattern for prefix in ("", "*/", "*/*/")]
        if self._names is None:
            found = [self._root.glob(one) for one in patterns]
            return [path.relative_to(self._root).as_posix() for one in found for path in one]
        return [
            name
            for name in self._names
            if any(_matches(PurePosixPath(name), PurePosixPath(one)) for one in patterns)
        ]

    def there(self, path: str) -> str:
        """``path``, or an empty string where there is no such file."""
        if self._names is None:
            return path if (self._root / path).exists() else ""
        return path if path in self._known else ""

    def text(self, path: str) -> str:
        """A small file."""
        if self._names is None:
            return (self._root / path).read_text("utf-8")
        return _opened(str(self._root)).read(path).decode("utf-8")


def _matches(path: PurePosixPath, pattern: PurePosixPath) -> bool:
    return len(path.parts) == len(pattern.parts) and path.match(str(pattern))


def _ade20k(tree: _Tree, part: str) -> list[Unit]:
    units: list[Unit] = []
    for path in tree.match(f"images/{part}/*.jpg"):
        top, _, name = path.rpartition(f"images/{part}/")
        beside = f"{top}annotations/{part}/{name.removesuffix('.jpg')}.png"
        units.append({"path": path, "beside": tree.there(beside)})
    return units


def _voc2012(tree: _Tree, part: str) -> list[Unit]:
    units: list[Unit] = []
    masks = "SegmentationClassAug" if part == "trainaug" else "SegmentationClass"
    for list_ in tree.match(f"ImageSets/Segmentation/{part}.txt"):
        top = list_.removesuffix(f"ImageSets/Segmentation/{part}.txt")
        for name in tree.text(list_).split():
            beside = tree.there(f"{top}{masks}/{name}.png")
            units.append({"path": f"{top}JPEGImages/{name}.jpg", "beside": beside})
    return units


def _cityscapes(tree: _Tree, part: str) -> list[Unit]:
    units: list[Unit] = []
    for path in tree.match(f"leftImg8bit/{part}/*/*_leftImg8bit.png"):
        top, _, name = path.rpartition(f"leftImg8bit/{part}/")
        name = name.removesuffix("_leftImg8bit.png")
        beside = tree.there(f"{top}gtFine/{part}/{name}_gtFine_labelIds.png")
        units.append({"path": path, "beside": beside})
    return units


def _listed_pairs(files: Path) -> list[Unit]:
    try:
        lines = files.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--list {files}: cannot be read ({error})") from error
    units: list[Unit] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        fields = line.split()
        if len(fields) < 2:
            raise UserError(
                f"--list {files}, line {number}: {line.strip()[:60]!r} is not an image and its "
                "depth with a space between"
            )
        image, beside = (field.lstrip("/") for field in fields[:2])
        units.append({"path": image, "beside": "" if beside == _NO_DEPTH else beside})
    if not units:
        raise UserError(f"--list {files}: names no image")
    return units


def _zip_names(path: Path) -> list[str]:
    try:
        return _opened(str(path)).namelist()
    except (zipfile.BadZipFile, OSError) as error:
        raise UserError(f"--input {path}: no folder, and no whole zip ({error})") from error


@functools.lru_cache(maxsize=16)
def _is_zip(path: str) -> bool:
    return zipfile.is_zipfile(path)


@functools.lru_cache(maxsize=4)
def _opened(path: str) -> zipfile.ZipFile:
    """One a process: reading its list of members takes longer than reading one of them."""
    return zipfile.ZipFile(path)
