"""What a study shows, stated by rules: a verdict is a matter of an interval, never of an opinion.

===========  ======================================================================================
kind         asks, of ``metric`` (``ROW/METRIC``)
===========  ======================================================================================
slope        by how much it changes with ten times the ``x`` (``parameters`` or ``images``): the
             least-squares line through the means of ``cells`` over log10 x
gain         whether the last step up in ``x`` still gains: the difference of the two largest cells
difference   by how much cell ``a`` is above cell ``b``
above        by how much the best of ``cells`` is above the trivial feature ``baseline``, or above
             the ``best`` of all
===========  ======================================================================================

``cells`` is a name, a pattern (``mae_*``) or a list of them. Intervals are of 95 %, by 2,000
bootstrap draws that take the seeds of every cell and the items of the test set anew; cells, and
trivial features, that were judged on the same items get the same draw of them, so that their
differences are paired. The two or three seeds of a cell, drawn alone, would give far too narrow
intervals. So draws take the distances of seeds from the means of their cells, of all cells of a
finding together, times sqrt(n / (n - 1)) and Student's t over 1.96: seeds are taken to differ about
as much in each of these cells, one with a single seed included. Where all have one, what seeds do
is not in the interval, and the sentence says so. Noise alone is then called a rise or fall in one
of twenty findings at most. Higher is better unless the row says ``lower_is_better``.
``published``, in words, stands behind the sentence: what others found of the same question.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from webssl_jax.config import ConfigError
from webssl_jax.errors import suggest
from webssl_jax.evaluators.outcome import Outcome
from webssl_jax.study.cells import GROUP, NAMES, SWITCH, TEXT, TEXTS, Cell, Study, checked, chosen
from webssl_jax.study.results import Group

DRAWS = 2_000
_KEYS = {
    "slope": {"x", "metric", "cells"},
    "gain": {"x", "metric", "cells"},
    "difference": {"a", "b", "metric"},
    "above": {"cells", "metric", "baseline"},
}
KINDS = tuple(_KEYS)
_ALL = dict.fromkeys(("kind", "metric", "x", "a", "b", "baseline", "published"), TEXT)
_ALL |= {"cells": NAMES, "lower_is_better": SWITCH}
_OPTIONAL = {"kind", "lower_is_better", "published"}
X = ("parameters", "images")
Row = Mapping[str, Any]
Of = Callable[[Mapping[str, Any]], Any]  # of {cell: figure, or its draws}
Level = tuple[float, np.ndarray]  # a figure and its draws
NO_LEVEL: Level = (0.0, np.zeros(1))
BEST = "best"  # a baseline: whichever of the trivial features is
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
        _check(study, row, f"findings.{name}")
    for name, metrics in study.categories.items():
        where = f"categories.{name}"
        checked({where: metrics}, {where: TEXTS}, "")
        for metric in metrics:
            _check_metric(study, metric, where)


def _check(study: Study, row: Any, where: str) -> None:
    kind = checked({where: row}, {where: GROUP}, "")[where].get("kind", "")
    if kind not in KINDS:
        raise ConfigError(f"{where}.kind = {kind}: {suggest(str(kind), KINDS)}")
    needs = _KEYS[kind]
    known = {key: of for key, of in _ALL.items() if key in needs | _OPTIONAL}
    row = checked(row, known, f"{where}.")
    for key in sorted(needs - row.keys()):
        raise ConfigError(f"{where}.{key}: is missing")
    if "x" in row and row["x"] not in X:
        raise ConfigError(f"{where}.x = {row['x']}: {suggest(row['x'], X)}")
    names = [cell.name for cell in study.cells]
    for key in {"a", "b", "cells"} & needs:
        found = chosen(study.cells, row[key])
        if not found:
            raise ConfigError(f"{where}.{key} = {row[key]}: {suggest(str(row[key]), names)}")
        if key != "cells" and len(found) > 1:
            raise ConfigError(f"{where}.{key} = {row[key]}: is more than one cell")
    _check_metric(study, row["metric"], f"{where}.metric")


def _check_metric(study: Study, metric: str, where: str) -> None:
    rows = sorted({row for cell in study.cells for row in cell.config.evals})
    row, _, name = metric.partition("/")
    if row not in rows:
        known = suggest(row, rows) if rows else "the configs of the cells have no rows (evals)"
        raise ConfigError(f"{where} = {metric}: {known}")
    if not name:
        raise ConfigError(f"{where} = {metric}: write ROW/METRIC, as {row}/top1")


def state(study: Study, groups: Sequence[Group]) -> list[Finding]:
    """All findings of a study, of the runs that are done."""
    stated: dict[str, Finding] = {}
    for metric in dict.fromkeys(row["metric"] for row in study.findings.values()):
        draws = Draws(groups, metric)
        for name, row in study.findings.items():
            if row["metric"] == metric:
                stated[name] = _KINDS[row["kind"]](name, row, study, groups, draws)
    return [stated[name] for name in study.findings]


class Draws:
    """Bootstrap draws of one metric of the cells that have it.

    values: {cell: mean over its seeds}.
    """

    def __init__(self, groups: Sequence[Group], metric: str):
        row, _, self._name = metric.partition("/")
        self._generator = np.random.default_rng(0)
        self._weights: dict[tuple[str, int], np.ndarray] = {}
        self._stored = [one for group in groups for one in group.outcomes(row)]
        self.values: dict[str, float] = {}
        self._gaps: dict[str, np.ndarray] = {}  # (seeds,) from the mean
        self._by_items: dict[str, np.ndarray] = {}  # (DRAWS,) around zero
        for group in groups:
            figures, outcomes = group.figures(metric), group.outcomes(row)
            if not len(figures):
                continue
            cell = group.cell.name
            self.values[cell] = float(figures.mean())
            self._gaps[cell] = figures - figures.mean()
            if all(self._name in one.items for one in outcomes):
                drawn = [self._resampled(one.items[self._name], one.data) for one in outcomes]
                self._by_items[cell] = np.mean(drawn, axis=0)

    def _resampled(self, items: np.ndarray, data: str) -> np.ndarray:
        """(DRAWS,), around zero, as a metric need not be the plain mean of its items."""
        key = data, len(items)
        if key not in self._weights:
            even = np.full(len(items), 1 / len(items))
            drawn = self._generator.multinomial(len(items), even, DRAWS)
            self._weights[key] = drawn / len(items)
        items = np.asarray(items, np.float64)
        return self._weights[key] @ items - items.mean()

    def level(self, outcome: Outcome, baseline: str) -> Level:
        """A trivial feature of an outcome; its draws are of the same items as those of cells. Equal
        features may have their items in one outcome alone (archive.py); where none has, all draws
        are the figure."""
        known = outcome.baselines[baseline].metrics
        for one in self._stored:
            same = one.baselines.get(baseline)
            if same and (one.data, same.metrics) == (outcome.data, known):
                if self._name in same.items:
                    drawn = self._resampled(same.items[self._name], one.data)
                    return known[self._name], known[self._name] + drawn
        return known[self._name], np.full(DRAWS, known[self._name])

    def interval(
        self, of: Of, cells: Sequence[str], level: Level = NO_LEVEL
    ) -> tuple[float, float, float]:
        """(value, low, high) of a function of {cell: figure}, in which "" is the ``level``; low and
        high are NaN where nothing is known of what seeds and items do to a cell.

        cells: of the finding.
        """
        value = float(of(self.values | {"": level[0]}))
        gaps = {cell: self._gaps[cell] for cell in cells}
        free = sum(len(own) - 1 for own in gaps.values())
        if not free and any(cell not in self._by_items for cell in gaps):
            return value, float("nan"), float("nan")
        sizes = [own * np.sqrt(len(own) / (len(own) - 1)) for own in gaps.values() if len(own) > 1]
        pool = np.concatenate(sizes or [np.zeros(1)])
        if free:
            pool *= stats.t.ppf(0.975, free) / stats.norm.ppf(0.975)
        generator, draws = np.random.default_rng(1), {"": level[1]}
        for cell, own in gaps.items():
            by_seeds = generator.choice(pool, (len(own), DRAWS)).mean(0)
            draws[cell] = self.values[cell] + self._by_items.get(cell, 0.0) + by_seeds
        low, high = np.quantile(of(draws), [0.025, 0.975])
        return value, float(low), float(high)


def x_of(cell: Cell, x: str) -> int:
    return cell.parameters if x == "parameters" else cell.images


def slope(x: np.ndarray, figures: Sequence[Any]) -> Any:
    """Of the least-squares line over log10 ``x``; of figures or arrays of draws."""
    log = np.log10(x)
    centred = log - log.mean()
    return np.tensordot(centred / (centred @ centred), np.stack(figures), 1)


def _slope(name: str, row: Row, study: Study, groups: Sequence[Group], draws: Draws) -> Finding:
    own = _measured(row, study, groups)
    x = np.array([x_of(group.cell, row["x"]) for group in own], float)
    if len(set(x.tolist())) < 2:
        return _missing(name, row, groups, f"cells of different {row['x']}")
    names = [group.cell.name for group in own]
    result = draws.interval(lambda figures: slope(x, [figures[name] for name in names]), names)
    value = result[0]
    words = {
        RISES: f"{row['metric']} rises by {value:.3f} with ten times the {row['x']}",
        FALLS: f"{row['metric']} falls by {-value:.3f} with ten times the {row['x']}",
        UNCLEAR: f"whether {row['metric']} changes with the {row['x']} cannot be told "
        f"({value:+.3f} with ten times as many)",
    }
    return _finding(name, row, words, result, own, f"{len(own)} cells")


def _gain(name: str, row: Row, study: Study, groups: Sequence[Group], draws: Draws) -> Finding:
    own = sorted(_measured(row, study, groups), key=lambda g: x_of(g.cell, row["x"]))
    steps = [x_of(group.cell, row["x"]) for group in own][-3:]
    if len(steps) < 2 or len(set(steps)) < len(steps):
        needs = f"one cell at each of its largest {row['x']}, two at least"
        return _missing(name, row, groups, needs)
    before, after = (group.cell for group in own[-2:])
    names = [before.name, after.name]
    result = draws.interval(lambda figures: figures[after.name] - figures[before.name], names)
    step = f"{steps[-2]:,} to {steps[-1]:,} {row['x']}"
    words = {
        RISES: f"the step from {step} still gains {result[0]:+.3f} {row['metric']}",
        FALLS: f"the step from {step} loses {-result[0]:.3f} {row['metric']}",
        UNCLEAR: f"whether the step from {step} gains {row['metric']} cannot be told "
        f"({result[0]:+.3f})",
    }
    return _finding(name, row, words, result, own[-2:], "")


def _difference(
    name: str, row: Row, study: Study, groups: Sequence[Group], draws: Draws
) -> Finding:
    sides = [_measured({"cells": row[key], **row}, study, groups) for key in ("a", "b")]
    if not all(len(side) == 1 for side in sides):
        return _missing(name, row, groups, "")
    a, b = (side[0].cell.name for side in sides)
    result = draws.interval(lambda figures: figures[a] - figures[b], [a, b])
    words = {
        RISES: f"cell {a} is above cell {b} by {result[0]:.3f} {row['metric']}",
        FALLS: f"cell {a} is below cell {b} by {-result[0]:.3f} {row['metric']}",
        UNCLEAR: f"which of the cells {a} and {b} has more {row['metric']} cannot be told "
        f"({result[0]:+.3f})",
    }
    return _finding(name, row, words, result, [side[0] for side in sides], "")


def _above(name: str, row: Row, study: Study, groups: Sequence[Group], draws: Draws) -> Finding:
    own, baseline = _measured(row, study, groups), row["baseline"]
    if not own:
        return _missing(name, row, groups, "")
    eval_row, _, metric = row["metric"].partition("/")
    lower = bool(row.get("lower_is_better"))
    better = min if lower else max
    best = better(own, key=lambda group: draws.values[group.cell.name])
    outcome = best.outcomes(eval_row)[0]
    trivial = {k: x.metrics[metric] for k, x in outcome.baselines.items() if metric in x.metrics}
    if baseline not in trivial and (baseline != BEST or not trivial):
        return _missing(name, row, groups, f"a trivial feature, {baseline}")
    notes = ["best of its cells"] if len(own) > 1 else []
    if baseline == BEST:
        baseline = better(trivial, key=trivial.__getitem__)
        notes += ["best of its trivial features"] if len(trivial) > 1 else []
    cell, names = best.cell.name, [group.cell.name for group in own]
    level = draws.level(outcome, baseline)
    result = draws.interval(lambda figures: figures[cell] - figures[""], names, level)
    who = f"the best cell, {cell}," if len(own) > 1 else f"cell {cell}"
    even = "even " if len(own) > 1 else ""
    above, below = (even, "") if lower else ("", even)
    words = {
        RISES: f"{above}{who} is above the {baseline} by {result[0]:.3f} {row['metric']}",
        FALLS: f"{below}{who} is below the {baseline} by {-result[0]:.3f} {row['metric']}",
        UNCLEAR: f"whether {who} is above the {baseline} in {row['metric']} cannot be told "
        f"({result[0]:+.3f})",
    }
    more = f"{', '.join(notes)}: chosen on these items" if notes else ""
    return _finding(name, row, words, result, own, more)


_KINDS = {"slope": _slope, "gain": _gain, "difference": _difference, "above": _above}


def _measured(row: Row, study: Study, groups: Sequence[Group]) -> list[Group]:
    names = {cell.name for cell in chosen(study.cells, row["cells"])}
    return [g for g in groups if g.cell.name in names and len(g.figures(row["metric"]))]


def _missing(name: str, row: Row, groups: Sequence[Group], needs: str) -> Finding:
    eval_row, _, metric = row["metric"].partition("/")
    known = {key: 0 for g in groups for one in g.outcomes(eval_row) for key in one.metrics}
    if known and metric not in known:
        needs = f"another metric: {eval_row} measures {', '.join(known)}"
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
    notes = [f"95 % interval {low:+.3f} to {high:+.3f}" if low <= high else "no interval", more]
    counts = sorted({len(group.figures(row["metric"])) for group in groups})
    alone = "one seed, so only of the items" if low <= high else "one seed"
    notes.append(alone if counts == [1] else f"{' to '.join(map(str, counts))} seeds")
    good = {RISES: "worse", FALLS: "better"}
    if row.get("lower_is_better") and verdict in good:
        notes.append(f"lower is better, so {good[verdict]}")
    text = words[verdict]
    first = text[0] if text.startswith(row["metric"]) else text[0].upper()
    text = f"{first}{text[1:]} ({'; '.join(filter(None, notes))})."
    if row.get("published"):
        text += f" Published: {row['published']}."
    return Finding(name, row["kind"], text, verdict, value, low, high)
