"""Zero-shot classification (CLIP, arXiv 2103.00020, section 3.1): an image belongs to the class
whose name, put into sentences, it is closest to.

Of each class name the templates make texts; a class is the mean of their L2-normalised embeddings,
normalised again; the highest cosine wins. That is open_clip's ``build_zero_shot_classifier``.
"""

from __future__ import annotations

import collections
import dataclasses
import importlib.resources
import itertools
import pathlib
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from webssl_jax.config import UserError, suggest
from webssl_jax.data.pipeline import read_all
from webssl_jax.evaluators import datasets
from webssl_jax.evaluators.base import TEXTS
from webssl_jax.evaluators.features import Cache
from webssl_jax.evaluators.outcome import Outcome, scored
from webssl_jax.evaluators.texts.retrieval import embed_texts
from webssl_jax.model import Model
from webssl_jax.weights.networks import Networks

LISTS = ("imagenet", "short")  # in the folder templates
PLACE = "{}"
# Raised whenever the same model would get another figure on the same data.
PROTOCOL = 2
_CHECKED = 4096  # records whose labels are read before anything is evaluated
_QUERIES = 4096  # images compared at a time, so that memory stays bounded


def read_templates(asked: str) -> tuple[str, ...]:
    """The templates of one of :data:`LISTS`, or of a text file with one a line; ``{}`` stands for
    the name of the class.

    Raises:
      UserError: if there is no such list or file, or it is empty, or a template lacks ``{}``.
    """
    if asked in LISTS:
        file = importlib.resources.files("webssl_jax.evaluators.texts") / f"templates/{asked}.txt"
        return tuple(line for _, line in _lines(file.read_text("utf-8")))
    if not pathlib.Path(asked).exists():
        raise UserError(
            f"zero-shot templates {asked!r}: no file, and no list of that name; "
            f"{suggest(asked, LISTS)}"
        )
    found = _read(asked, "templates")
    for number, line in found:
        if PLACE not in line:
            raise UserError(
                f"{asked}, line {number}: {line!r} has no {PLACE} for the name of the class"
            )
    return tuple(line for _, line in found)


class ClassNames(NamedTuple):
    """Of a file. labels: of the records, one for each name; None where the file has names alone,
    which then belong to the sorted labels."""

    path: str
    names: tuple[str, ...]
    labels: tuple[str, ...] | None

    def of(self, labels: Sequence[str]) -> tuple[str, ...]:
        """The names of these labels.

        Raises:
          UserError: if there is none for one of them, or not as many names as labels; if the names
            have no labels beside them and numbers in the labels make their order doubtful.
        """
        if self.labels is None:
            if len(self.names) != len(labels):
                raise UserError(
                    f"{self.path}: {len(self.names):,} class names, but the records have "
                    f"{len(labels):,} labels ({', '.join(labels[:3])}, ...); give one name a line "
                    "in the order of the sorted labels, or lines of a label, a tab and its name"
                )
            for earlier, later in itertools.pairwise(labels):
                if _by_numbers(earlier) > _by_numbers(later):  # c10, c2
                    raise UserError(
                        f"{self.path}: which name is whose? Sorted as texts the label {earlier!r} "
                        f"comes before {later!r}, by their numbers it does not; give lines of a "
                        "label, a tab and its name"
                    )
            return self.names
        known = dict(zip(self.labels, self.names))
        missing = [label for label in labels if label not in known]
        if missing:
            raise UserError(
                f"{self.path}: no name for the label {missing[0]!r}; give a line of the label, a "
                "tab and its name"
            )
        return tuple(known[label] for label in labels)


def _by_numbers(label: str) -> list[tuple[int, str]]:
    """For sorting as a person does: c2 before c10."""
    parts = re.split(r"(\d+)", label)
    return [(int(part), "") if part.isdecimal() else (0, part) for part in parts]


def read_class_names(path: str) -> ClassNames:
    """Reads a text file: a name a line, in the order of the sorted labels; or in each line a label,
    a tab and its name.

    Raises:
      UserError: if the file cannot be read or is empty, if only some lines have a tab, if a name is
        missing or a label comes twice.
    """
    rows = [(number, line.split("\t")) for number, line in _read(path, "class names")]
    tabs = len(rows[0][1]) - 1
    for number, parts in rows:
        if len(parts) != tabs + 1 or tabs > 1 or not all(map(str.strip, parts)):
            raise UserError(
                f"{path}, line {number}: every line must be a name, or every line a label, a tab "
                "and a name"
            )
    names = tuple(parts[-1].strip() for _, parts in rows)
    if not tabs:
        return ClassNames(path, names, None)
    labels = tuple(parts[0].strip() for _, parts in rows)
    label, times = collections.Counter(labels).most_common(1)[0]
    if times > 1:
        raise UserError(f"{path}: the label {label!r} comes {times} times")
    return ClassNames(path, names, labels)


@dataclasses.dataclass(frozen=True)
class ZeroShotOptions:
    """The keys of a row.

    test: labelled shards. templates: ``imagenet`` (80), ``short`` (7), or a file with one a line.
    class_names: a file with one name a line in the order of the sorted labels (2 before 10), or
    lines of a label, a tab and its name; "" for the labels themselves. max_images: drawn evenly; 0
    for all.
    """

    test: str
    templates: str = "short"
    class_names: str = ""
    max_images: int = 0

    def __post_init__(self) -> None:
        datasets.check_options(self.max_images, datasets.LABELLED, test=self.test)
        if not self.templates:
            raise ValueError(f"templates = '': give a file, or one of {', '.join(LISTS)}")


class ZeroShot:
    """Top-1 and top-5 accuracy of the class whose name is closest to the image."""

    Options = ZeroShotOptions
    needs = frozenset({TEXTS})

    def __init__(self, options: ZeroShotOptions):
        self._templates = read_templates(options.templates)
        self._given = read_class_names(options.class_names) if options.class_names else None
        self._data = datasets.open_dataset(options.test, datasets.LABELLED, options.max_images)
        if self._given:
            _check_names(self._given, self._data)
        known = (self._data.identity, self._templates, self._given, PROTOCOL)
        self.data, self.datasets = datasets.fingerprint(*known), (self._data,)

    @classmethod
    def want(cls, options: ZeroShotOptions, networks: Networks) -> None:
        """None: embeddings are not pooled features."""
        return None

    def run(self, model: Model, cache: Cache) -> Outcome:
        """See ``base.Evaluation``."""
        store = cache.embeddings(model, self._data)
        classes = self._given and self._given.labels
        classes = classes or datasets.class_names(store.labels, self._data)
        rows, labels = datasets.class_ids(store.labels, classes, self._data)
        names = self._given.of(classes) if self._given else classes
        texts = prompts(names, self._templates)
        weights = classifier(embed_texts(model, texts), len(self._templates))
        images = store.array("image").pick(rows)
        behind = np.concatenate(
            [
                ranks(images[i : i + _QUERIES] @ weights.T, labels[i : i + _QUERIES])
                for i in range(0, len(rows), _QUERIES)
            ]
        )
        metrics: dict[str, float] = {}
        items: dict[str, np.ndarray] = {}
        for k in (1, 5):
            found = scored(f"top{k}", behind < k)
            metrics, items = metrics | found[0], items | found[1]
        meaning = (
            f"zero-shot: share of {len(rows):,} test images put into the right one of "
            f"{len(classes)} classes, or with it among the first five: the class whose name, in "
            f"{len(self._templates)} templates, is closest to the image. Nothing is learned from "
            "labels."
        )
        data = datasets.fingerprint(self._data.identity, rows, labels, texts, PROTOCOL)
        chance = {f"top{k}": min(k / len(classes), 1.0) for k in (1, 5)}
        return Outcome(("top1", "top5"), metrics, items, data, meaning, chance=chance)


def _check_names(given: ClassNames, data: datasets.Dataset) -> None:
    """Refuses names that do not fit the labels, as far as 4,096 records tell; the rest is found
    when all are read.

    Raises:
      UserError: as :meth:`ClassNames.of` and ``datasets.class_ids``.
    """
    places = np.unique(np.linspace(0, len(data) - 1, _CHECKED).astype(int))
    found = read_all(data.source, lambda record: record.label, data.indices[places].tolist())
    labels = sorted({label for _, label, _ in found if label is not None})
    if given.labels is not None and labels:
        datasets.class_ids(labels, given.labels, data)
    elif labels and (len(places) == len(data) or len(labels) > len(given.names)):
        given.of(labels)


def prompts(names: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Every class name in every template, class by class."""
    return [template.replace(PLACE, name) for name in names for template in templates]


def classifier(texts: np.ndarray, templates: int) -> np.ndarray:
    """(classes, E) unit vectors, from the embeddings of :func:`prompts`, (classes x templates, E)
    L2-normalised: of each class the mean, normalised.

    With no direction left (opposite embeddings) a class gets zeros.
    """
    mean = texts.reshape(-1, templates, texts.shape[-1]).mean(axis=1)
    length = np.linalg.norm(mean, axis=1, keepdims=True)
    return mean / np.maximum(length, np.finfo(np.float32).tiny)


def ranks(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(n,) how many classes come before the right one when sorted by falling score, of equal ones
    the first class first.

    scores: (n, classes). labels: (n,) integers.
    """
    rows = np.arange(len(labels))
    own = scores[rows, labels][:, None]
    before = np.arange(scores.shape[1]) < labels[:, None]
    return ((scores > own) | ((scores == own) & before)).sum(axis=1)


def _read(path: str, what: str) -> list[tuple[int, str]]:
    try:
        text = pathlib.Path(path).read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not UTF-8 text"
        raise UserError(f"{path}: no {what} can be read ({reason})") from error
    lines = _lines(text)
    if not lines:
        raise UserError(f"{path}: is empty; give {what}, one a line")
    return lines


def _lines(text: str) -> list[tuple[int, str]]:
    """(number, line) of those that are not blank."""
    lines = enumerate(text.split("\n"), start=1)
    return [(number, line.strip(" \r")) for number, line in lines if line.strip()]
