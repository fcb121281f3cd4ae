"""How sure a figure is: bootstrap over questions, of one encoder or of two on the same questions.

Items are drawn again within their groups (``task.Items``), each benchmark by itself, so that
averages over benchmarks get intervals too. These are intervals over questions; another training run
of the same recipe differs by more, which only seeds can show.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from webssl_jax.errors import UserError
from webssl_jax.evaluators.vqa.averages import weights
from webssl_jax.evaluators.vqa.task import Items, TaskScore

DRAWS = 2000
_AT_ONCE = 4_000_000  # drawn items in memory


class Interval(NamedTuple):
    """A figure, and the bounds between which 95 % of the draws lie."""

    value: float
    low: float
    high: float

    @property
    def clear(self) -> bool:
        """Whether zero is outside; of a difference."""
        return self.low > 0 or self.high < 0


def intervals(
    scores: Mapping[str, TaskScore], draws: int = DRAWS, seed: int = 0
) -> dict[str, Interval]:
    """Of each benchmark's headline, and of the averages that its names make."""
    return _intervals({name: score.items for name, score in scores.items()}, draws, seed)


def differences(
    ours: Mapping[str, TaskScore],
    theirs: Mapping[str, TaskScore],
    draws: int = DRAWS,
    seed: int = 0,
) -> dict[str, Interval]:
    """Ours minus theirs on the benchmarks that both have, paired item by item: what both get right
    or both get wrong says nothing.

    Raises:
      UserError: if the two judged different questions.
    """
    both = [name for name in ours if name in theirs]
    if not both:
        raise UserError("the two have no benchmark in common")
    gaps = {name: _gap(name, ours[name], theirs[name]) for name in both}
    return _intervals(gaps, draws, seed)


def _gap(name: str, ours: TaskScore, theirs: TaskScore) -> Items:
    a, b = ours.items, theirs.items
    if (
        ours.headline != theirs.headline
        or not np.array_equal(a.groups, b.groups)
        or not np.array_equal(a.weights, b.weights)
        or list(ours.verdicts) != list(theirs.verdicts)
    ):
        raise UserError(f"{name}: the two judged different questions, or by another rule")
    return Items(a.values - b.values, a.groups, a.weights)


def _intervals(items: Mapping[str, Items], draws: int, seed: int) -> dict[str, Interval]:
    values = {name: one.headline() for name, one in items.items()}
    drawn = {name: _redrawn(one, draws, _rng(name, seed)) for name, one in items.items()}
    for name, shares in weights().items():
        if shares.keys() <= items.keys():
            values[name] = sum(share * values[task] for task, share in shares.items())
            drawn[name] = sum(
                (share * drawn[task] for task, share in shares.items()), np.zeros(draws)
            )
    bounds = {name: np.percentile(drawn[name], (2.5, 97.5)) for name in values}
    return {name: Interval(values[name], *map(float, bounds[name])) for name in values}


def _rng(name: str, seed: int) -> np.random.Generator:
    """Of each benchmark its own, whichever others there are."""
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


def _redrawn(items: Items, draws: int, rng: np.random.Generator) -> np.ndarray:
    """(draws,) headlines of as many items drawn with replacement from each group."""
    headlines = np.zeros(draws)
    for group, weight in enumerate(items.weights):
        values = items.values[items.groups == group].astype(np.float64)
        if not len(values):
            continue
        step = max(_AT_ONCE // len(values), 1)
        for first in range(0, draws, step):
            size = min(step, draws - first), len(values)
            picked = values[rng.integers(len(values), size=size)]
            headlines[first : first + step] += weight * picked.mean(axis=1)
    return headlines
