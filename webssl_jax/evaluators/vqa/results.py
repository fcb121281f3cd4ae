"""Scores of benchmarks as one :class:`Outcome`, so that tables, curves, seeds and cards show them.

outcome = outcome_of({name: TASKS[name].score(answers) for name, answers in kept.items()})
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

import numpy as np

from webssl_jax.evaluators.outcome import Outcome
from webssl_jax.evaluators.vqa.averages import averages, weights
from webssl_jax.evaluators.vqa.task import TaskScore
from webssl_jax.evaluators.vqa.tasks import SIXTEEN

PROTOCOL = 1  # raised whenever the same answers would get another figure


def outcome_of(scores: Mapping[str, TaskScore], meaning: str = "") -> Outcome:
    """Headlines by the names of benchmarks, averages of the categories that are whole, all with
    standard errors over items; and each rule's other figures as ``BENCHMARK/METRIC``.

    The headline of the outcome is the average where all sixteen are there, else the benchmarks.
    Items of a benchmark pair with those of another model that was asked the same questions.
    """
    headlines = {name: score.items.headline() for name, score in scores.items()}
    errors = {name: score.items.standard_error() for name, score in scores.items()}
    sixteen = {task.name for task in SIXTEEN}
    means = averages({name: value for name, value in headlines.items() if name in sixteen})
    for name in means:
        shares = weights()[name].items()
        errors[name] = math.sqrt(sum((share * errors[task]) ** 2 for task, share in shares))
    metrics = headlines | means | {f"{name}_se": error for name, error in errors.items()}
    for name, score in scores.items():
        others = {key: value for key, value in score.metrics.items() if key != score.headline}
        metrics |= {f"{name}/{key}": value for key, value in others.items()}
    items = {name: score.items.contributions().astype(np.float32) for name, score in scores.items()}
    headline = ("average", *(name for name in means if name != "average"))
    return Outcome(
        headline if "average" in means else tuple(scores),
        metrics,
        items,
        _fingerprint(scores),
        meaning,
    )


def _fingerprint(scores: Mapping[str, TaskScore]) -> str:
    """Of the questions, and of the rules that judged them."""
    digest = hashlib.blake2b(digest_size=8)
    for name in sorted(scores):
        digest.update(repr((name, scores[name].headline, list(scores[name].verdicts))).encode())
    return f"vqa-{PROTOCOL}-{digest.hexdigest()}"
