"""TextVQA (Singh et al., 2019), validation: questions whose answer is written in the image."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from webssl_jax.evaluators.vqa import scoring
from webssl_jax.evaluators.vqa.rules.choices import WORD
from webssl_jax.evaluators.vqa.rules.vqa_accuracy import vqa_accuracy
from webssl_jax.evaluators.vqa.task import CHART_OCR, Answer, Question, Source, TaskScore


@dataclasses.dataclass(frozen=True)
class TextVQA:
    """VQA accuracy against ten people.

    The question holds the words that an OCR program read in the image, as in Cambrian: encoders
    that cannot read score 45 and more. ocr_tokens: False leaves them out; other figures then.
    """

    ocr_tokens: bool = True

    name = "textvqa"
    title = "TextVQA"
    category = CHART_OCR
    source = Source(
        "lmms-lab/textvqa",
        "data/validation-*.parquet",
        ("image", "question", "answers", "ocr_tokens"),
        5000,
    )

    def questions(self, place: int, row: Mapping[str, Any]) -> list[Question]:
        """One a row."""
        lines = [row["question"], WORD]
        if self.ocr_tokens:
            words = ", ".join(scoring.texts(row["ocr_tokens"]))
            lines.insert(1, f"Reference OCR tokens: {words}" if words else "Reference OCR tokens:")
        extra = {"truths": scoring.texts(row["answers"])}
        image = scoring.image_bytes(row["image"])
        return [Question(str(place), "\n".join(lines), image, extra)]

    def judge(self, answer: Answer) -> float:
        """See the class."""
        return vqa_accuracy(answer.answer, answer.extra["truths"])

    def score(self, answers: Sequence[Answer]) -> TaskScore:
        """See the class."""
        return scoring.accuracy(self.name, answers, self.judge)
