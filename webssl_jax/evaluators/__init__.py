"""Evaluators: figures and pictures from a feature function. One file a protocol; ``base.py`` says
what each is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from webssl_jax.config import UserError, suggest
from webssl_jax.evaluators.base import Dataset, Evaluator, paired_difference
from webssl_jax.evaluators.frozen import FrozenFeatureEvaluation, Measurement
from webssl_jax.evaluators.report import report_table

EVALUATORS = {FrozenFeatureEvaluation.name: FrozenFeatureEvaluation}

__all__ = [
    "EVALUATORS",
    "Dataset",
    "Evaluator",
    "FrozenFeatureEvaluation",
    "Measurement",
    "create",
    "paired_difference",
    "report_table",
]


def create(name: str, options: Mapping[str, Any], train: Dataset, test: Dataset) -> Evaluator:
    """The evaluator that a config entry names, e.g.
    ``create("frozen", {"batch": 256}, train, test)``.

    Raises:
      UserError: for an unknown name, with the nearest real one.
    """
    if name not in EVALUATORS:
        raise UserError(f"evaluator {name!r}: {suggest(name, EVALUATORS)}")
    return EVALUATORS[name](train, test, **options)
