"""From verdicts on answers to a score: means over questions, and over groups of them."""

from __future__ import annotations

import collections
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from webssl_jax.errors import UserError
from webssl_jax.evaluators.vqa.task import Answer, Items, TaskScore

PERCENT = 100.0


def judged(task: str, answers: Sequence[Answer], judge: Callable[[Answer], float]) -> list[float]:
    """The verdict on each answer, 0 to 1.

    Raises:
      UserError: if there is no answer, or one lacks a field that the rule needs.
    """
    if not answers:
        raise UserError(f"{task}: no answer to judge; ask a model first")
    try:
        return [float(judge(answer)) for answer in answers]
    except KeyError as error:
        raise _lacking(task, error) from error


def beside(task: str, answers: Sequence[Answer], name: str) -> list[Any]:
    """``extra[name]`` of each answer.

    Raises:
      UserError: if one has none.
    """
    try:
        return [answer.extra[name] for answer in answers]
    except KeyError as error:
        raise _lacking(task, error) from error


def accuracy(
    task: str, answers: Sequence[Answer], judge: Callable[[Answer], float], by: str = "category"
) -> TaskScore:
    """The mean verdict over all questions, in percent, and that of each value of ``extra[by]``.

    Raises:
      UserError: see :func:`judged`.
    """
    values = np.array(judged(task, answers, judge), np.float32)
    metrics = {"accuracy": PERCENT * float(values.mean(dtype=np.float64))}
    metrics |= part_means(answers, values, by)
    everything = Items(values, np.zeros(len(values), np.int32), np.array([PERCENT], np.float32))
    return TaskScore("accuracy", metrics, everything, verdicts(answers, values))


def part_means(
    answers: Sequence[Answer], values: Sequence[float] | np.ndarray, by: str
) -> dict[str, float]:
    """{``accuracy/PART``: percent}, rising by name; nothing where answers have no ``by``."""
    parts = collections.defaultdict(list)
    for answer, value in zip(answers, values):
        if by in answer.extra:
            parts[str(answer.extra[by])].append(float(value))
    return {f"accuracy/{part}": PERCENT * float(np.mean(parts[part])) for part in sorted(parts)}


def verdicts(answers: Sequence[Answer], values: Sequence[float] | np.ndarray) -> dict[str, float]:
    """{key of a question: its verdict}."""
    return {answer.key: float(value) for answer, value in zip(answers, values)}


def whole_pairs(task: str, answers: Sequence[Answer]) -> list[tuple[int, int]]:
    """The places of the two answers of each pair, ``extra["pair"]``, in the order of the pairs.

    Raises:
      UserError: if a pair has one answer or more than two.
    """
    pairs = collections.defaultdict(list)
    for place, pair in enumerate(beside(task, answers, "pair")):
        pairs[pair].append(place)
    for pair, places in pairs.items():
        if len(places) != 2:
            raise UserError(
                f"{task}: pair {pair} has {len(places)} answers and needs two: it counts as a "
                "whole; ask the rest of the questions"
            )
    return [(first, second) for _, (first, second) in sorted(pairs.items())]


def grouped(values: Sequence[float], groups: Sequence[Hashable], weight: float) -> Items:
    """Items in named groups that weigh ``weight`` each; groups in the order of their names."""
    names = sorted(set(groups), key=str)
    places = np.array([names.index(group) for group in groups], np.int32)
    weights = np.full(len(names), weight, np.float32)
    return Items(np.array(values, np.float32), places, weights)


def image_bytes(image: Mapping[str, Any] | None) -> bytes | None:
    """The file of an image column; None where the row has no image."""
    return None if image is None else image["bytes"]


def _lacking(task: str, error: KeyError) -> UserError:
    return UserError(
        f"{task}: an answer has no {error} beside it; it was kept by another version or "
        "benchmark; ask the model again"
    )
