"""Outcomes as plain text: what stands beside what, what is clearly above what, and what the figures
mean. Nothing here knows an evaluation by name."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from webssl_jax.evaluators.outcome import Difference, Outcome, difference
from webssl_jax.evaluators.probes.labelled import MAJORITY
from webssl_jax.visuals.bars import Bar, Panel

WIDTH = 100
Outcomes = Mapping[str, Outcome]  # row: outcome


class Column(NamedTuple):
    """A headline metric of a row."""

    row: str
    metric: str

    @property
    def title(self) -> str:
        return f"{self.row} {self.metric.replace('_', ' ')}"


def columns(models: Mapping[str, Outcomes]) -> list[Column]:
    """Those that any of the models has, in the order of the rows."""
    found: dict[Column, None] = {}
    for outcomes in models.values():
        for row, one in outcomes.items():
            found |= {Column(row, metric): None for metric in one.headline}
    return list(found)


def report(
    models: Mapping[str, Outcomes], failed: Mapping[str, Mapping[str, str]] | None = None
) -> str:
    """A table of chance, trivial features and models, differences item by item, and what the
    figures mean.

    Args:
      models: {name: its outcomes by row}, the one that matters most last: each is compared with
        those before it.
      failed: {name: {row: why it has no outcome}}.
    """
    heads, failed = columns(models), failed or {}
    lines = beside(models, heads)
    lines |= {name: _cells(one, heads, failed.get(name, {})) for name, one in models.items()}
    table = [("", *(head.title for head in heads))]
    table += [(name, *cells) for name, cells in lines.items()]
    notes = ["± is one standard error over the items."]
    notes += dict.fromkeys(one.meaning for out in models.values() for one in out.values())
    notes += _choices(models)
    notes += [
        f"FAILED: {n}, {row}: {why}" for n, rows in failed.items() for row, why in rows.items()
    ]
    wrapped = [textwrap.fill(note, WIDTH, subsequent_indent="  ") for note in notes if note]
    verdicts = _verdicts(models, heads)
    return "\n".join([*aligned(table), "", *wrapped, *([""] if verdicts else []), *verdicts])


def panels(models: Mapping[str, Outcomes]) -> list[Panel]:
    """The figures of :func:`report` for ``visuals.bars``: trivial features, then the models."""
    found = []
    for head in columns(models):
        there = {name: one[head.row] for name, one in models.items() if head.row in one}
        first = next(iter(there.values()))
        bars = [
            Bar(name, one.metrics[head.metric], one.se(head.metric), name in first.baselines)
            for name, one in {**first.baselines, **there}.items()
            if head.metric in one.metrics
        ]
        found.append(Panel(head.title, bars, first.chance.get(head.metric)))
    return found


def beside(models: Mapping[str, Outcomes], heads: Sequence[Column]) -> dict[str, list[str]]:
    """{chance and trivial features: a cell a column}, of the first model that was measured so."""
    out: dict[str, list[str]] = {}
    first = {
        head: next(one[head.row] for one in models.values() if head.row in one) for head in heads
    }
    chance = [first[head].chance.get(head.metric) for head in heads]
    if any(value is not None for value in chance):
        out["chance"] = ["-" if value is None else f"{value:.3f}" for value in chance]
    names = dict.fromkeys(name for head in heads for name in first[head].baselines)
    for name in names:
        out[name] = [cell(first[head].baselines.get(name), head.metric) for head in heads]
    return out


def line(outcomes: Outcomes) -> str:
    """The headline figures for the log."""
    return ", ".join(
        f"{head.title} {cell(outcomes[head.row], head.metric)}" for head in columns({"": outcomes})
    )


def cell(one: Outcome | None, metric: str) -> str:
    """``0.412 ± 0.014``, or ``-``."""
    if one is None or metric not in one.metrics:
        return "-"
    se = one.se(metric)
    return f"{one.metrics[metric]:.3f}" + ("" if se is None else f" ± {se:.3f}")


def aligned(cells: Sequence[Sequence[str]]) -> list[str]:
    """Rows of as many cells each as lines; the first is the head, with a rule below it."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in cells]
    return [lines[0], "-" * (sum(widths) + 2 * (len(widths) - 1)), *lines[1:]]


def _cells(outcomes: Outcomes, heads: Sequence[Column], failed: Mapping[str, str]) -> list[str]:
    return [
        "failed" if head.row in failed else cell(outcomes.get(head.row), head.metric)
        for head in heads
    ]


def _choices(models: Mapping[str, Outcomes]) -> list[str]:
    """What was chosen on training items, of each model."""
    notes = []
    for name, outcomes in models.items():
        chosen = [
            f"{row} {metric}: {words}"
            for row, one in outcomes.items()
            for metric, words in one.chosen.items()
        ]
        if chosen:
            notes.append(f"Chosen for {name}: {'; '.join(chosen)}.")
    return notes


def _verdicts(models: Mapping[str, Outcomes], heads: Sequence[Column]) -> list[str]:
    """Each model beside trivial features and beside the models before it, column by column."""
    lines: list[str] = []
    before: list[str] = []
    for name, outcomes in models.items():
        for head in heads:
            own = outcomes.get(head.row)
            if own is None:
                continue
            rivals = {rival: one for rival, one in own.baselines.items() if rival != MAJORITY}
            earlier = {other: models[other].get(head.row) for other in before}
            rivals |= {other: one for other, one in earlier.items() if one is not None}
            for rival, one in rivals.items():
                gap = difference(own, one, head.metric)
                if gap is not None:
                    lines.append(f"  {head.title}: {name} {_words(gap)} {rival}: {_shown(gap)}")
        before.append(name)
    if not lines:
        return []
    note = "clearly = by more than two standard errors of the difference, paired item by item:"
    return [note, *lines]


def _words(gap: Difference) -> str:
    if gap.clear:
        return "clearly above"
    if Difference(-gap.value, gap.se).clear:
        return "clearly below"
    return "not clearly different from"


def _shown(gap: Difference) -> str:
    other = "" if gap.paired else " (of other items: not paired)"
    return f"{gap.value:+.3f} ± {gap.se:.3f}{other}"
