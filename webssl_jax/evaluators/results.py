"""All that one evaluation of one checkpoint found, as it lies in ``eval/STEP.json``."""

from __future__ import annotations

import json
import pathlib
from typing import Any, NamedTuple

from webssl_jax.config import UserError
from webssl_jax.evaluators.base import Score
from webssl_jax.evaluators.frozen import Measurement
from webssl_jax.evaluators.retrieval import WAYS, Retrieval
from webssl_jax.evaluators.zero_shot import ZeroShot

RETRIEVED = 10  # recall at this k stands for retrieval where one figure must
RETRIEVED_WAYS = tuple(f"eval/retrieval/{way}_r{RETRIEVED}" for way in WAYS)
# The metrics that stand for all, and their names for people.
COLUMNS = {
    "eval/knn/top1": "k-NN",
    "eval/linear/top1": "linear probe",
    "eval/zero_shot/top1": "zero-shot",
    **{
        metric: f"{way.replace('_', ' ')} R@{RETRIEVED}"
        for way, metric in zip(WAYS, RETRIEVED_WAYS)
    },
}


class Result(NamedTuple):
    """step: training steps behind it; None of trivial features. The rest is None where it was not
    asked for."""

    step: int | None
    frozen: Measurement | None = None
    zero_shot: ZeroShot | None = None
    retrieval: Retrieval | None = None

    @property
    def parts(self) -> dict[str, Measurement | ZeroShot | Retrieval]:
        """What there is, by name."""
        return {name: part for name, part in self._asdict().items() if name != "step" and part}

    def metrics(self) -> dict[str, float]:
        """``eval/...`` of all parts."""
        return {
            name: value for part in self.parts.values() for name, value in part.metrics().items()
        }

    def chance(self) -> dict[str, float]:
        """The metrics of guesses, of those parts that need no training images."""
        parts = [part for part in (self.zero_shot, self.retrieval) if part]
        return {name: value for part in parts for name, value in part.chance.items()}

    def scores(self) -> dict[str, Score]:
        """{a key of COLUMNS: item by item, hit or miss}, of what there is."""
        out = {}
        if self.frozen:
            out |= {"eval/knn/top1": self.frozen.knn, "eval/linear/top1": self.frozen.linear}
        if self.zero_shot:
            out["eval/zero_shot/top1"] = self.zero_shot.behind.within(1)
        if self.retrieval:
            for way, metric in zip(WAYS, RETRIEVED_WAYS):
                out[metric] = getattr(self.retrieval, way).within(RETRIEVED)
        return out

    def line(self) -> str:
        """The figures for the log."""
        return ", ".join(
            f"{COLUMNS[metric]} {score.top1:.3f} ± {score.se:.3f}"
            for metric, score in self.scores().items()
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types: the fields of the measurement, and what else there is by name."""
        own = {"step": self.step} if self.frozen is None else self.frozen.to_json()
        return own | {name: part.to_json() for name, part in self.parts.items() if name != "frozen"}

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Result:
        """Inverse of :meth:`to_json`."""
        return cls(
            row["step"],
            Measurement.from_json(row) if "knn" in row else None,
            ZeroShot.from_json(row["zero_shot"]) if "zero_shot" in row else None,
            Retrieval.from_json(row["retrieval"]) if "retrieval" in row else None,
        )


def read_result(path: pathlib.Path) -> Result:
    """Reads an ``eval/STEP.json``.

    Raises:
      UserError: if it is damaged.
    """
    try:
        return Result.from_json(json.loads(path.read_text()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: cannot be read ({type(error).__name__}: {error}); run python -m "
            "webssl_jax.evaluate again"
        ) from error
