"""SEED-Bench (Li et al., 2023), the questions about one image: nine kinds, four options."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from webssl_jax.evaluators.vqa import scoring
from webssl_jax.evaluators.vqa.rules.choices import letter, with_options
from webssl_jax.evaluators.vqa.task import GENERAL, Answer, Question, Source, TaskScore

_CHOICES = ("choice_a", "choice_b", "choice_c", "choice_d")
_KINDS = (
    "Scene Understanding",
    "Instance Identity",
    "Instance Attribute",
    "Instance Location",
    "Instance Counting",
    "Spatial Relation",
    "Instance Interaction",
    "Visual Reasoning",
    "Text Recognition",
)


@dataclasses.dataclass(frozen=True)
class SEED:
    """Accuracy over all questions; rows with several images (videos) are skipped."""

    name = "seed"
    title = "SEED"
    category = GENERAL
    source = Source(
        "lmms-lab/SEED-Bench",
        "data/test-*.parquet",
        ("image", "question", *_CHOICES, "answer", "question_type_id"),
        14233,
    )

    def questions(self, place: int, row: Mapping[str, Any]) -> list[Question]:
        """None for a video."""
        images = list(map(scoring.image_bytes, row["image"]))
        if len(images) > 1:
            return []
        image = images[0] if images else None
        text = with_options(f"{row['question']} Options:", (row[name] for name in _CHOICES))
        kind = _KINDS[int(row["question_type_id"]) - 1]
        return [Question(str(place), text, image, {"truth": row["answer"], "category": kind})]

    def judge(self, answer: Answer) -> float:
        """The letter; only a period may stand behind it, not a colon."""
        return letter(answer.answer, ends=".") == answer.extra["truth"].lower()

    def score(self, answers: Sequence[Answer]) -> TaskScore:
        """See the class."""
        return scoring.accuracy(self.name, answers, self.judge)
