"""A detector distilled into features of our own: logistic regression from the features of a model
to whether another scorer's figure lies above a threshold. What a text detector or a language model
says of some images, the model then says of all, at the cost of its features.

Records of either kind are dealt at random: eight tenths fit, a tenth chooses the penalty, a tenth
is held out and gives the area under the ROC curve, with DeLong's standard error (DeLong, DeLong and
Clarke-Pearson 1988).
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict
from scipy import optimize, special, stats

from webssl_jax.config import UserError
from webssl_jax.curation import expressions, scores
from webssl_jax.curation.feature_pool import FeaturePool
from webssl_jax.data.sources import ArrayRecordSource
from webssl_jax.evaluators import feature_files
from webssl_jax.model import load
from webssl_jax.sharding import mesh as meshes

PENALTIES = tuple(10.0**power for power in range(-6, 1))  # of the mean loss, on unit variance
MOST = 250_000  # records that are dealt; more would change little
FEWEST = 100  # of either kind: ten in a tenth


class Area(NamedTuple):
    """Under the ROC curve: the chance that a positive ranks before a negative, its standard error,
    and its 95 % interval."""

    value: float
    se: float

    @property
    def interval(self) -> tuple[float, float]:
        return max(0.0, self.value - 1.96 * self.se), min(1.0, self.value + 1.96 * self.se)


def area(values: np.ndarray, positive: np.ndarray) -> Area:
    """Of (n,) values, larger for ``positive``, (n,) bool; of each kind two at least."""
    many, few = values[positive], values[~positive]
    ranks = stats.rankdata(np.concatenate([many, few]))
    # Of each positive the share of negatives below it, and of each negative of positives above it.
    above = (ranks[: len(many)] - stats.rankdata(many)) / len(few)
    below = 1 - (ranks[len(many) :] - stats.rankdata(few)) / len(many)
    spread = sum(part.var(ddof=1) / len(part) for part in (above, below))
    return Area(float(above.mean()), float(np.sqrt(spread)))


@dataclasses.dataclass(frozen=True)
class Head:
    """weights (D,), bias: of the logit, on features as they are. model: fingerprint of what makes
    them. feature: cls or patches. target: what a positive is, in words."""

    weights: np.ndarray
    bias: float
    model: str
    feature: str
    target: str

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """(n, D) -> (n,) float32: the probability of a positive."""
        return special.expit(features.astype(np.float32) @ self.weights + self.bias)

    def save(self, path: Path) -> None:
        """One npz file, in a folder that is made."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_name(path.name + ".tmp").open("wb") as file:
            np.savez(file, **dataclasses.asdict(self))
        path.with_name(path.name + ".tmp").replace(path)

    @classmethod
    def load(cls, path: Path) -> Head:
        """Raises UserError for a file that is none."""
        try:
            with np.load(path, allow_pickle=False) as file:
                found = {field.name: file[field.name] for field in dataclasses.fields(cls)}
        except Exception as error:  # it has no common type
            raise UserError(
                f"{path}: is no head ({error}); make one with webssl curate fit-head"
            ) from None
        words = {name: str(found[name]) for name in ("model", "feature", "target")}
        return cls(found["weights"], float(found["bias"]), **words)

    @property
    def digest(self) -> int:
        """Another head has another."""
        known = repr((self.bias, self.model, self.feature)).encode() + self.weights.tobytes()
        return int.from_bytes(hashlib.sha256(known).digest()[:6], "little")


class Target(NamedTuple):
    """Records are positives whose ``column`` of the scores in ``folder``, or an expression of
    several, is above ``above``."""

    folder: Path
    column: str
    above: float


def fit(
    target: Target, model: str, output: Path, features: Path | None = None, feature: str = "cls"
) -> dict[str, Any]:
    """Fits a head and writes it.

    Args:
      model: as :func:`webssl_jax.load` takes it.
      features: where its features are kept; made there, or what is left of them. By default beside
        the output, ``<output>.features``.
      feature: cls or patches.

    Returns:
      The figures: records, positives, penalty, area and interval.

    Raises:
      UserError: for scores or features that do not fit, or too few of either kind.
    """
    values = expressions.numbers(target.folder, target.column, "--column")
    files = [shard["file"] for shard in scores.shards(target.folder)]
    features = features or output.with_name(output.name + ".features")
    pool = pool_of(model, files, features, feature)
    where = f"--column {target.column} --above {target.above:g}"
    head, figures = learn(pool, values, target.above, target.column, where)
    head.save(output)
    return figures


def pool_of(model: str, pattern: Sequence[str], folder: Path, feature: str) -> FeaturePool:
    """Features of shards, of all devices; made in ``folder``, or what is left of them.

    Raises:
      UserError: for a model or shards that cannot be read, a feature that the model has not, a
        folder with others.
    """
    opened = load(model, mesh=all_devices())
    asked = feature_files.Asked(feature_files.choose(feature, opened, "feature"))
    feature_files.write(opened, ArrayRecordSource(pattern), folder, asked)
    return FeaturePool.open(folder, pattern, feature)


def learn(
    pool: FeaturePool, values: np.ndarray, above: float, name: str, where: str
) -> tuple[Head, dict[str, Any]]:
    """A head, and its figures as of :func:`fit`.

    Args:
      values: (n,) of all records of the pool, NaN of those that are not to be learned from; those
        above ``above`` are positives.
      name: of the values. where: for messages.

    Raises:
      UserError: for too few of either kind.
    """
    labelled = _labelled(pool, values, above)
    count, positives = len(labelled.positive), int(labelled.positive.sum())
    if min(positives, count - positives) < FEWEST:
        raise UserError(
            f"{where}: {positives:,} of {count:,} records are above; {FEWEST} must be, and "
            f"{FEWEST} not: choose another threshold or score more records"
        )
    weights, bias, penalty = _fit(labelled)
    held_out = labelled.part(9)
    found = area(held_out.features @ weights + bias, held_out.positive)
    words = f"{name} > {above:g}"
    figures = {
        "target": words,
        "records": count,
        "positives": positives,
        "left_out": len(values) - count,
        "penalty": penalty,
        "held_out": len(held_out.positive),
        "auc": found.value,
        "interval": found.interval,
    }
    return Head(weights, bias, pool.facts["weights"], pool.column, words), figures


def all_devices() -> Mesh:
    """Parameters and batches cut over all devices of this machine."""
    return meshes.create(ConfigDict({"replica": 1, "fsdp": -1, "tensor": 1}))


class _Labelled(NamedTuple):
    """Of the records that are used: (n, D) features, (n,) bool, and (n,) which tenth each is in."""

    features: np.ndarray
    positive: np.ndarray
    tenth: np.ndarray

    def part(self, first: int, last: int | None = None) -> _Labelled:
        """Those of the tenths from ``first`` to ``last``."""
        chosen = (self.tenth >= first) & (self.tenth <= (first if last is None else last))
        return _Labelled(*(column[chosen] for column in self))


def _labelled(pool: FeaturePool, values: np.ndarray, above: float) -> _Labelled:
    """values: (n,) of all records; NaN where there is none."""
    rng = np.random.default_rng(0)
    scored = np.flatnonzero(~np.isnan(values))
    used = np.zeros(len(values), bool)
    used[rng.permutation(scored)[:MOST]] = True
    rows, features = [], []
    for numbers, block in pool.blocks():
        rows.append(numbers[used[numbers]])
        features.append(block[used[numbers]])
    positive = values[np.concatenate(rows)] > above
    tenth = np.zeros(len(positive), int)
    for kind in (False, True):
        own = np.flatnonzero(positive == kind)
        tenth[rng.permutation(own)] = np.arange(len(own)) % 10
    return _Labelled(np.concatenate(features), positive, tenth)


def _fit(labelled: _Labelled) -> tuple[np.ndarray, float, float]:
    """Weights (D,), bias, and the penalty that ranks the ninth tenth best."""
    fitting, judging = labelled.part(0, 7), labelled.part(8)
    mean, std = fitting.features.mean(axis=0), fitting.features.std(axis=0)
    scale = np.where(std > 1e-6 * np.maximum(np.abs(mean), 1e-6), 1 / np.maximum(std, 1e-30), 0)
    x, y = (fitting.features - mean) * scale, fitting.positive.astype(np.float32)

    def loss(w: np.ndarray, penalty: float) -> tuple[float, np.ndarray]:
        logits = x @ w[:-1].astype(np.float32) + np.float32(w[-1])
        gap = (special.expit(logits) - y) / len(y)
        slope = np.append(x.T @ gap + penalty * w[:-1], gap.sum())
        value = np.logaddexp(0, logits).mean() - (y * logits).mean()
        return float(value + penalty / 2 * w[:-1] @ w[:-1]), slope.astype(np.float64)

    best, w = (-1.0, np.zeros(0), 0.0), np.zeros(x.shape[1] + 1)
    for penalty in sorted(PENALTIES, reverse=True):  # each starts where the stronger one ended
        w = optimize.minimize(loss, w, (penalty,), "L-BFGS-B", jac=True, options={"maxiter": 200}).x
        found = area(judging.features @ (w[:-1] * scale), judging.positive).value
        if found > best[0]:
            best = found, w, penalty
    _, w, penalty = best
    weights = (w[:-1] * scale).astype(np.float32)
    return weights, float(w[-1] - mean @ weights), penalty
