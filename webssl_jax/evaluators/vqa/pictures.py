"""What a score looks like: questions with answers and verdicts, a radar, bars with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from webssl_jax.data.decode import DecodeError, decode_image
from webssl_jax.errors import UserError
from webssl_jax.evaluators.vqa.averages import AVERAGE, percent
from webssl_jax.evaluators.vqa.intervals import intervals
from webssl_jax.evaluators.vqa.task import CATEGORIES, Answer, Question, Task, TaskScore
from webssl_jax.evaluators.vqa.tasks import SIXTEEN
from webssl_jax.visuals import answers as cards
from webssl_jax.visuals import benchmarks

GROUPS = dict(
    zip((*CATEGORIES, AVERAGE), ("General", "Knowledge", "OCR & Chart", "Vision-Centric", "Mean"))
)
_SHOWN = 12


def picked(keys: Sequence[str], count: int = _SHOWN, seed: int = 0) -> list[str]:
    """The keys of ``count`` questions drawn by chance, in their order: what is shown is no choice
    of ours. They are the same for every model."""
    chosen = np.random.default_rng(seed).permutation(len(keys))[:count]
    return [keys[place] for place in sorted(chosen)]


def answer_sheet(
    task: Task, questions: Sequence[Question], answers: Sequence[Answer], score: TaskScore
) -> np.ndarray:
    """Cards of ``questions``, which have the images: :func:`picked` among those that were judged.

    Raises:
      ValueError: if none of them was judged.
      UserError: if an image cannot be decoded.
    """
    said = {answer.key: answer for answer in answers}
    shown = [
        cards.Shown(
            _pixels(question),
            _words(question.text),
            said[question.key].answer,
            _truth(question),
            score.verdicts[question.key],
        )
        for question in questions
        if question.key in score.verdicts
    ]
    figure = score.metrics[score.headline]
    subtitle = (
        f"{len(shown)} of {len(score.verdicts):,} questions, drawn by chance. "
        f"{score.headline.replace('_', ' ')} of all: {figure:.2f}. Frames: green right, red wrong, "
        "yellow partly right."
    )
    return cards.sheet(shown, f"{task.title}: what was answered", subtitle)


def radar(models: Mapping[str, Mapping[str, float]]) -> np.ndarray:
    """The sixteen headlines of models. models: {name: {benchmark: headline}}."""
    spokes = {
        GROUPS[category]: [task.title for task in SIXTEEN if task.category == category]
        for category in CATEGORIES
    }
    titles = {task.name: task.title for task in SIXTEEN}
    figures = {
        name: {titles[task]: percent(task, value) for task, value in headlines.items()}
        for name, headlines in models.items()
    }
    return benchmarks.radar(figures, spokes, "Sixteen benchmarks, percent (MME / 20)")


def bars(models: Mapping[str, Mapping[str, TaskScore]]) -> np.ndarray:
    """Categories and their mean with intervals over questions; those that are whole."""
    found = {
        name: {
            group: (one.value, one.low, one.high)
            for group, one in intervals(scores).items()
            if group in GROUPS
        }
        for name, scores in models.items()
    }
    there = {
        name: title for name, title in GROUPS.items() if any(name in x for x in found.values())
    }
    title = "Categories of benchmarks, with 95 % intervals over questions"
    return benchmarks.bars(found, there or GROUPS, title)


def _words(text: str) -> str:
    """A question on one line, without the instruction at its end, which all have."""
    *lines, last = text.splitlines()
    return " ".join(lines or [last])


def _truth(question: Question) -> str:
    truth = question.extra.get("truths") or [question.extra.get("truth")]
    return ", ".join(dict.fromkeys(map(str, truth)))


def _pixels(question: Question) -> np.ndarray | None:
    if question.image is None:
        return None
    try:
        return np.asarray(decode_image(question.image))
    except DecodeError as error:
        raise UserError(
            f"question {question.key}: its image cannot be decoded ({error}); download the "
            "benchmark again"
        ) from error
