"""MME (Fu et al., 2023): two yes-or-no questions an image, in 14 categories."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from webssl_jax.errors import UserError
from webssl_jax.evaluators.vqa.rules.choices import WORD
from webssl_jax.evaluators.vqa.scoring import (
    PERCENT,
    beside,
    grouped,
    image_bytes,
    judged,
    verdicts,
    whole_pairs,
)
from webssl_jax.evaluators.vqa.task import GENERAL, Answer, Question, Source, TaskScore

COGNITION = ("code_reasoning", "commonsense_reasoning", "numerical_calculation", "text_translation")
READINGS = ("total", "perception", "cognition")


@dataclasses.dataclass(frozen=True)
class MME:
    """A category gives the share of right answers plus the share of images with both right, each in
    percent: 0 to 200. Perception sums ten categories, cognition four.

    reading: which sum is the headline, ``total`` or ``perception``. The paper's column is headed
      perception, whose figures cannot be (1,600 to 1,900 of 2,000, where Cambrian's own 8B model
      has 1,547): they look like totals.
    """

    reading: str = "total"

    name = "mme"
    title = "MME"
    category = GENERAL
    source = Source(
        "lmms-lab/MME", "data/test-*.parquet", ("image", "question", "answer", "category"), 2374
    )

    def __post_init__(self) -> None:
        if self.reading not in READINGS:
            raise ValueError(f"reading is one of {', '.join(READINGS)}, got {self.reading!r}")

    def questions(self, place: int, row: Mapping[str, Any]) -> list[Question]:
        """The two questions of an image are neighbours."""
        extra = {"truth": row["answer"], "category": row["category"], "pair": place // 2}
        text = f"{row['question']}\n{WORD}"
        return [Question(str(place), text, image_bytes(row["image"]), extra, max_new_tokens=32)]

    def judge(self, answer: Answer) -> float:
        """Yes or no and nothing else, but for periods at the end."""
        return answer.answer.lower().rstrip(".") == answer.extra["truth"].lower()

    def score(self, answers: Sequence[Answer]) -> TaskScore:
        """See the class."""
        hits = judged(self.name, answers, self.judge)
        pairs = whole_pairs(self.name, answers)
        named = beside(self.name, answers, "category")
        kinds = [str(named[first]) for first, _ in pairs]
        points = [
            PERCENT * ((hits[first] + hits[second]) / 2 + hits[first] * hits[second])
            for first, second in pairs
        ]
        sums = {name: 0.0 for name in READINGS}
        metrics = {}
        for kind in sorted(set(kinds)):
            mean = float(np.mean([value for value, its in zip(points, kinds) if its == kind]))
            metrics[f"score/{kind}"] = mean
            sums["cognition" if kind in COGNITION else "perception"] += mean
            sums["total"] += mean
        of = [kind for kind in kinds if self._counts(kind)]
        values = [value for value, kind in zip(points, kinds) if self._counts(kind)]
        if not values:
            raise UserError(f"{self.name}: no answer is to a question of {self.reading}")
        accuracy = {"accuracy": PERCENT * float(np.mean(hits))}
        items = grouped(values, of, weight=1.0)
        return TaskScore(self.reading, sums | accuracy | metrics, items, verdicts(answers, hits))

    def _counts(self, kind: str) -> bool:
        return self.reading == "total" or (kind in COGNITION) == (self.reading == "cognition")
