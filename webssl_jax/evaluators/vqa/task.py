"""What a benchmark of visual question answering is: questions out of rows, a score out of answers.

    for question in task.questions(place, row): ...  # ask a model; keep an Answer of each
    score = task.score(answers)                      # from the kept answers alone

The two halves share nothing but the answers, which are lines of JSON. So a rule can be changed, or
another one tried, without asking the model again.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from webssl_jax.errors import UserError

CATEGORIES = ("general", "knowledge", "chart_ocr", "vision_centric")
GENERAL, KNOWLEDGE, CHART_OCR, VISION_CENTRIC = CATEGORIES


@dataclasses.dataclass(frozen=True)
class Question:
    """One question about one image.

    key: unique in its benchmark, and the same in every run.
    text: the user's turn, without the place of the image before it.
    image: the encoded file, as it was published; None for a question without one.
    extra: what the rule needs, as plain JSON: the truth, options, the type of question.
    max_new_tokens: after how many tokens an answer is cut.
    """

    key: str
    text: str
    image: bytes | None
    extra: dict[str, Any]
    max_new_tokens: int = 512

    def answered(self, answer: str) -> Answer:
        """What is kept of it, with the model's words."""
        return Answer(self.key, self.text, answer, self.extra)


@dataclasses.dataclass(frozen=True)
class Answer:
    """A model's words to a question, and what its rule needs: one line of ``answers.jsonl``."""

    key: str
    text: str
    answer: str
    extra: dict[str, Any]

    def line(self) -> str:
        """One line of JSON, with its newline."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False) + "\n"


class Items(NamedTuple):
    """What a headline is made of: sum over groups g of ``weights[g]`` * mean(values of g).

    An item is what is right or wrong as a whole: a question, or where the rule says so a pair of
    questions, or one question in all its rotations.

    values: (n,) float32. groups: (n,) int32, a place in ``weights``. weights: (groups,) float32,
      all 100 / (number of groups) for a mean over groups in percent.
    """

    values: np.ndarray
    groups: np.ndarray
    weights: np.ndarray

    def headline(self) -> float:
        """The figure."""
        return float(self.contributions().mean())

    def contributions(self) -> np.ndarray:
        """(n,) float64, whose mean is the headline: the items of an ``Outcome``."""
        sizes = np.bincount(self.groups, minlength=len(self.weights))
        each = self.weights.astype(np.float64) * len(self.values) / np.maximum(sizes, 1)
        return self.values * each[self.groups]

    def standard_error(self) -> float:
        """Of the headline over other items of the same groups: sqrt(sum of w^2 var / n)."""
        variance = 0.0
        for group, weight in enumerate(self.weights):
            values = self.values[self.groups == group].astype(np.float64)
            variance += float(weight) ** 2 * values.var() / max(len(values), 1)
        return float(np.sqrt(variance))


@dataclasses.dataclass(frozen=True)
class TaskScore:
    """What a rule found.

    headline: the name of the metric that stands in the paper's table.
    metrics: {name: value}, in percent (MME's scores in points).
    items: what the headline is made of, for errors and pairing.
    verdicts: {key of a question: 0 to 1}, for pictures.
    """

    headline: str
    metrics: dict[str, float]
    items: Items
    verdicts: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Source:
    """Where the rows of a benchmark are, as it was published.

    repo: the data set at huggingface.co. files: a pattern of its files, below the folder it was
      downloaded to. columns: those that questions are made of. count: how many questions it has.
    tables: a pattern of parquet files with columns ``id`` and ``image``, where a row names its
      image by ``imageId``. pictures: the place of a row's image file, where it is one of its own.
    """

    repo: str
    files: str
    columns: tuple[str, ...]
    count: int
    tables: str = ""
    pictures: str = ""


class Task(Protocol):
    """The contract. Tasks are frozen dataclasses; their fields are what can be chosen."""

    @property
    def name(self) -> str:
        """As rows and folders call it: ``mmbench``."""

    @property
    def title(self) -> str:
        """As the paper calls it: ``MMBench``."""

    @property
    def category(self) -> str:
        """One of :data:`CATEGORIES`."""

    @property
    def source(self) -> Source:
        """Its data set."""

    def questions(self, place: int, row: Mapping[str, Any]) -> list[Question]:
        """The questions of row number ``place`` of the data set; none where the benchmark skips it.

        ``row`` is a row of the published table; of an image the dict with its ``bytes``.
        :func:`webssl_jax.evaluators.vqa.rows.read_questions` reads them from files.
        """

    def score(self, answers: Sequence[Answer]) -> TaskScore:
        """Judges all answers of the benchmark, or of whole items of it.

        Raises:
          UserError: if an answer lacks what the rule needs, or a pair its other half.
        """


def read_answers(path: pathlib.Path) -> list[Answer]:
    """The answers in a file of lines, in the order of the questions: rows of a table are numbered,
    and a run may answer them in any order.

    Raises:
      UserError: if there is none, a line is damaged or no answer, or two answer the same question.
    """
    try:
        lines = path.read_text("utf-8").rstrip("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: no answers can be read ({error})") from error
    if lines == [""]:
        raise UserError(f"{path}: holds no answer; ask a model first")
    answers: dict[str, Answer] = {}
    for number, line in enumerate(lines, 1):
        try:
            answer = _answer(json.loads(line))
        except (ValueError, TypeError, RecursionError) as error:
            raise UserError(
                f"{path}, line {number}: not an answer ({error}); remove the line and ask again"
            ) from error
        if answer.key in answers:
            raise UserError(
                f"{path}, line {number}: question {answer.key} was answered before; remove one"
            )
        answers[answer.key] = answer
    return sorted(answers.values(), key=lambda answer: (len(answer.key), answer.key))


def _answer(fields: dict[str, Any]) -> Answer:
    answer = Answer(**fields)
    texts = (answer.key, answer.text, answer.answer)
    if not all(isinstance(text, str) for text in texts) or not isinstance(answer.extra, dict):
        raise ValueError("key, text and answer are texts, extra is an object")
    return answer


def write_answers(path: pathlib.Path, answers: Iterable[Answer]) -> None:
    """Writes a file for :func:`read_answers`; for a run that goes on, append ``Answer.line()``."""
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(answer.line() for answer in answers)
