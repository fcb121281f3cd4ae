"""MathVista (Lu et al., 2023), testmini: mathematics on diagrams, plots and photographs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from webssl_jax.errors import UserError
from webssl_jax.evaluators.vqa import scoring
from webssl_jax.evaluators.vqa.rules.choices import WORD
from webssl_jax.evaluators.vqa.rules.numbers import same_or_close
from webssl_jax.evaluators.vqa.task import KNOWLEDGE, Answer, Question, Source, TaskScore

_REASONED = "First show your reasoning process and then give the final answer."
_CHOICE = "multi_choice"


@dataclasses.dataclass(frozen=True)
class MathVista:
    """Accuracy: the same text, or a number within 5 percent of the answer.

    A question with options has the bare letter for its truth, although it asks for reasoning, and
    no language model reads the answers: figures are 10 to 30 and do not compare with the 40 and
    more of others. The original would cut an answer at its first period where the type is
    "multiple-choice", which is no type of this data set.
    """

    name = "mathvista"
    title = "MathVista"
    category = KNOWLEDGE
    source = Source(
        "AI4Math/MathVista",
        "data/testmini-*.parquet",
        ("decoded_image", "query", "question_type", "choices", "answer", "metadata"),
        1000,
    )

    def questions(self, place: int, row: Mapping[str, Any]) -> list[Question]:
        """One a row."""
        choice = row["question_type"] == _CHOICE
        text = f"{row['query']}\n{_REASONED if choice else WORD}"
        truth = _letter_of(row, place) if choice else row["answer"]
        extra = {"truth": truth, "category": row["metadata"]["category"]}
        return [Question(str(place), text, scoring.image_bytes(row["decoded_image"]), extra)]

    def judge(self, answer: Answer) -> float:
        """See the class."""
        return same_or_close(answer.answer.lower().strip(), answer.extra["truth"].lower())

    def score(self, answers: Sequence[Answer]) -> TaskScore:
        """See the class."""
        return scoring.accuracy(self.name, answers, self.judge)


def _letter_of(row: Mapping[str, Any], place: int) -> str:
    """The letter of the true option; of the last one where two are the same."""
    places = [at for at, choice in enumerate(row["choices"]) if choice == row["answer"]]
    if not places:
        raise UserError(f"mathvista, row {place}: {row['answer']!r} is none of its choices")
    return chr(ord("A") + places[-1])
