"""ImageNet-1k and ImageNet-V2 as their owners distribute them, unpacked, as input of the converter.

============  ==============================================================================
part          where, below the input or one or two folders deeper
============  ==============================================================================
train         train/n01440764/*.JPEG
val           val/n01440764/*.JPEG; or val/*.JPEG, and whose label is which in the file
              LOC_val_solution.csv (Kaggle) or the folder ILSVRC2012_devkit_t12
v2            imagenetv2-*/0/*.jpeg to 999: classes in the order of their WordNet numbers
============  ==============================================================================

Labels are WordNet numbers. All 1,000 classes must be there: their order gives them their numbers.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path

from webssl_jax.config import UserError
from webssl_jax.data.converter.items import Unit
from webssl_jax.data.imagenet import wordnet_numbers

PARTS = ("train", "val", "v2")
SUFFIXES = (".jpeg", ".jpg")
_DEVKIT = ("data/meta.mat", "data/ILSVRC2012_validation_ground_truth.txt")


def list_imagenet(root: Path, part: str, labels: Path | None = None) -> list[Unit]:
    """Images and their labels, by path.

    Args:
      labels: of a ``val`` without folders: LOC_val_solution.csv, or the devkit's folder.

    Raises:
      UserError: if the part is not there, a class is missing or is none of ImageNet's, or an image
        has no label.
    """
    if part not in PARTS:
        raise UserError(f"--part {part}: of imagenet must be one of {', '.join(PARTS)}")
    folder = _folder(root, part)
    flat = [path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES]
    if flat:
        units = _flat(root, folder, flat, labels)
    elif labels:
        raise UserError(f"--list {labels}: {folder} has a folder for each class, which are labels")
    else:
        units = _in_folders(root, folder, part)
    missing = set(wordnet_numbers()) - {unit["label"] for unit in units}
    if missing:
        raise UserError(
            f"{folder}: {len(missing):,} of ImageNet's 1,000 classes have no image, "
            f"{min(missing)} for one; their order would give others wrong numbers. Complete it, or "
            "take make_records folder --label-from folder"
        )
    return sorted(units, key=lambda unit: unit["path"])


def _folder(root: Path, part: str) -> Path:
    name = "imagenetv2-*" if part == "v2" else part
    found = [x for deep in ("", "*/", "*/*/") for x in sorted(root.glob(deep + name)) if x.is_dir()]
    if part == "v2" and root.name.startswith("imagenetv2-"):
        found = [root]
    if len(found) != 1:
        several = f", but {', '.join(str(x) for x in found[:3])}" if found else ""
        raise UserError(f"--input {root}: must hold one folder {name}{several}")
    return found[0]


def _in_folders(root: Path, folder: Path, part: str) -> list[Unit]:
    names = wordnet_numbers()
    of = {str(i): name for i, name in enumerate(names)} if part == "v2" else dict(zip(names, names))
    units: list[Unit] = []
    for inner in sorted(x for x in folder.iterdir() if x.is_dir()):
        if inner.name not in of:
            expected = "0 to 999" if part == "v2" else "a WordNet number of ImageNet-1k"
            raise UserError(f"{inner}: is not {expected}")
        units += (_unit(root, x, of[inner.name]) for x in inner.iterdir() if _is_image(x))
    return units


def _flat(root: Path, folder: Path, files: Iterable[Path], labels: Path | None) -> list[Unit]:
    if labels is None:
        raise UserError(
            f"{folder}: has no folder for each class; give LOC_val_solution.csv or the folder "
            "ILSVRC2012_devkit_t12 with --list"
        )
    of = _of_devkit(labels) if labels.is_dir() else _of_csv(labels)
    units = []
    for path in files:
        label = of.get(path.stem)
        if label is None:
            raise UserError(f"--list {labels}: has no label of {path.name}")
        units.append(_unit(root, path, label))
    return units


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES


def _unit(root: Path, path: Path, label: str) -> Unit:
    return {"path": path.relative_to(root).as_posix(), "beside": "", "label": label}


def _of_csv(path: Path) -> Mapping[str, str]:
    """Kaggle's: a line has an image's name, and its label and boxes, ``n03995372 85 1 499 272``."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        of = {row["ImageId"]: row["PredictionString"].split()[0] for row in rows}
    except (OSError, UnicodeDecodeError, KeyError, IndexError, AttributeError, csv.Error) as error:
        raise UserError(f"--list {path}: is no LOC_val_solution.csv ({error!r})") from error
    return _known(path, of)


def _of_devkit(folder: Path) -> Mapping[str, str]:
    """The devkit's own numbers are 1 to 1,000 in another order; meta.mat says which is which."""
    from scipy.io import loadmat

    meta, truth = (folder / name for name in _DEVKIT)
    try:
        synsets = loadmat(meta, squeeze_me=True)["synsets"]
        of = {int(one["ILSVRC2012_ID"]): str(one["WNID"]) for one in synsets}
        labels = [of[int(line)] for line in truth.read_text("utf-8").split()]
    except (OSError, ValueError, KeyError, UnicodeDecodeError, TypeError) as error:
        raise UserError(
            f"--list {folder}: no devkit, {_DEVKIT} cannot be read ({error!r})"
        ) from error
    return _known(folder, {f"ILSVRC2012_val_{i:08d}": x for i, x in enumerate(labels, 1)})


def _known(path: Path, of: dict[str, str]) -> dict[str, str]:
    wrong = sorted(set(of.values()) - set(wordnet_numbers()))
    if wrong:
        raise UserError(f"--list {path}: {wrong[0]!r} is no WordNet number of ImageNet-1k")
    return of
