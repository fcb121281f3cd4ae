"""AI2D (Kembhavi et al., 2016), test: diagrams of school books."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from webssl_jax.evaluators.vqa import scoring
from webssl_jax.evaluators.vqa.rules.choices import letter, with_options
from webssl_jax.evaluators.vqa.task import KNOWLEDGE, Answer, Question, Source, TaskScore

_PLACES = {"a": "0", "b": "1", "c": "2", "d": "3"}


@dataclasses.dataclass(frozen=True)
class AI2D:
    """Accuracy. The truth is the number of an option, so an answer "1" passes as B does."""

    name = "ai2d"
    title = "AI2D"
    category = KNOWLEDGE
    source = Source(
        "lmms-lab/ai2d", "data/test-*.parquet", ("image", "question", "options", "answer"), 3088
    )

    def questions(self, place: int, row: Mapping[str, Any]) -> list[Question]:
        """One a row."""
        text = with_options(row["question"], scoring.texts(row["options"]))
        extra = {"truth": str(row["answer"])}
        return [Question(str(place), text, scoring.image_bytes(row["image"]), extra)]

    def judge(self, answer: Answer) -> float:
        """See the class."""
        said = letter(answer.answer)
        return _PLACES.get(said, said) == answer.extra["truth"].lower()

    def score(self, answers: Sequence[Answer]) -> TaskScore:
        """See the class."""
        return scoring.accuracy(self.name, answers, self.judge)
