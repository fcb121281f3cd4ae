"""Zero-shot classification (CLIP, arXiv 2103.00020, section 3.1): an image belongs to the class
whose name, put into sentences, it is closest to.

Of each class name the templates make texts; a class is the mean of their L2-normalised embeddings,
normalised again; the highest cosine wins. That is open_clip's ``build_zero_shot_classifier``.
"""

from __future__ import annotations

import collections
import importlib.resources
import pathlib
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from webssl_jax.config import UserError, suggest
from webssl_jax.evaluators.base import Dataset, Ranks, fingerprint
from webssl_jax.evaluators.towers import Towers, check_finite

LISTS = ("imagenet", "short")  # in the folder templates
PLACE = "{}"
PROTOCOL = 1  # as that of frozen.py


def read_templates(asked: str) -> tuple[str, ...]:
    """The templates of one of :data:`LISTS`, or of a text file with one a line; ``{}`` stands for
    the name of the class.

    Raises:
      UserError: if there is no such list or file, or it is empty, or a template lacks ``{}``.
    """
    if asked in LISTS:
        file = importlib.resources.files("webssl_jax.evaluators") / f"templates/{asked}.txt"
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
          UserError: if there is none for one of them, or not as many names as labels.
        """
        if self.labels is None:
            if len(self.names) != len(labels):
                raise UserError(
                    f"{self.path}: {len(self.names):,} class names, but the records have "
                    f"{len(labels):,} labels ({', '.join(labels[:3])}, ...); give one name a line "
                    "in the order of the sorted labels, or lines of a label, a tab and its name"
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


class ZeroShot(NamedTuple):
    """What a network found.

    data: fingerprint of the images, labels and prompts, and the protocol; only results with the
    same are comparable. behind: of each image, how many classes were taken for more likely than its
    own.
    """

    data: str
    classes: int
    templates: int
    behind: Ranks

    def metrics(self) -> dict[str, float]:
        """``eval/zero_shot/top1``, ``top5``, each with ``_se``."""
        out = {}
        for k in (1, 5):
            score = self.behind.within(k)
            name = f"eval/zero_shot/top{k}"
            out |= {name: score.top1, f"{name}_se": score.se}
        return out

    @property
    def test_images(self) -> int:
        return len(self.behind.behind)

    @property
    def chance(self) -> dict[str, float]:
        """The same of guesses."""
        return chance(self.classes)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return self._asdict() | {"behind": self.behind.to_json()}

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> ZeroShot:
        """Inverse of :meth:`to_json`."""
        return cls(**row | {"behind": Ranks.from_json(row["behind"])})


class ZeroShotEvaluation:
    """Puts the images of ``test`` into classes by words.

    Args:
      names: the name of each class, in the order of ``test.class_names``.
      tokens: (classes x templates, C) int32, of :func:`prompts`.

    ``chance``: the metrics of guesses.
    """

    name = "zero_shot"

    def __init__(self, test: Dataset, names: Sequence[str], templates: Sequence[str], tokens):
        self._test, self._tokens, self._templates = test, tokens, len(templates)
        crc = zlib.crc32("\n".join(prompts(names, templates)).encode())
        self._data = f"{fingerprint(test)}-{crc:08x}-{PROTOCOL}"
        self.chance = chance(len(names))

    def measure(self, towers: Towers) -> ZeroShot:
        """All processes call it.

        Raises:
          UserError: if an embedding is not finite.
        """
        images, texts = towers.images(self._test.images), towers.texts(self._tokens)
        check_finite("zero-shot classification", images, texts)
        weights = classifier(texts, self._templates)
        behind = ranks(images @ weights.T, self._test.labels)
        return ZeroShot(self._data, len(weights), self._templates, behind)


def chance(classes: int) -> dict[str, float]:
    """{metric: its mean over guesses}."""
    return {f"eval/zero_shot/top{k}": min(k / classes, 1.0) for k in (1, 5)}


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


def ranks(scores: np.ndarray, labels: np.ndarray) -> Ranks:
    """(n,) how many classes come before the right one when sorted by falling score, of equal ones
    the first class first.

    scores: (n, classes). labels: (n,) integers.
    """
    rows = np.arange(len(labels))
    own = scores[rows, labels][:, None]
    before = np.arange(scores.shape[1]) < labels[:, None]
    return Ranks(((scores > own) | ((scores == own) & before)).sum(axis=1))


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
