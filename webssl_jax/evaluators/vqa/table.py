"""Benchmarks and their averages of several models, one line each, with intervals over questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from webssl_jax.evaluators.tables import aligned
from webssl_jax.evaluators.vqa.averages import AVERAGE, Published, averages
from webssl_jax.evaluators.vqa.intervals import Interval, differences, intervals
from webssl_jax.evaluators.vqa.pictures import GROUPS
from webssl_jax.evaluators.vqa.task import CATEGORIES, TaskScore
from webssl_jax.evaluators.vqa.tasks import SIXTEEN

Models = Mapping[str, Mapping[str, TaskScore]]


def order() -> dict[str, str]:
    """{benchmark or average: its title}, each category's four before their mean."""
    lines: dict[str, str] = {}
    for category in CATEGORIES:
        lines |= {task.name: task.title for task in SIXTEEN if task.category == category}
        lines[category] = f"= {GROUPS[category]}"
    return lines | {AVERAGE: "= mean of 16"}


def figures(models: Models) -> dict[str, dict[str, Interval]]:
    """{model: {benchmark or average: figure with its interval}}."""
    return {name: intervals(scores) for name, scores in models.items()}


def gaps(models: Models) -> dict[str, dict[str, Interval]]:
    """{"B - A": {benchmark or average: paired difference}} of each model and the first."""
    first, *others = models
    return {
        f"{other} - {first}": differences(models[other], models[first])
        for other in others
        if models[other].keys() & models[first].keys()
    }


def table(models: Models, beside: Sequence[Published] = ()) -> str:
    """The figures of models, published rows, and paired differences from the first model."""
    columns: dict[str, dict[str, str]] = {
        name: {line: _figure(one) for line, one in found.items()}
        for name, found in figures(models).items()
    }
    notes = ["Percent; MME in points, of which averages take a twentieth. [95 % interval]"]
    for number, row in enumerate(beside, 1):
        values = row.scores | averages(row.scores)
        columns[f"paper {number}"] = {line: f"{value:.2f}" for line, value in values.items()}
        notes.append(f"paper {number}: {_named(row)}.")
    for name, found in gaps(models).items():
        columns[name] = {line: _gap(one) for line, one in found.items()}
    known = set().union(*(column.keys() for column in columns.values()))
    rows = [
        [title, *(column.get(line, "-") for column in columns.values())]
        for line, title in order().items()
        if line in known
    ]
    notes += [
        f"{name}: {', '.join(parts)} questions."
        for name, scores in models.items()
        if (parts := _parts(scores))
    ]
    if len(models) > 1:
        notes.append("Differences are paired question by question; * has zero outside.")
    return "\n".join([*aligned([["", *columns], *rows]), "", *notes])


def _parts(scores: Mapping[str, TaskScore]) -> list[str]:
    """Which benchmarks were answered in part, and how far."""
    return [
        f"{task.title} has answers to {len(scores[task.name].verdicts):,} of {task.source.count:,}"
        for task in SIXTEEN
        if task.name in scores and len(scores[task.name].verdicts) != task.source.count
    ]


def _figure(one: Interval) -> str:
    return f"{one.value:.2f} [{one.low:.2f}, {one.high:.2f}]"


def _gap(one: Interval) -> str:
    return f"{one.value:+.2f} [{one.low:+.2f}, {one.high:+.2f}]{'*' if one.clear else ''}"


def _named(row: Published) -> str:
    seen = f", {row.images / 1e9:g}B images" if row.images else ""
    tables = " and ".join(map(str, row.tables))
    return f"{row.model} on {row.data}{seen}, {row.resolution} px (Table {tables})"
