"""MMVP (Tong et al., 2024): pairs of images that CLIP takes for the same, one question on both."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from webssl_jax.evaluators.vqa import scoring
from webssl_jax.evaluators.vqa.rules.choices import LETTER, option_words
from webssl_jax.evaluators.vqa.task import VISION_CENTRIC, Answer, Question, Source, TaskScore

_QUESTION, _OPTIONS, _TRUTH = "Question", "Options", "Correct Answer"


@dataclasses.dataclass(frozen=True)
class MMVP:
    """The share of pairs with both questions right. An answer is a letter or the option's text.

    Four published labels are known to be wrong (numbers 99, 100, 279, 280); they stay, as in
    Cambrian, whose figures ours stand beside.
    """

    name = "mmvp"
    title = "MMVP"
    category = VISION_CENTRIC
    source = Source(
        "MMVP/MMVP",
        "Questions.csv",
        ("Index", _QUESTION, _OPTIONS, _TRUTH),
        300,
        pictures="MMVP Images/{Index}.jpg",
    )

    def questions(self, place: int, row: Mapping[str, Any]) -> list[Question]:
        """The two of a pair are neighbours."""
        first, *others = (part.strip() for part in row[_OPTIONS].split("(b)"))
        options = [first, *(f"B. {other}" for other in others[:1]), *others[1:]]
        lines = (f"{row[_QUESTION]} Options:", *(x.replace("(a)", "A.") for x in options), LETTER)
        extra = {"truth": row[_TRUTH], "options": _texts(row[_OPTIONS]), "pair": place // 2}
        image = scoring.image_bytes(row["image"])
        return [Question(str(place), "\n".join(lines), image, extra)]

    def judge(self, answer: Answer) -> float:
        """The whole rest must be the letter or the text: "A. Open" is neither."""
        right = _letter(answer)
        text = answer.extra["options"][ord(right) - ord("a")].lower()
        return option_words(answer.answer) in (right, text)

    def score(self, answers: Sequence[Answer]) -> TaskScore:
        """See the class."""
        hits = scoring.judged(self.name, answers, self.judge)
        pairs = scoring.whole_pairs(self.name, answers)
        both = [hits[first] * hits[second] for first, second in pairs]
        percent = scoring.PERCENT
        metrics = {"pair_accuracy": percent * float(np.mean(both))}
        metrics["accuracy"] = percent * float(np.mean(hits))
        items = scoring.grouped(both, ["pairs"] * len(both), percent)
        return TaskScore("pair_accuracy", metrics, items, scoring.verdicts(answers, hits))


def _letter(answer: Answer) -> str:
    return answer.extra["truth"].lower()[1]  # "(a)"


def _texts(options: str) -> list[str]:
    """The words behind each bracket of "(a) Open (b) Closed"."""
    return [part.split(")")[1].strip() for part in options.split("(")[1:]]
