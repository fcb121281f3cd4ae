"""From verdicts on answers to a score: means over questions, and over groups of them."""

from __future__ import annotations

import collections
import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from webssl_jax.errors import UserError
from webssl_jax.evaluators.vqa.task import Answer, Items, TaskScore

PERCENT = 100.0


def judged(task: str, answers: Sequence[Answer], judge: Callable[[Answer], float]) -> list[float]:
    """The verdict on each answer, 0 to 1.

    Raises:
      UserError: if there is no answer, one lacks a field that the rule needs, or holds in it what
        the rule cannot read.
    """
    if not answers:
        raise UserError(f"{task}: no answer to judge; ask a model first")
    return [_verdict(task, answer, judge) for answer in answers]


def _verdict(task: str, answer: Answer, judge: Callable[[Answer], float]) -> float:
    try:
        return float(judge(answer))
    except KeyError as error:
        raise _lacking(task, error) from error
    except (TypeError, ValueError, AttributeError, IndexError, ZeroDivisionError) as error:
        raise UserError(
            f"{task}: question {answer.key} cannot be judged, for what is kept beside its answer "
            f"({error}): {json.dumps(answer.extra)[:200]}; ask the model again"
        ) from error


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
    """The file of an image column; None where the row has no image.

    Raises:
      ValueError: if the image is named and not held: without it the model would answer blindly.
    """
    if image is None:
        return None
    if image["bytes"] is None:
        raise ValueError("its image is not in the file")
    return image["bytes"]


def texts(values: Any) -> list[str]:
    """A list of texts.

    Raises:
      TypeError: for anything else; a text is one of letters, else.
    """
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise TypeError(f"a list of texts is wanted, and {values!r:.80} is there")
    return values


def _lacking(task: str, error: KeyError) -> UserError:
    return UserError(
        f"{task}: an answer has no {error} beside it; it was kept by another version or "
        "benchmark; ask the model again"
    )
