"""What stands beside a segmentation: the commonest class, the commonest class of a pixel's colour,
and that of its place. Counting them reads every record once, so that what is wrong with one is
said before hours of training.
"""

from __future__ import annotations

import dataclasses
import logging

import numpy as np
from PIL import Image

from webssl_jax.config import UserError
from webssl_jax.data import annotations as annotation
from webssl_jax.data import records
from webssl_jax.data.decode import decode_image
from webssl_jax.data.dense_views import IGNORE, ClassTable
from webssl_jax.evaluators import datasets
from webssl_jax.evaluators.datasets import Dataset
from webssl_jax.evaluators.dense import scores
from webssl_jax.evaluators.dense.stream import read_all
from webssl_jax.evaluators.features import Cache
from webssl_jax.evaluators.outcome import Outcome, scored
from webssl_jax.evaluators.probes.labelled import MAJORITY

PROTOCOL = 1  # raised whenever the same records would get other figures
COLOURS = 6  # steps of each of red, green and blue
PLACES = 16  # rows and columns
_SHORT = 64  # pixels of the shorter side, at which training images are counted
log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Counts:
    """Labelled pixels of training images. of_class (C,): at full size. of_colour
    (6 * 6 * 6, C), of_place (16 * 16, C): of the images made small."""

    of_class: np.ndarray
    of_colour: np.ndarray
    of_place: np.ndarray

    def predictions(self, image: np.ndarray) -> dict[str, np.ndarray]:
        """{name: (H, W) uint8, the class of every pixel} of (H, W, 3) uint8."""
        height, width = image.shape[:2]
        common = int(self.of_class.argmax())
        return {
            MAJORITY: np.full((height, width), common, np.uint8),
            "colour": _best(self.of_colour, common)[colour_cells(image)],
            "place": _best(self.of_place, common)[place_cells(height, width)],
        }


def count(dataset: Dataset, classes: ClassTable, threads: int) -> Counts:
    """Reads all records of a training set.

    Raises:
      UserError: for a record that cannot be read, or where no pixel has a class.
    """
    number = len(classes.names)
    of_class = np.zeros(number, np.int64)
    of_colour = np.zeros((COLOURS**3, number), np.int64)
    of_place = np.zeros((PLACES**2, number), np.int64)

    def see(record: records.Record) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        mask = classes(record)
        image = decode_image(record.image, min_size=_SHORT)
        image.thumbnail((2 * _SHORT, 2 * _SHORT), Image.Resampling.BOX)
        counts = np.bincount(mask.ravel(), minlength=256)[:number]
        return counts, np.asarray(image), annotation.resize_mask(mask, *image.size)

    for _, (counts, image, mask) in read_all(dataset, see, dataset.indices, threads):
        of_class += counts
        known = mask != IGNORE
        labels = mask[known].astype(np.int64)
        for table, cells in (
            (of_colour, colour_cells(image)),
            (of_place, place_cells(*mask.shape)),
        ):
            flat = cells[known] * number + labels
            table += np.bincount(flat, minlength=table.size).reshape(table.shape)
    if not of_class.any():
        raise UserError(
            f"{dataset.source.describe(0)}, ...: no pixel of {len(dataset):,} masks has one of the "
            f"{number} classes ({', '.join(classes.names[:3])}, ...)"
        )
    return Counts(of_class, of_colour, of_place)


def check_test(
    dataset: Dataset, counts: Counts, classes: ClassTable, whole: bool, threads: int
) -> None:
    """Reads all masks of a test set.

    Args:
      whole: whether the training images are all there are, so that each class must be among them;
        else one that is not is named in the log.

    Raises:
      UserError: for a mask that cannot be read, or a class that no training image has.
    """
    of_class = np.zeros(len(classes.names), np.int64)

    def see(record: records.Record) -> np.ndarray:
        return np.bincount(classes(record).ravel(), minlength=256)[: len(of_class)]

    for _, found in read_all(dataset, see, dataset.indices, threads):
        of_class += found
    missing = [classes.names[i] for i in np.flatnonzero((of_class > 0) & (counts.of_class == 0))]
    if not missing:
        return
    words = f"{len(missing)} classes of the test set are in no training mask ({missing[0]!r}, ...)"
    if whole:
        raise UserError(f"{dataset.source.describe(0)}, ...: {words}; convert the whole set")
    log.warning("%s: they cannot be learned from so few images", words)


def colour_cells(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 -> (H, W) int, 0 ... 215."""
    steps = image.astype(np.int64) * COLOURS // 256
    return (steps[..., 0] * COLOURS + steps[..., 1]) * COLOURS + steps[..., 2]


def place_cells(height: int, width: int) -> np.ndarray:
    """(height, width) int, 0 ... 255: row by row."""
    rows, columns = (np.arange(side) * PLACES // side for side in (height, width))
    return rows[:, None] * PLACES + columns


def outcomes(
    train: Dataset, test: Dataset, classes: ClassTable, whole: bool, rules: str, cache: Cache
) -> dict[str, Outcome]:
    """{name of :meth:`Counts.predictions`: its figures}, made once for the same data.

    whole: as of :func:`check_test`. rules: the ``data`` of the outcomes beside which they stand.
    Raises as :func:`count` and :func:`check_test`.
    """

    def make() -> dict[str, Outcome]:
        counts = count(train, classes, cache.threads)
        check_test(test, counts, classes, whole, cache.threads)
        found: dict[str, list[scores.Areas]] = {}

        def see(record: records.Record) -> dict[str, scores.Areas]:
            truth, number = classes(record), len(classes.names)
            guesses = counts.predictions(np.asarray(decode_image(record.image)))
            return {name: scores.areas(x, truth, number) for name, x in guesses.items()}

        for _, each in read_all(test, see, test.indices, cache.threads):
            for name, one in each.items():
                found.setdefault(name, []).append(one)
        made = {}
        for name, rows in found.items():
            metrics, items = figures(scores.Areas(*map(np.stack, zip(*rows))), classes)
            made[name] = Outcome(("miou",), metrics, items, "")
        return made

    known = datasets.fingerprint(PROTOCOL, train.identity, test.identity, classes)
    found = cache.remember(f"lookups-{known}", make)
    return {name: dataclasses.replace(one, data=rules) for name, one in found.items()}


def figures(
    found: scores.Areas, classes: ClassTable
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """(metrics, items) of an outcome, from the areas of all images."""
    whole = scores.segmented(found)
    metrics, items = scored("miou", whole.influence)
    metrics |= {
        "miou": whole.miou,
        "accuracy": whole.accuracy,
        "mean_accuracy": whole.mean_accuracy,
    }
    each = zip(classes.names, whole.iou.tolist())
    metrics |= {f"iou_{name.replace(' ', '_')}": x for name, x in each if not np.isnan(x)}
    return metrics, items


def _best(table: np.ndarray, common: int) -> np.ndarray:
    """The commonest class of each cell; of one that was never seen, ``common``."""
    return np.where(table.any(axis=1), table.argmax(axis=1), common).astype(np.uint8)
