"""What a study shows, stated by rules: a verdict is a matter of an interval, never of an opinion.

===========  ======================================================================================
kind         asks, of ``metric`` (``ROW/METRIC``)
===========  ======================================================================================
slope        by how much it changes with ten times the ``x`` (``parameters`` or ``images``): the
             least-squares line through the means of ``cells`` over log10 x
gain         whether the last step up in ``x`` still gains: the difference of the two largest cells
difference   by how much cell ``a`` is above cell ``b``
above        by how much each of ``cells`` is above the trivial feature ``baseline``
===========  ======================================================================================

``cells`` is a name, a pattern (``mae_*``) or a list of them. Intervals are of 95 %, by 2,000
bootstrap draws that take the seeds of every cell and the items of the test set anew; cells that
were judged on the same items get the same draw of them, so that their differences are paired.
Where a cell has one seed, what seeds do is not in the interval, and the sentence says so. Higher is
better unless the row says ``lower_is_better``. ``published``, in words, stands behind the sentence:
a figure that others found of the same question.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from webssl_jax.config import ConfigError
from webssl_jax.errors import suggest
from webssl_jax.study.cells import Cell, Study, chosen
from webssl_jax.study.results import Group

DRAWS = 2_000
_KEYS = {
    "slope": {"x", "metric", "cells"},
    "gain": {"x", "metric", "cells"},
    "difference": {"a", "b", "metric"},
    "above": {"cells", "metric", "baseline"},
}
KINDS = tuple(_KEYS)
_OPTIONAL = {"kind", "lower_is_better", "published"}
X = ("parameters", "images")
Row = Mapping[str, Any]
RISES, FALLS, UNCLEAR, MISSING = "rises", "falls", "cannot tell", "not measured yet"


@dataclasses.dataclass(frozen=True)
class Finding:
    """verdict: RISES, FALLS (or stands above, below), UNCLEAR or MISSING. value, low, high: the
    figure and its interval."""

    name: str
    kind: str
    text: str
    verdict: str
    value: float = float("nan")
    low: float = float("nan")
    high: float = float("nan")


def check(study: Study) -> None:
    """Refuses findings and categories that cannot be.

    Raises:
      ConfigError: naming the key.
    """
    for name, row in study.findings.items():
        where = f"findings.{name}"
        kind = row.get("kind", "")
        if kind not in _KEYS:
            raise ConfigError(f"{where}.kind = {kind}: {suggest(kind, list(_KEYS))}")
        for key in row:
            if key not in _KEYS[kind] | _OPTIONAL:
                raise ConfigError(f"{where}.{key}: {suggest(key, sorted(_KEYS[kind]))}")
        for key in sorted(_KEYS[kind] - row.keys()):
            raise ConfigError(f"{where}.{key}: is missing")
        if "x" in row and row["x"] not in X:
            raise ConfigError(f"{where}.x = {row['x']}: {suggest(row['x'], X)}")
        for key in ("a", "b", "cells"):
            if key in row and not chosen(study.cells, row[key]):
                known = [cell.name for cell in study.cells]
                raise ConfigError(f"{where}.{key} = {row[key]}: {suggest(str(row[key]), known)}")
        _check_metric(study, row["metric"], f"{where}.metric")
    for name, metrics in study.categories.items():
        for metric in metrics:
            _check_metric(study, metric, f"categories.{name}")


def _check_metric(study: Study, metric: str, where: str) -> None:
    rows = sorted({row for cell in study.cells for row in cell.config.evals})
    if (row := metric.partition("/")[0]) not in rows:
        raise ConfigError(f"{where} = {metric}: {suggest(row, rows)}")


def state(study: Study, groups: Sequence[Group]) -> list[Finding]:
    """All findings of a study, of the runs that are done."""
    drawn: dict[str, Draws] = {}
    stated = []
    for name, row in study.findings.items():
        if (metric := row["metric"]) not in drawn:
            drawn[metric] = Draws(groups, metric)
        stated.append(_KINDS[row["kind"]](name, row, study, groups, drawn[metric]))
    return stated


class Draws:
    """Bootstrap draws of one metric of the cells that have it.

    values: {cell: mean over its seeds}. draws: {cell: (DRAWS,)}.
    """

    def __init__(self, groups: Sequence[Group], metric: str):
        row, _, name = metric.partition("/")
        generator = np.random.default_rng(0)
        weights: dict[str, np.ndarray] = {}
        self.values: dict[str, float] = {}
        self.draws: dict[str, np.ndarray] = {}
        for group in groups:
            figures = group.figures(metric)
            if not len(figures):
                continue
            outcomes = group.outcomes(row)
            by_seed = np.repeat(figures[:, None], DRAWS, 1)
            if all(name in one.items for one in outcomes):
                items = np.stack([one.items[name] for one in outcomes]).astype(np.float64)
                key, count = f"{outcomes[0].data}", items.shape[1]
                if key not in weights:
                    even = np.full(count, 1 / count)
                    weights[key] = generator.multinomial(count, even, DRAWS) / count
                # a metric need not be the plain mean of its items: its draws are around it
                by_seed += items @ weights[key].T - items.mean(1, keepdims=True)
            picked = generator.integers(len(figures), size=(len(figures), DRAWS))
            self.values[group.cell.name] = float(figures.mean())
            self.draws[group.cell.name] = np.take_along_axis(by_seed, picked, 0).mean(0)

    def interval(self, of: Callable[[Mapping[str, Any]], Any]) -> tuple[float, float, float]:
        """(value, low, high) of a function of {cell: figure}."""
        low, high = np.quantile(of(self.draws), [0.025, 0.975])
        return float(of(self.values)), float(low), float(high)


def x_of(cell: Cell, x: str) -> int:
    return cell.parameters if x == "parameters" else cell.images


def slope(x: np.ndarray, figures: Sequence[Any]) -> Any:
    """Of the least-squares line over log10 ``x``; of figures or arrays of draws."""
    log = np.log10(x)
    centred = log - log.mean()
    return np.tensordot(centred / (centred @ centred), np.stack(figures), 1)


def _slope(name: str, row: Row, study: Study, groups: Sequence[Group], draws: Draws) -> Finding:
    groups = _measured(row, study, groups)
    x = np.array([x_of(group.cell, row["x"]) for group in groups], float)
    if len(set(x.tolist())) < 2:
        return _missing(name, row, "two sizes at least" if row["x"] == "parameters" else "")
    names = [group.cell.name for group in groups]
    result = draws.interval(lambda figures: slope(x, [figures[name] for name in names]))
    value = result[0]
    words = {
        RISES: f"{row['metric']} rises by {value:+.3f} with ten times the {row['x']}",
        FALLS: f"{row['metric']} falls by {value:+.3f} with ten times the {row['x']}",
        UNCLEAR: f"whether {row['metric']} changes with the {row['x']} cannot be told "
        f"({value:+.3f} with ten times as many)",
    }
    return _finding(name, row, words, result, groups, f"{len(groups)} cells")


def _gain(name: str, row: Row, study: Study, groups: Sequence[Group], draws: Draws) -> Finding:
    groups = sorted(_measured(row, study, groups), key=lambda g: x_of(g.cell, row["x"]))[-2:]
    if len(groups) < 2:
        return _missing(name, row, "")
    before, after = (group.cell for group in groups)
    result = draws.interval(lambda figures: figures[after.name] - figures[before.name])
    step = f"{x_of(before, row['x']):,} to {x_of(after, row['x']):,} {row['x']}"
    words = {
        RISES: f"the step from {step} still gains {result[0]:+.3f} {row['metric']}",
        FALLS: f"the step from {step} loses {result[0]:+.3f} {row['metric']}",
        UNCLEAR: f"whether the step from {step} gains {row['metric']} cannot be told "
        f"({result[0]:+.3f})",
    }
    return _finding(name, row, words, result, groups, "")


def _difference(
    name: str, row: Row, study: Study, groups: Sequence[Group], draws: Draws
) -> Finding:
    sides = [_measured({"cells": row[key], **row}, study, groups) for key in ("a", "b")]
    if not all(len(side) == 1 for side in sides):
        return _missing(name, row, "")
    a, b = (side[0].cell.name for side in sides)
    result = draws.interval(lambda figures: figures[a] - figures[b])
    words = {
        RISES: f"cell {a} is above cell {b} by {result[0]:.3f} {row['metric']}",
        FALLS: f"cell {a} is below cell {b} by {-result[0]:.3f} {row['metric']}",
        UNCLEAR: f"which of the cells {a} and {b} has more {row['metric']} cannot be told "
        f"({result[0]:+.3f})",
    }
    return _finding(name, row, words, result, [side[0] for side in sides], "")


def _above(name: str, row: Row, study: Study, groups: Sequence[Group], draws: Draws) -> Finding:
    groups = _measured(row, study, groups)
    eval_row, _, metric = row["metric"].partition("/")
    levels = [one.baselines.get(row["baseline"]) for g in groups for one in g.outcomes(eval_row)]
    if not groups or not all(levels):
        return _missing(name, row, f"{row['baseline']} among its baselines")
    best = max((group.cell.name for group in groups), key=draws.values.__getitem__)
    level = levels[0]
    assert level is not None
    rival = level.metrics[metric]
    result = draws.interval(lambda figures: figures[best] - rival)
    words = {
        RISES: f"the best cell, {best}, is above the {row['baseline']} by {result[0]:.3f} "
        f"{row['metric']}",
        FALLS: f"even the best cell, {best}, is below the {row['baseline']} by {-result[0]:.3f} "
        f"{row['metric']}",
        UNCLEAR: f"whether the best cell, {best}, is above the {row['baseline']} in "
        f"{row['metric']} cannot be told ({result[0]:+.3f})",
    }
    return _finding(name, row, words, result, groups, "best of its cells: chosen on these items")


_KINDS = {"slope": _slope, "gain": _gain, "difference": _difference, "above": _above}


def _measured(row: Row, study: Study, groups: Sequence[Group]) -> list[Group]:
    names = {cell.name for cell in chosen(study.cells, row["cells"])}
    return [g for g in groups if g.cell.name in names and len(g.figures(row["metric"]))]


def _missing(name: str, row: Row, needs: str) -> Finding:
    words = f"{row['metric']}: {MISSING}" + (f"; it needs {needs}" if needs else "")
    return Finding(name, row["kind"], f"{words}.", MISSING)


def _finding(
    name: str,
    row: Row,
    words: Mapping[str, str],
    result: tuple[float, float, float],
    groups: Sequence[Group],
    more: str,
) -> Finding:
    value, low, high = result
    verdict = RISES if low > 0 else FALLS if high < 0 else UNCLEAR
    text = words[verdict]
    notes = [f"95 % interval {low:+.3f} to {high:+.3f}"]
    notes += [more] if more else []
    seeds = min(len(group.figures(row["metric"])) for group in groups)
    notes.append(f"{seeds} seeds" if seeds > 1 else "one seed, so only of the items")
    good = {RISES: "better", FALLS: "worse"}
    if row.get("lower_is_better"):
        good = {RISES: "worse", FALLS: "better"}
        notes.append(f"lower is better, so {good[verdict]}" if verdict in good else "")
    text = f"{text[0].upper()}{text[1:]} ({'; '.join(filter(None, notes))})."
    if row.get("published"):
        text += f" Published: {row['published']}."
    return Finding(name, row["kind"], text, verdict, value, low, high)
