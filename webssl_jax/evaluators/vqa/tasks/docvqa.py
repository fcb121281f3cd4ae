"""DocVQA (Mathew et al., 2021): questions about scanned documents."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from webssl_jax.errors import UserError
from webssl_jax.evaluators.vqa import scoring
from webssl_jax.evaluators.vqa.rules.anls import similarity
from webssl_jax.evaluators.vqa.rules.choices import SHORT
from webssl_jax.evaluators.vqa.submissions import Submission
from webssl_jax.evaluators.vqa.task import CHART_OCR, Answer, Question, Source, TaskScore


@dataclasses.dataclass(frozen=True)
class DocVQA:
    """ANLS in percent.

    split: ``validation``; or ``test``, of which the paper's figures are, whose truth only the
      server has.
    """

    split: str = "validation"

    title = "DocVQA"
    category = CHART_OCR

    def __post_init__(self) -> None:
        if self.split not in ("validation", "test"):
            raise ValueError(f"split is validation or test, got {self.split!r}")

    @property
    def name(self) -> str:
        """``docvqa`` or ``docvqa_test``."""
        return "docvqa" if self.split == "validation" else "docvqa_test"

    @property
    def source(self) -> Source:
        """The rows of the split."""
        columns = ("image", "question", "questionId", "answers")
        count = 5349 if self.split == "validation" else 5188
        return Source("lmms-lab/DocVQA", f"DocVQA/{self.split}-*.parquet", columns, count)

    def questions(self, place: int, row: Mapping[str, Any]) -> list[Question]:
        """One a row."""
        truths = scoring.texts(row["answers"]) if row["answers"] else None
        extra = {"truths": truths, "question_id": int(row["questionId"])}
        text = f"{row['question']}\n{SHORT}"
        return [Question(str(place), text, scoring.image_bytes(row["image"]), extra, 128)]

    def judge(self, answer: Answer) -> float:
        """See the class."""
        if answer.extra["truths"] is None:
            raise UserError(
                f"{self.name}: only the server has the truth; hand in what submission() writes"
            )
        return similarity(answer.answer, answer.extra["truths"])

    def score(self, answers: Sequence[Answer]) -> TaskScore:
        """See the class."""
        return scoring.accuracy(self.name, answers, self.judge)

    def submission(self, answers: Sequence[Answer]) -> Submission:
        """The list that the server takes (Task 1, single pages)."""
        rows = [
            {"questionId": answer.extra["question_id"], "answer": answer.answer}
            for answer in answers
        ]
        address = "https://rrc.cvc.uab.es/?ch=17&com=mymethods&task=1"
        return Submission("docvqa.json", json.dumps(rows).encode(), address)
