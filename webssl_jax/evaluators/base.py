"""What an evaluator is: the protocol between the loop, ``evaluate.py`` and each figure or picture.

An evaluator is made once from labelled images and a config entry, and then run on feature
functions: the training run's, a checkpoint's, or any other. It never sees a method, a parameter
tree or a device mesh.
"""

from __future__ import annotations

import contextlib
import math
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import jax
import numpy as np

from webssl_jax.config import UserError

# features(images uint8 (B, H, W, 3), layers=()) -> methods.base.Features, closed over parameters
# and jitted.
FeatureFunction = Callable[..., "object"]


class Dataset(NamedTuple):
    """Labelled images, decoded and cropped. images: (n, H, W, 3) uint8. labels: (n,) int32, indices
    into ``class_names``."""

    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]


class Evaluator(Protocol):
    """``name`` is the middle of its metric names: ``eval/<name>/...``."""

    name: str

    def run(self, features: FeatureFunction, step: int) -> Iterator[tuple[str, float | np.ndarray]]:
        """Yields (metric name, number) and (picture name, (H, W, 3) uint8) pairs for this feature
        function."""


class Score(NamedTuple):
    """Top-1 accuracy on a test set, with what an honest comparison needs.

    correct: (n,) bool, one an item, so that two models are compared item by item. chosen: which of
    the candidates was chosen on training images, in words. by_variant: accuracy of every candidate,
    for the log only: the best of them on the test set is not an estimate of anything.
    """

    correct: np.ndarray
    chosen: str
    by_variant: dict[str, float]

    @property
    def top1(self) -> float:
        return float(self.correct.mean())

    @property
    def se(self) -> float:
        return standard_error(self.top1, len(self.correct))

    def to_json(self) -> dict:
        """Plain JSON types; ``correct`` as a text of 0 and 1."""
        return {
            "top1": self.top1,
            "se": self.se,
            "chosen": self.chosen,
            "by_variant": self.by_variant,
            "correct": "".join("01"[int(hit)] for hit in self.correct),
        }

    @classmethod
    def from_json(cls, row: dict) -> Score:
        """Inverse of :meth:`to_json`."""
        return cls(np.array([c == "1" for c in row["correct"]]), row["chosen"], row["by_variant"])


class Ranks(NamedTuple):
    """behind: (n,) integers, how many wrong answers come before a query's right one."""

    behind: np.ndarray

    def within(self, k: int) -> Score:
        """The share of queries with the right answer among the first ``k``."""
        return Score(self.behind < k, f"among the first {k}", {})

    def to_json(self) -> str:
        """The integers, with spaces between them."""
        return " ".join(map(str, self.behind.tolist()))

    @classmethod
    def from_json(cls, text: str) -> Ranks:
        """Inverse of :meth:`to_json`."""
        return cls(np.array(text.split(), np.int64))


class Difference(NamedTuple):
    """``value`` = accuracy of a minus accuracy of b; ``se`` its standard error."""

    value: float
    se: float

    @property
    def clear(self) -> bool:
        """More than two standard errors above zero."""
        return self.value > 2 * self.se and self.value > 0


def standard_error(accuracy: float, n: int) -> float:
    """Binomial standard error of a share of ``n`` items: sqrt(p (1 - p) / n)."""
    return math.sqrt(accuracy * (1 - accuracy) / n)


def paired_difference(a: np.ndarray, b: np.ndarray) -> Difference:
    """Compares two models on the same test items.

    With n10 items that only ``a`` gets right and n01 that only ``b`` does, the difference is
    (n10 - n01) / n and its standard error sqrt(n10 + n01 - (n10 - n01)^2 / n) / n. Items on which
    both agree say nothing, as in McNemar's test (1947), so this is sharper than treating the two
    accuracies as independent.

    Raises:
      ValueError: if the two vectors are not (n,) of the same items.
    """
    a, b = np.asarray(a, bool), np.asarray(b, bool)
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise ValueError(f"not the same test items: {a.shape} against {b.shape}")
    n, only_a, only_b = len(a), int((a & ~b).sum()), int((b & ~a).sum())
    gap = only_a - only_b
    return Difference(gap / n, math.sqrt(max(only_a + only_b - gap * gap / n, 0.0)) / n)


def check(train: Dataset, test: Dataset) -> None:
    """Refuses labelled images from which no figure can come.

    Raises:
      UserError: if a split is empty, the class names differ, or fewer than two classes have
        training images.
    """
    for split, data in (("train", train), ("test", test)):
        if not len(data.images):
            raise UserError(
                f"evaluation needs labelled images; the {split} split has none. Label the records "
                "(folder names become labels) or switch evaluation off"
            )
        if len(data.images) != len(data.labels):
            raise UserError(
                f"evaluation: {len(data.images)} {split} images but {len(data.labels)} labels"
            )
    if tuple(train.class_names) != tuple(test.class_names):
        extra = sorted(set(train.class_names) ^ set(test.class_names))
        raise UserError(
            f"evaluation: train and test do not name the same classes (only in one: {extra})"
        )
    if len(np.unique(train.labels)) < 2:
        raise UserError("evaluation needs training images of at least two classes")


def fingerprint(*datasets: Dataset) -> str:
    """A short hash of pixels and labels: two measurements are comparable item by item only if it is
    the same."""
    crc = 0
    for data in datasets:
        for array in (data.images, data.labels):
            crc = zlib.crc32(np.ascontiguousarray(array), crc)
    return f"{crc:08x}"


def evenly_spaced(n: int, k: int) -> np.ndarray:
    """``k`` of ``n`` indices, evenly from the first on; all of them when there are fewer."""
    k = min(n, k)
    return np.arange(k) * n // max(k, 1)


@contextlib.contextmanager
def on_one_device() -> Iterator[None]:
    """Runs small classifiers on this process's first device, in full float32.

    Two traps are avoided: under ``jax.set_mesh`` a jitted function of plain numpy arrays is spread
    over the whole mesh (and, on many hosts, waits for all of them), and a TPU multiplies float32
    matrices in bfloat16 by default, which reorders near neighbours.
    """
    device = np.array([jax.local_devices()[0]])
    mesh = jax.sharding.Mesh(device, ("device",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
        yield
