"""GQA (Hudson and Manning, 2019), test-dev balanced: open questions, answers of a word or two."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from webssl_jax.evaluators.vqa import scoring
from webssl_jax.evaluators.vqa.rules.choices import WORD
from webssl_jax.evaluators.vqa.task import GENERAL, Answer, Question, Source, TaskScore


@dataclasses.dataclass(frozen=True)
class GQA:
    """Accuracy: the same text but for case and periods at the end."""

    name = "gqa"
    title = "GQA"
    category = GENERAL
    source = Source(
        "lmms-lab/GQA",
        "testdev_balanced_instructions/testdev-*.parquet",
        ("imageId", "question", "answer", "types"),
        12578,
        tables="testdev_balanced_images/testdev-*.parquet",
    )

    def questions(self, place: int, row: Mapping[str, Any]) -> list[Question]:
        """One a row."""
        extra = {"truth": row["answer"], "category": row["types"]["structural"]}
        text = f"{row['question']}\n{WORD}"
        return [Question(str(place), text, scoring.image_bytes(row["image"]), extra, 128)]

    def judge(self, answer: Answer) -> float:
        """See the class."""
        return answer.answer.lower().rstrip(".") == answer.extra["truth"].lower()

    def score(self, answers: Sequence[Answer]) -> TaskScore:
        """See the class."""
        return scoring.accuracy(self.name, answers, self.judge)
