"""ChartQA (Masry et al., 2022), test: questions about charts, by people and by a program."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from webssl_jax.evaluators.vqa import scoring
from webssl_jax.evaluators.vqa.rules.numbers import close, number
from webssl_jax.evaluators.vqa.task import CHART_OCR, Answer, Question, Source, TaskScore

_NUMBER_OR_PHRASE = "Answer the question using a single number or phrase."


@dataclasses.dataclass(frozen=True)
class ChartQA:
    """Relaxed accuracy: numbers within 5 percent of the truth, other texts the same but for case.

    Nothing is stripped, and "45%" or "1,200" are texts.
    """

    name = "chartqa"
    title = "ChartQA"
    category = CHART_OCR
    source = Source(
        "lmms-lab/ChartQA", "data/test-*.parquet", ("image", "question", "answer", "type"), 2500
    )

    def questions(self, place: int, row: Mapping[str, Any]) -> list[Question]:
        """One a row."""
        text = f"{row['question']}\n{_NUMBER_OR_PHRASE}"
        extra = {"truth": row["answer"], "category": row["type"]}
        return [Question(str(place), text, scoring.image_bytes(row["image"]), extra, 128)]

    def judge(self, answer: Answer) -> float:
        """See the class."""
        said, truth = answer.answer.lower(), answer.extra["truth"].lower()
        ours, theirs = number(said), number(truth)
        return said == truth if ours is None or theirs is None else close(ours, theirs)

    def score(self, answers: Sequence[Answer]) -> TaskScore:
        """See the class."""
        return scoring.accuracy(self.name, answers, self.judge)
