"""RealWorldQA (xAI, 2024): photographs, many from cars; questions bring their instruction."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from webssl_jax.evaluators.vqa import scoring
from webssl_jax.evaluators.vqa.rules.choices import final_words
from webssl_jax.evaluators.vqa.task import VISION_CENTRIC, Answer, Question, Source, TaskScore


@dataclasses.dataclass(frozen=True)
class RealWorldQA:
    """Accuracy: the first word is the truth, so a truth of two words never is. An empty answer,
    which stops the original with an error, is wrong."""

    name = "realworldqa"
    title = "RealWorldQA"
    category = VISION_CENTRIC
    source = Source(
        "lmms-lab/RealWorldQA", "data/test-*.parquet", ("image", "question", "answer"), 765
    )

    def questions(self, place: int, row: Mapping[str, Any]) -> list[Question]:
        """One a row, as it stands."""
        image = scoring.image_bytes(row["image"])
        return [Question(str(place), row["question"], image, {"truth": row["answer"]})]

    def judge(self, answer: Answer) -> float:
        """See the class."""
        words = final_words(answer.answer).rstrip(".").split()
        return words[:1] == [answer.extra["truth"].lower()]

    def score(self, answers: Sequence[Answer]) -> TaskScore:
        """See the class."""
        return scoring.accuracy(self.name, answers, self.judge)
