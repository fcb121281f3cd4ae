"""The tables of a study's page, as heads and lines of text: its answers, its methods by categories
of figures, its cells with every figure, and what they cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from webssl_jax.evaluators.outcome import Outcome
from webssl_jax.study import findings, results
from webssl_jax.study.cells import Study
from webssl_jax.study.findings import Finding
from webssl_jax.study.results import Group
from webssl_jax.telemetry.progress import format_seconds

Table = tuple[list[str], list[list[str]]]
References = Mapping[str, Mapping[str, Outcome]]
MARKS = {findings.RISES: "▲", findings.FALLS: "▼", findings.UNCLEAR: "?"}


def question(name: str, metric: str) -> str:
    """The name of a finding without its metric, ``, ROW`` or ``, ROW/METRIC`` at its end."""
    row = metric.partition("/")[0]
    return name.removesuffix(f", {metric}").removesuffix(f", {row}")


def answers(study: Study, stated: Sequence[Finding]) -> Table:
    """A line a question, a column a metric: the figure and its interval. Slopes come first."""
    metrics: dict[str, None] = {}
    lines: dict[str, dict[str, str]] = {}
    for one in sorted(stated, key=lambda one: findings.KINDS.index(one.kind)):
        metric = study.findings[one.name]["metric"]
        metrics[metric] = None
        text = "-"
        if one.verdict in MARKS:
            text = f"{MARKS[one.verdict]} {one.value:+.3f}\n{one.low:+.3f} to {one.high:+.3f}"
        lines.setdefault(question(one.name, metric), {})[metric] = text
    return ["", *metrics], [[name, *(x.get(m, "") for m in metrics)] for name, x in lines.items()]


def categories(study: Study, groups: Sequence[Group], known: References) -> Table:
    """A line a cell or level, a column a category: the mean of its figures, of a cell over seeds ±
    standard deviation between them. A category of which a figure is missing stays empty. No lines
    where the study has no categories."""
    if not study.categories:
        return [], []
    heads = ["", "method", "parameters", "images seen", *study.categories]
    levels: dict[str, list[str]] = {}
    for place, metrics in enumerate(study.categories.values()):
        each = [dict(levels_of(groups, known, metric)) for metric in metrics]
        for name in each[0] if each else ():
            if all(name in figures for figures in each):
                row = levels.setdefault(name, [""] * len(study.categories))
                row[place] = f"{np.mean([figures[name] for figures in each]):.3f}"
    lines = [[name, "", "", "", *row] for name, row in levels.items()]
    for group in groups:
        cell = group.cell
        row = [cell.name, label(group), f"{cell.parameters:,}", f"{cell.images:,}"]
        for metrics in study.categories.values():
            figures = [group.figures(metric) for metric in metrics]
            whole = all(len(own) == len(group.runs) for own in figures)
            row.append(_mean(np.mean(figures, axis=0)) if whole else "")
        lines.append(row)
    return heads, lines


def cells(groups: Sequence[Group], known: References) -> Table:
    """A line a level or cell, and one of a cell before its first step, a column a metric."""
    metrics = results.headlines(groups)
    heads = ["", "parameters", "images seen", "seeds", *metrics]
    levels: dict[str, dict[str, str]] = {}
    for metric in metrics:
        for name, value in levels_of(groups, known, metric):
            levels.setdefault(name, {})[metric] = f"{value:.3f}"
    lines = [[name, "", "", "", *(x.get(m, "") for m in metrics)] for name, x in levels.items()]
    for group in groups:
        cell = group.cell
        row = [cell.name, f"{cell.parameters:,}", f"{cell.images:,}", str(len(group.runs))]
        lines.append([*row, *(_mean(group.figures(metric)) for metric in metrics)])
        untrained = [_mean(group.figures(metric, untrained=True)) for metric in metrics]
        if any(untrained):
            lines.append([f"{cell.name}, untrained", "", "0", "", *untrained])
    return heads, lines


def cost(groups: Sequence[Group]) -> Table:
    """A line a cell, and the sum: images and seconds of all its runs."""
    heads = ["", "runs", "images", "device seconds of steps", "images a device second"]
    heads += ["evaluation", "all, wall time"]
    lines = [_cost(group.cell.name, [group]) for group in groups]
    return heads, [*lines, _cost("all", groups)] if lines else []


def _cost(name: str, groups: Sequence[Group]) -> list[str]:
    runs = [run for group in groups for run in group.runs]
    images = sum(group.cell.images * len(group.runs) for group in groups)
    steps = sum(run.device_seconds for run in runs)
    row = [name, str(len(runs)), f"{images:,}", f"{steps:,.0f}"]
    row.append(f"{images / steps:,.0f}" if steps else "-")
    row.append(format_seconds(sum(run.seconds.get("evaluation", 0.0) for run in runs)))
    return [*row, format_seconds(sum(sum(run.seconds.values()) for run in runs))]


def levels_of(groups: Sequence[Group], known: References, metric: str) -> list[tuple[str, float]]:
    """(name, figure) of trivial features, or chance, and of the references."""
    row, _, name = metric.partition("/")
    found = [*results.baselines(groups, metric).items()]
    for key, rows in known.items():
        if row in rows and name in rows[row].metrics:
            found.append((key, rows[row].metrics[name]))
    return found


def label(group: Group) -> str:
    """What its colour stands for in pictures."""
    labels = group.cell.labels
    return ", ".join(labels[key] for key in ("method", "data") if key in labels) or "all cells"


def _mean(figures: np.ndarray) -> str:
    spread = f" ± {figures.std(ddof=1):.3f}" if len(figures) > 1 else ""
    return f"{figures.mean():.3f}{spread}" if len(figures) else ""
