"""ImageNet's other test sets, for a head trained on ImageNet-1k: nothing is tuned on them.

ReaL (Beyer et al. 2020): several right labels an image of the validation set, or none, and then the
image is left out. V2, Sketch: 1,000 classes. A, R: 200 classes each; only these are compared. C:
the mean over 15 corruptions of (mean error over five levels / AlexNet's), relative to AlexNet's.
The records' labels must be those of the training records: WordNet numbers, ``n01440764``.
"""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from webssl_jax.config import UserError
from webssl_jax.data.imagenet import wordnet_numbers
from webssl_jax.data.pipeline import read_each
from webssl_jax.evaluators import datasets
from webssl_jax.evaluators.datasets import Dataset

CLASSES = 1000
LEVELS = (1, 2, 3, 4, 5)
# Mean errors over the five levels, of Hendrycks & Dietterich 2019 (arXiv 1903.12261). The four
# extra corruptions (speckle noise, Gaussian blur, spatter, saturate) are not of the mean.
ALEXNET = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}
_AGREE, _ENOUGH = 0.6, 20  # ImageNet's own labels are right by ReaL in 90.02 % of its images
_NUMBER = re.compile(r"val_(\d{8})")


class Others(NamedTuple):
    """Other test sets, opened. sets: (name, records, whether only their classes are compared).
    real: a file, or ""."""

    sets: tuple[tuple[str, Dataset, bool], ...]
    real: str

    @classmethod
    def of(cls, options: Any) -> Others:
        """Those of a row.

        Raises:
          UserError: if there are no such shards, or no such file.
        """
        wanted = [(name, getattr(options, name)) for name in ("v2", "sketch", "a", "r")]
        if options.c:
            wanted += [
                (f"c/{name}/{level}", options.c.format(corruption=name, level=level))
                for name in ALEXNET
                for level in LEVELS
            ]
        if options.real:
            _read(options.real)
        return cls(
            tuple(
                (
                    name,
                    datasets.open_dataset(shards, datasets.LABELLED, greyscale=options.greyscale),
                    name in ("a", "r"),
                )
                for name, shards in wanted
                if shards
            ),
            options.real,
        )

    @property
    def identity(self) -> str:
        """Of all of them; "" of none."""
        known = [data.identity for _, data, _ in self.sets]
        known += [pathlib.Path(self.real).read_text()] if self.real else []
        return f"-{datasets.fingerprint(known)}" if known else ""

    @staticmethod
    def allowed(dataset: Dataset, classes: tuple[str, ...]) -> np.ndarray:
        """(C,) bool: the classes that occur in a data set."""
        numbers = [int(i) for i in dataset.indices]
        labels = {label for _, label in read_each(dataset.source, lambda r: r.label, numbers)}
        return np.isin(np.array(classes), sorted(labels))


def read_real(
    path: str, dataset: Dataset, numbers: np.ndarray, labels: np.ndarray, classes: tuple[str, ...]
) -> np.ndarray:
    """(n, C) bool: the right classes of validation images, the records ``numbers`` (n,), whose own
    labels are ``labels`` (n,).

    Args:
      path: JSON, for each validation image in the order of the file names its class numbers, as
        google-research/reassessed-imagenet (real.json) and timm have it. Class numbers are those
        of sorted WordNet numbers.

    Raises:
      UserError: if the classes are not ImageNet's in their order, an image's key has no validation
        number, the file is too short, or what it says hardly ever agrees with the labels.
    """
    real = _read(path)
    if len(classes) != CLASSES:
        raise UserError(f"real = {path}: is for {CLASSES} classes, here are {len(classes)}")
    if classes not in (wordnet_numbers(), tuple(map(str, range(CLASSES)))):
        raise UserError(
            f"real = {path}: labels must be ImageNet's WordNet numbers (make_records layout "
            f"--layout imagenet), or 0 to 999 in their order; here {classes[0]!r} is the first"
        )
    keys = dict(read_each(dataset.source, lambda record: record.key, numbers.tolist()))
    valid = np.zeros((len(numbers), CLASSES), bool)
    for row, number in enumerate(numbers.tolist()):
        found = _NUMBER.search(keys.get(number, ""))
        if found is None or not 0 < int(found[1]) <= len(real):
            raise UserError(
                f"real = {path}: {dataset.source.describe(number)} has the key "
                f"{keys.get(number)!r}; keys must hold the validation file's name, "
                f"ILSVRC2012_val_00000001 to {len(real):08d}"
            )
        valid[row, real[int(found[1]) - 1]] = True
    agree = valid[np.arange(len(labels)), labels][valid.any(axis=1)]
    if len(agree) >= _ENOUGH and agree.mean() < _AGREE:
        raise UserError(
            f"real = {path}: the labels of {dataset.source.describe(int(numbers[0]))}, ... are "
            f"right by ReaL in {100 * agree.mean():.0f} % of {len(agree):,} images, where 90 % "
            "are; their numbers are of another order of classes, or these are not the validation "
            "images"
        )
    return valid


def corruption_errors(hits: Mapping[str, np.ndarray]) -> dict[str, float]:
    """{"c_mce": mean corruption error, and the same of each metric} of hits (n,) under the names
    ``c/CORRUPTION/LEVEL_METRIC``; {} without such. 1 is AlexNet."""
    errors: dict[str, dict[str, list[float]]] = {}
    for name, hit in hits.items():
        if name.startswith("c/"):
            _, corruption, rest = name.split("/")
            _, _, metric = rest.partition("_")
            kinds = errors.setdefault(metric, {})
            kinds.setdefault(corruption, []).append(1 - float(hit.mean()))
    return {
        f"c_mce_{metric}": float(np.mean([np.mean(x) / ALEXNET[name] for name, x in kinds.items()]))
        for metric, kinds in errors.items()
    }


def _read(path: str) -> list[list[int]]:
    try:
        real = json.loads(pathlib.Path(path).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"real = {path}: cannot be read ({error})") from error
    if not isinstance(real, list) or not all(
        isinstance(each, list) and all(type(x) is int and 0 <= x < CLASSES for x in each)
        for each in real
    ):
        raise UserError(f"real = {path}: must hold a list of lists of class numbers below 1,000")
    return real
