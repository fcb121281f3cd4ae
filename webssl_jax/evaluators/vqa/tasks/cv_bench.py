"""CV-Bench (Tong et al., 2024): counts and relations in 2D, depth and distance in 3D."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from webssl_jax.evaluators.vqa import scoring
from webssl_jax.evaluators.vqa.rules.choices import LETTER, letter
from webssl_jax.evaluators.vqa.task import VISION_CENTRIC, Answer, Question, Source, TaskScore

_REPO = "nyu-visionx/CV-Bench"
_COLUMNS = ("image", "prompt", "choices", "answer", "task", "source")


def _question(place: int, row: Mapping[str, Any]) -> Question:
    extra = {"truth": row["answer"], "options": scoring.texts(row["choices"])}
    extra |= {"category": row["task"], "source": row["source"]}
    text = f"{row['prompt']}\n{LETTER}"
    return Question(str(place), text, scoring.image_bytes(row["image"]), extra)


def _right(answer: Answer) -> str:
    return answer.extra["truth"].lower()[1]  # "(A)"


@dataclasses.dataclass(frozen=True)
class CVBench2D:
    """The mean of two accuracies, on images of ADE20K and of COCO."""

    name = "cv_bench_2d"
    title = "CV-Bench 2D"
    category = VISION_CENTRIC
    source = Source(_REPO, "test_2d*.parquet", _COLUMNS, 1438)

    def questions(self, place: int, row: Mapping[str, Any]) -> list[Question]:
        """One a row."""
        return [_question(place, row)]

    def judge(self, answer: Answer) -> float:
        """The letter; only a period may stand behind it."""
        return letter(answer.answer, ends=".") == _right(answer)

    def score(self, answers: Sequence[Answer]) -> TaskScore:
        """See the class."""
        hits = scoring.judged(self.name, answers, self.judge)
        sources = list(map(str, scoring.beside(self.name, answers, "source")))
        items = scoring.grouped(hits, sources, scoring.PERCENT / len(set(sources)))
        metrics = {"accuracy": items.headline()}
        metrics["accuracy_of_questions"] = scoring.PERCENT * float(np.mean(hits))
        metrics |= scoring.part_means(answers, hits, "source")
        metrics |= scoring.part_means(answers, hits, "category")
        return TaskScore("accuracy", metrics, items, scoring.verdicts(answers, hits))


@dataclasses.dataclass(frozen=True)
class CVBench3D:
    """Accuracy over all questions, on images of Omni3D."""

    name = "cv_bench_3d"
    title = "CV-Bench 3D"
    category = VISION_CENTRIC
    source = Source(_REPO, "test_3d*.parquet", _COLUMNS, 1200)

    def questions(self, place: int, row: Mapping[str, Any]) -> list[Question]:
        """One a row."""
        return [_question(place, row)]

    def judge(self, answer: Answer) -> float:
        """The letter, or an option of one character that is the answer's first."""
        said, right = letter(answer.answer), _right(answer)
        return said in (right, answer.extra["options"][ord(right) - ord("a")])

    def score(self, answers: Sequence[Answer]) -> TaskScore:
        """See the class."""
        return scoring.accuracy(self.name, answers, self.judge)
