"""ScienceQA (Lu et al., 2022), the test questions that have an image: school science."""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Mapping, Sequence
from typing import Any

from webssl_jax.evaluators.vqa import scoring
from webssl_jax.evaluators.vqa.rules.choices import final_words, with_options
from webssl_jax.evaluators.vqa.task import KNOWLEDGE, Answer, Question, Source, TaskScore

_ONLY_LETTER = "Please answer directly with only the letter of the correct option and nothing else."
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclasses.dataclass(frozen=True)
class ScienceQA:
    """Accuracy: the letter in front of the first period, or the whole option."""

    name = "scienceqa"
    title = "ScienceQA"
    category = KNOWLEDGE
    source = Source(
        "derek-thomas/ScienceQA",
        "data/test-*.parquet",
        ("image", "question", "choices", "answer", "hint", "grade"),
        2017,
    )

    def questions(self, place: int, row: Mapping[str, Any]) -> list[Question]:
        """None for a row without an image."""
        if row["image"] is None:
            return []
        head = f"{row['hint']} {row['question']}" if row["hint"] else row["question"]
        text = with_options(head, scoring.texts(row["choices"]), _ONLY_LETTER)
        truth = int(row["answer"])
        extra = {"truth": chr(ord("A") + truth), "option": row["choices"][truth]}
        extra["category"] = row["grade"]
        return [Question(str(place), text, scoring.image_bytes(row["image"]), extra)]

    def judge(self, answer: Answer) -> float:
        """See the class. "(B)", "B)" and "B is" are wrong."""
        text = final_words(answer.answer).rstrip(".")
        right = answer.extra["truth"].lower().strip()
        return text.partition(".")[0] == right or _bare(text) == _bare(answer.extra["option"])

    def score(self, answers: Sequence[Answer]) -> TaskScore:
        """See the class."""
        return scoring.accuracy(self.name, answers, self.judge)


def _bare(text: str) -> str:
    return text.lower().strip().translate(_NO_PUNCTUATION).strip()
