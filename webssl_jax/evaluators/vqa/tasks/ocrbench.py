"""OCRBench (Liu et al., 2023): a thousand questions about text in images, of ten kinds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from webssl_jax.evaluators.vqa import scoring
from webssl_jax.evaluators.vqa.rules.choices import SHORT
from webssl_jax.evaluators.vqa.task import CHART_OCR, Answer, Question, Source, TaskScore

_FORMULA = "Handwritten Mathematical Expression Recognition"


@dataclasses.dataclass(frozen=True)
class OCRBench:
    """The share of answers in which a true text stands; of formulas without blanks, with case.

    whole: the answer must be the text, which the original has behind ``--extra_penalization``.
    """

    whole: bool = False

    name = "ocrbench"
    title = "OCRBench"
    category = CHART_OCR
    source = Source(
        "echo840/OCRBench",
        "data/test-*.parquet",
        ("image", "question", "answer", "question_type"),
        1000,
    )

    def questions(self, place: int, row: Mapping[str, Any]) -> list[Question]:
        """One a row."""
        extra = {"truths": scoring.texts(row["answer"]), "category": row["question_type"]}
        text = f"{row['question']}\n{SHORT}"
        return [Question(str(place), text, scoring.image_bytes(row["image"]), extra)]

    def judge(self, answer: Answer) -> float:
        """See the class."""
        clean = _formula if answer.extra["category"] == _FORMULA else _line
        said, truths = clean(answer.answer), map(clean, answer.extra["truths"])
        return any(truth == said if self.whole else truth in said for truth in truths)

    def score(self, answers: Sequence[Answer]) -> TaskScore:
        """See the class."""
        return scoring.accuracy(self.name, answers, self.judge)


def _line(text: str) -> str:
    return text.lower().strip().replace("\n", " ")


def _formula(text: str) -> str:
    return text.strip().replace("\n", " ").replace(" ", "")
