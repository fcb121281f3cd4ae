"""Runs that differ in their seed only, as one: mean figures, how far the seeds lie apart, and
paired comparisons with their own beginnings and with trivial features.

Two errors are told apart. The spread over seeds is the standard deviation of a figure between runs.
The standard error of a difference is that of the items: other images of the same kind would have
given another figure, however many seeds are averaged.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from webssl_jax.config import UserError, differences, drop_costs
from webssl_jax.evaluators import outcome, tables
from webssl_jax.evaluators.outcome import Difference, Outcome
from webssl_jax.evaluators.probes.labelled import MAJORITY
from webssl_jax.evaluators.tables import Column
from webssl_jax.runs import read_config

# Groups of the config that change no figure: where checkpoints lie, when lines are written.
_WITHOUT_EFFECT = ("checkpoint", "host", "log", "profile", "pictures", "eval_batch")


class Seeds(NamedTuple):
    """name: in tables. batch: images a step. measured: {step: the outcomes of each run}, by step,
    of those steps that all of them have.

    A ``rival`` below is a step, or the name of trivial features.
    """

    name: str
    batch: int
    measured: dict[int, list[dict[str, Outcome]]]

    @property
    def last(self) -> int:
        return max(self.measured)

    @property
    def columns(self) -> list[Column]:
        """The headline metrics of all rows."""
        return tables.columns({"": self.measured[self.last][0]})

    @property
    def baselines(self) -> list[str]:
        """The names of trivial features."""
        rows = self.measured[self.last][0].values()
        return list(dict.fromkeys(name for one in rows for name in one.baselines))

    def outcomes(self, rival: int | str, row: str) -> list[Outcome]:
        """One of each run, or the one of trivial features; none where a run was not measured so."""
        if isinstance(rival, str):
            own = self.measured[self.last][0].get(row)
            found = own.baselines.get(rival) if own else None
            return [found] if found else []
        runs = [run.get(row) for run in self.measured[rival]]
        return [one for one in runs if one] if all(runs) else []

    def values(self, rival: int | str, column: Column) -> np.ndarray:
        """(runs,) figures; (0,) where a run was not measured so."""
        return np.array([x.metrics[column.metric] for x in self.outcomes(rival, column.row)])

    def chance(self, column: Column) -> float | None:
        """What guessing gives."""
        own = self.measured[self.last][0].get(column.row)
        return own.chance.get(column.metric) if own else None

    def steps(self, column: Column) -> list[int]:
        """Those at which all runs were measured so."""
        return [step for step in self.measured if len(self.values(step, column))]

    def above(self, column: Column, rival: int | str) -> Difference:
        """The mean figure of the last step minus that of ``rival``, paired item by item.

        Of each item the values are averaged over the runs first; ``se`` is the standard deviation
        of what is left, over the square root of the number of items.
        """
        own, theirs = (
            np.mean([x.items[column.metric] for x in self.outcomes(who, column.row)], axis=0)
            for who in (self.last, rival)
        )
        return outcome.paired_difference(own, theirs)


def but_for_the_seed(config: ConfigDict) -> dict[str, Any]:
    """What of a resolved config two seeds of one experiment have in common."""
    values = config.to_dict()
    for key in ("seed", *_WITHOUT_EFFECT):
        values.pop(key, None)
    drop_costs(values)
    return values


def read_seeds(name: str, workdirs: Sequence[str]) -> Seeds:
    """Reads the evaluations that runs left in their folders.

    Raises:
      UserError: if a folder is no run, has no evaluation, or differs from the first in more than
        its seed, or if they were not measured on the same items.
    """
    runs: list[dict[int, dict[str, Outcome]]] = []
    first: dict[str, Any] = {}
    for workdir in workdirs:
        config = but_for_the_seed(read_config(workdir))
        for row in config["evals"].values():
            row.pop("every_steps", None)
        first = first or config
        if differs := differences(first, config):
            words = ", ".join(f"config.{key}: {one} -> {other}" for key, one, other in differs[:8])
            raise UserError(f"{workdir}: is not {workdirs[0]} with another seed: {words}")
        folder = pathlib.Path(workdir) / "eval"
        steps = outcome.row_steps(folder)
        if not steps:
            raise UserError(
                f"{workdir}: has no evaluation; run python -m webssl_jax.evaluate on it"
            )
        runs.append({step: outcome.read_rows(folder, step) for step in steps})
    common = sorted(set.intersection(*map(set, runs)))
    if not common:
        raise UserError(f"{name}: no step was evaluated in all of {', '.join(workdirs)}")
    measured = {step: [run[step] for run in runs] for step in common}
    known = {
        (row, one.data) for out in measured.values() for run in out for row, one in run.items()
    }
    if len(known) > len({row for row, _ in known}):
        raise UserError(f"{name}: the runs were evaluated on different items, or by older rules")
    return Seeds(name, first["global_batch"], measured)


def table(group: Seeds) -> str:
    """Aligned rows: trivial features, chance, the first step, the first checkpoint and the last;
    mean over the runs, and behind it the spread over seeds. Then by how much the last is above
    each."""
    heads = group.columns
    steps = list(group.measured)
    shown = sorted({steps[0], steps[min(1, len(steps) - 1)], steps[-1]})
    cells = [(group.name, *(head.title for head in heads))]
    chances = [group.chance(head) for head in heads]
    if any(x is not None for x in chances):
        cells.append(("chance", *("-" if x is None else f"{x:.3f}" for x in chances)))
    levels: list[int | str] = [*group.baselines, *shown]
    for rival in levels:
        what = f"step {rival:,}" if isinstance(rival, int) else rival
        cells.append((what, *(_mean(group.values(rival, head)) for head in heads)))
    rivals: list[int | str] = [name for name in group.baselines if name != MAJORITY]
    rivals += shown[:-1]
    for rival in rivals:
        what = f"step {rival:,}" if isinstance(rival, int) else rival
        cells.append((f"above {what}", *(_above(group, head, rival) for head in heads)))
    runs = len(group.measured[group.last])
    note = (
        f"mean of {runs} seed{'s' * (runs > 1)} ± standard deviation between them; in brackets the "
        "standard error of a difference, paired item by item"
    )
    return "\n".join([*tables.aligned(cells), note])


def summary(groups: Sequence[Seeds]) -> str:
    """All groups in one table: of each its step 0, untrained, and its last."""
    heads = list(dict.fromkeys(head for group in groups for head in group.columns))
    cells = [("", "images seen", *(head.title for head in heads))]
    for group in groups:
        for step in sorted({0, group.last} & group.measured.keys()):
            name = group.name if step else f"{group.name}, untrained"
            figures = [_mean(group.values(step, head)) for head in heads]
            cells.append((name, f"{step * group.batch:,}", *figures))
    notes = []
    for row in dict.fromkeys(head.row for head in heads):
        data = {x.data for group in groups for x in group.outcomes(group.last, row)}
        if len(data) > 1:
            notes.append(f"NOT COMPARABLE: {row} of the groups is of different items")
    return "\n".join([*tables.aligned(cells), *notes])


def _above(group: Seeds, column: Column, rival: int | str) -> str:
    if not group.outcomes(rival, column.row):
        return "-"
    gap = group.above(column, rival)
    return f"{gap.value:+.3f} ({gap.se:.3f})"


def _mean(values: np.ndarray) -> str:
    if not len(values):
        return "-"
    spread = f" ± {values.std(ddof=1):.3f}" if len(values) > 1 else ""
    return f"{values.mean():.3f}{spread}"
