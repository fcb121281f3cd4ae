"""What classifiers on frozen features share: two labelled sets, their classes and look-alikes, and
the figures of trivial features.

A model's figure says nothing alone. Always guessing the commonest class, comparing thumbnails pixel
by pixel and comparing colours go through the same classifier, and stand beside it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from webssl_jax.data.views import Preprocess
from webssl_jax.evaluators import datasets
from webssl_jax.evaluators.datasets import Dataset
from webssl_jax.evaluators.features import Cache, Store, Table
from webssl_jax.evaluators.outcome import Outcome, scored
from webssl_jax.evaluators.probes import splits, trivial

TRIVIAL = ("raw pixels", "colour histogram")
MAJORITY = "majority class"


@dataclasses.dataclass(frozen=True)
class LabelledOptions:
    """train, test: labelled shards, as ``config.data.train`` names them. max_images: of each set,
    drawn evenly; 0 for all. greyscale: judge by greyscale copies of all images, those of trivial
    features too: what is known besides colours."""

    train: str
    test: str
    max_images: int = 0
    greyscale: bool = False

    def __post_init__(self) -> None:
        datasets.check_options(self.max_images, datasets.LABELLED, train=self.train, test=self.test)


@dataclasses.dataclass(frozen=True)
class Problem:
    """Labelled training and test images, as numbers.

    train_rows, test_rows: which of the readable records have a label, (n,) and (m,) int;
    ``*_labels`` are their classes. groups: (n,) int, look-alikes among training images. data:
    fingerprint. preprocess: of the images, by which trivial features are made too.
    """

    classes: tuple[str, ...]
    train_rows: np.ndarray
    train_labels: np.ndarray
    test_rows: np.ndarray
    test_labels: np.ndarray
    groups: np.ndarray
    data: str
    preprocess: Preprocess

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def train_rows_of(self, rows: Table) -> Table:
        """Of an array of all readable training records the labelled ones."""
        return pick(rows, self.train_rows)

    def test_rows_of(self, rows: Table) -> Table:
        """Of an array of all readable test records the labelled ones."""
        return pick(rows, self.test_rows)

    def chance(self) -> dict[str, float]:
        """{"top1": of guesses}."""
        return {"top1": 1 / self.num_classes}


class LabelledPair:
    """The two sets of a row, opened.

    Raises:
      UserError: if shards are missing.
    """

    def __init__(self, options: LabelledOptions):
        train, test = (
            datasets.open_dataset(
                shards, datasets.LABELLED, options.max_images, greyscale=options.greyscale
            )
            for shards in (options.train, options.test)
        )
        self.datasets: tuple[Dataset, Dataset] = (train, test)

    @property
    def identity(self) -> str:
        """Of both sets."""
        return "-".join(data.identity for data in self.datasets)

    def problem(self, train: Store, test: Store, preprocess: Preprocess, cache: Cache) -> Problem:
        """The problem that two stores of features pose.

        Raises:
          UserError: for fewer than two classes, no labelled image, or an unknown class among the
            test images.
        """
        of_train, of_test = self.datasets
        names = datasets.class_names(train.labels, of_train, least=2)
        rows, labels = datasets.class_ids(train.labels, names, of_train)
        test_rows, test_labels = datasets.class_ids(test.labels, names, of_test)
        pixels = self.thumbnails(of_train, preprocess, cache).array(TRIVIAL[0])
        groups = splits.look_alikes(pick(pixels, rows), labels)
        data = datasets.fingerprint(self.identity, names, rows, labels, test_rows, test_labels)
        return Problem(names, rows, labels, test_rows, test_labels, groups, data, preprocess)

    def pixel_problem(self, preprocess: Preprocess, cache: Cache) -> Problem:
        """:meth:`problem` where there is no model: of the images alone."""
        train, test = (self.thumbnails(data, preprocess, cache) for data in self.datasets)
        return self.problem(train, test, preprocess, cache)

    def trivial_outcomes(
        self,
        problem: Problem,
        cache: Cache,
        rules: str,
        evaluate: Callable[[Problem, Mapping[str, Table], Mapping[str, Table]], Outcome],
    ) -> dict[str, Outcome]:
        """{"majority class", "raw pixels", "colour histogram": outcome}; made once for the same
        images by the same ``rules``, whatever the model."""

        def make() -> dict[str, Outcome]:
            hits = problem.test_labels == np.bincount(problem.train_labels).argmax()
            metrics, items = scored("top1", hits)
            common = problem.classes[int(np.bincount(problem.train_labels).argmax())]
            chosen = {"top1": f"always {common!r}"}
            found = {MAJORITY: Outcome(("top1",), metrics, items, problem.data, chosen=chosen)}
            stores = [self.thumbnails(data, problem.preprocess, cache) for data in self.datasets]
            for name in TRIVIAL:
                train, test = ({name: store.array(name)} for store in stores)
                found[name] = evaluate(problem, train, test)
            data = found[TRIVIAL[0]].data
            found[MAJORITY] = dataclasses.replace(found[MAJORITY], data=data)
            return found

        view = datasets.fingerprint(problem.preprocess.for_pixels())
        return cache.remember(f"trivial-{rules}-{problem.data}-{view}", make)

    def thumbnails(self, dataset: Dataset, preprocess: Preprocess, cache: Cache) -> Store:
        """The trivial features of all readable records of a set. All processes call it."""
        return cache.of_pixels(
            "trivial", preprocess, dataset, trivial.trivial_features, trivial.ROW_BYTES
        )


def pick(rows: Table, wanted: np.ndarray) -> Table:
    """Some rows of an array, in memory or on disk."""
    if len(wanted) == len(rows):
        return rows
    of_disk = getattr(rows, "pick", None)
    return of_disk(wanted) if of_disk else rows[wanted]
