"""MMMU (Yue et al., 2023), validation: college questions of 30 subjects."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from webssl_jax.evaluators.vqa import scoring
from webssl_jax.evaluators.vqa.rules.choices import WORD, final_words, letter, with_options
from webssl_jax.evaluators.vqa.rules.numbers import same_or_close
from webssl_jax.evaluators.vqa.task import KNOWLEDGE, Answer, Question, Source, TaskScore

_CHOICE = "multiple-choice"
_QUOTED = re.compile("'(.*?)'")
_IMAGE_TAG = re.compile(r"<image \d+>")


@dataclasses.dataclass(frozen=True)
class MMMU:
    """Accuracy over all questions: the letter; of open ones the text, or a number within 5 percent.

    As in Cambrian's scripts only the first image is shown, a truth that is a list never matches,
    and options are whatever stands between two apostrophes, so an option with one of its own comes
    out in pieces.
    """

    name = "mmmu"
    title = "MMMU"
    category = KNOWLEDGE
    source = Source(
        "lmms-lab/MMMU",
        "data/validation-*.parquet",
        ("id", "question", "options", "answer", "question_type", "image_1"),
        900,
    )

    def questions(self, place: int, row: Mapping[str, Any]) -> list[Question]:
        """One a row."""
        if row["question_type"] == _CHOICE:
            options = _QUOTED.findall(row["options"])
            text = with_options(f"{row['question']} Options:", options)
        else:
            text = f"{row['question']}\n{WORD}"
        image = scoring.image_bytes(row["image_1"])
        text = _IMAGE_TAG.sub("", text)
        text = text.strip() if image is None else text.rstrip()  # the image stands before it
        extra = {"truth": row["answer"], "type": row["question_type"]}
        extra["category"] = row["id"].split("_")[1]  # validation_Accounting_1
        return [Question(str(place), text, image, extra)]

    def judge(self, answer: Answer) -> float:
        """See the class."""
        choice = answer.extra["type"] == _CHOICE
        said = letter(answer.answer) if choice else final_words(answer.answer).rstrip(".")
        return same_or_close(said, answer.extra["truth"].lower())

    def score(self, answers: Sequence[Answer]) -> TaskScore:
        """See the class."""
        return scoring.accuracy(self.name, answers, self.judge)
