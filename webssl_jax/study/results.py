"""What the runs of a study left in their workdirs, as rows of one table."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from webssl_jax.config import UserError
from webssl_jax.evaluators import outcome
from webssl_jax.evaluators.outcome import Outcome
from webssl_jax.study.cells import Cell, Run, Study
from webssl_jax.study.runner import is_done
from webssl_jax.telemetry.goodput import seconds_of
from webssl_jax.telemetry.writer import read_rows
from webssl_jax.visuals.curves import collect


@dataclasses.dataclass(frozen=True)
class Measured:
    """A run that is done: its outcomes by row after the last step, those before the first, the
    seconds of each kind (goodput.py) over all starts, (steps, losses) of training, and what it says
    of its machine (environment.json)."""

    run: Run
    outcomes: dict[str, Outcome]
    untrained: dict[str, Outcome]
    seconds: dict[str, float]
    losses: tuple[np.ndarray, np.ndarray]
    environment: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def device_seconds(self) -> float:
        """Of the steps that trained it, on all devices together."""
        return self.seconds["step"] * self.environment.get("devices", {}).get("count", 1)


@dataclasses.dataclass(frozen=True)
class Group:
    """A cell with its runs that are done."""

    cell: Cell
    runs: tuple[Measured, ...]

    def figures(self, metric: str, untrained: bool = False) -> np.ndarray:
        """(runs,) of ``ROW/METRIC``; (0,) where it was not measured."""
        row, _, name = metric.partition("/")
        judged = [run.untrained if untrained else run.outcomes for run in self.runs]
        found = [one[row].metrics.get(name) for one in judged if row in one]
        return np.array([value for value in found if value is not None])

    def outcomes(self, row: str) -> list[Outcome]:
        return [run.outcomes[row] for run in self.runs if row in run.outcomes]


def read(study: Study, folder: Path) -> tuple[list[Group], dict[str, str]]:
    """(the cells of which at least one run is done; {run: why} of those that are left out, as they
    have other settings than ``study`` or a file that cannot be read)."""
    found: dict[str, list[Measured]] = {cell.name: [] for cell in study.cells}
    left_out = {}
    for run in study.runs(folder):
        try:
            if is_done(run):
                found[run.cell.name].append(_measured(run))
        except UserError as error:
            left_out[run.name] = str(error)
    return grouped(study, found), left_out


def grouped(study: Study, found: Mapping[str, Sequence[Measured]]) -> list[Group]:
    """The cells that have runs in ``found``, {cell: its runs}, in the order of the study."""
    return [Group(cell, tuple(runs)) for cell in study.cells if (runs := found[cell.name])]


def _measured(run: Run) -> Measured:
    last, first = (outcome.read_rows(run.workdir / "eval", n) for n in (run.cell.steps, 0))
    curves = collect(read_rows(run.workdir / "metrics.jsonl"))
    losses = curves.get("train/loss", (np.empty(0), np.empty(0)))
    machine = _environment(run.workdir)
    return Measured(run, last, first, seconds_of(run.workdir), losses, machine)


def _environment(workdir: Path) -> dict[str, Any]:
    """Empty where it cannot be read: it is only a record."""
    try:
        return dict(json.loads((workdir / "environment.json").read_text()))
    except (OSError, ValueError):
        return {}


def headlines(groups: Sequence[Group]) -> list[str]:
    """``ROW/METRIC`` of all, in the order of the rows."""
    names: dict[str, None] = {}
    for group in groups:
        for run in group.runs:
            for row, one in run.outcomes.items():
                names |= {f"{row}/{metric}": None for metric in one.headline}
    return list(names)


def baselines(groups: Sequence[Group], metric: str) -> dict[str, float]:
    """{chance or trivial features: figure}, of the first group that has them."""
    row, _, name = metric.partition("/")
    for group in groups:
        for one in group.outcomes(row):
            found = {key: x.metrics[name] for key, x in one.baselines.items() if name in x.metrics}
            if not found and name in one.chance:
                found = {"chance": one.chance[name]}
            if found:
                return found
    return {}


def rows(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """One a run, plain values."""
    out = []
    for group in groups:
        cell = group.cell
        for one in group.runs:
            row: dict[str, Any] = {"cell": cell.name, "seed": one.run.seed, **cell.labels}
            row |= {"parameters": cell.parameters, "images": cell.images}
            row |= {"seconds": sum(one.seconds.values()), "device_seconds": one.device_seconds}
            for name, found in one.outcomes.items():
                row |= {f"{name}/{metric}": value for metric, value in found.metrics.items()}
            out.append(row)
    return out


def as_csv(table: Sequence[dict[str, Any]]) -> str:
    """With a column for every key of any row."""
    text = io.StringIO()
    heads = list(dict.fromkeys(key for row in table for key in row))
    writer = csv.DictWriter(text, heads, lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return text.getvalue()


def as_json(table: Sequence[dict[str, Any]]) -> str:
    lines = ",\n".join(json.dumps(row) for row in table)
    return f"[\n{lines}\n]\n"
