"""The page of a study: what was asked, what is known, and every figure behind it. One HTML file
that needs nothing else, and beside it the same as PNG, CSV and JSON."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from webssl_jax.evaluators.outcome import Outcome
from webssl_jax.files import write_text
from webssl_jax.study import findings, references, results
from webssl_jax.study.cells import Study
from webssl_jax.study.findings import Finding
from webssl_jax.study.results import Group
from webssl_jax.telemetry.progress import format_seconds
from webssl_jax.visuals import axes, comparison, intervals, pages, save_png, scaling

References = Mapping[str, Mapping[str, Outcome]]


def write(study: Study, folder: Path) -> list[Finding]:
    """Writes ``index.html``, ``figures.png``, ``differences.png``, ``runs.csv``, ``runs.json`` and
    ``findings.json`` of the runs that are done. Returns the findings.

    Raises:
      UserError: for an outcome that cannot be read.
    """
    groups, known = results.read(study, folder), references.read(study, folder)
    stated = findings.state(study, groups)
    table = results.rows(groups)
    write_text(folder / "runs.csv", results.as_csv(table) if table else "")
    write_text(folder / "runs.json", results.as_json(table))
    told = [vars(one) for one in stated]
    write_text(folder / "findings.json", json.dumps(told, indent=1) + "\n")
    drawn = {}
    if panels := _panels(study, groups, known):
        drawn["figures"] = scaling.draw(panels)
    if differences := _differences(study, stated):
        drawn["differences"] = intervals.draw(differences)
    figures = {name: axes.svg(figure) for name, figure in drawn.items()}
    for name, figure in drawn.items():
        save_png(folder / f"{name}.png", axes.png(figure))
    write_text(folder / "index.html", _html(study, folder, groups, known, stated, figures))
    return stated


def _differences(
    study: Study, stated: Sequence[Finding]
) -> dict[str, dict[str, intervals.Interval]]:
    """{metric: {finding: its interval}} of what is above or below something."""
    panels: dict[str, dict[str, intervals.Interval]] = {}
    for one in stated:
        if one.kind in ("difference", "above") and one.verdict != findings.MISSING:
            metric = study.findings[one.name]["metric"].rpartition("/")[2]
            own = panels.setdefault(f"difference in {metric}", {})
            own[one.name] = (one.value, one.low, one.high)
    return panels


def _panels(study: Study, groups: Sequence[Group], known: References) -> list[scaling.Panel]:
    """One for each pair of a metric and an x that a finding asks for."""
    asked: dict[tuple[str, str], list[Group]] = {}
    lines = set()
    for row in study.findings.values():
        if "x" not in row:
            continue
        names = {cell.name for cell in findings.chosen(study.cells, row["cells"])}
        panel = asked.setdefault((row["metric"], row["x"]), [])
        panel += [g for g in groups if g.cell.name in names and g not in panel]
        if row["kind"] == "slope":
            lines.add((row["metric"], row["x"]))
    panels = []
    for (metric, x), members in asked.items():
        by_label: dict[str, list[Group]] = {}
        for group in members:
            if len(group.figures(metric)):
                by_label.setdefault(_label(group), []).append(group)
        points = {}
        for label, own in by_label.items():
            places = np.array([findings.x_of(group.cell, x) for group in own], float)
            figures = [group.figures(metric) for group in own]
            line = None
            if (metric, x) in lines and len(set(places.tolist())) > 1:
                means = {str(i): float(y.mean()) for i, y in enumerate(figures)}
                tilt = float(findings.slope(places, means))
                middle = float(np.mean(list(means.values())))
                line = (middle - tilt * float(np.log10(places).mean()), tilt)
            points[label] = scaling.Points(places, figures, line)
        if points:
            levels = [*results.baselines(members, metric).items(), *_figures(known, metric)]
            what = "parameters of the encoder" if x == "parameters" else "images seen"
            panels.append(scaling.Panel(metric, what, points, levels))
    return panels


def _figures(known: References, metric: str) -> list[tuple[str, float]]:
    """(name, figure) of the references."""
    row, _, name = metric.partition("/")
    return [
        (key, rows[row].metrics[name])
        for key, rows in known.items()
        if row in rows and name in rows[row].metrics
    ]


def _curves(groups: Sequence[Group]) -> str:
    """The training loss over images, a panel a method, as the losses of two are not comparable."""
    panels: dict[str, dict[str, comparison.Curves]] = {}
    for group in groups:
        found = [run.losses for run in group.runs if len(run.losses[0])]
        if not found:
            continue
        shared = min(len(steps) for steps, _ in found)
        values = np.stack([losses[:shared] for _, losses in found])
        images = found[0][0][:shared] * group.cell.config.global_batch
        panels.setdefault(f"{_label(group)}: loss", {})[group.cell.name] = (images, values)
    return axes.svg(comparison.draw(panels, {}, marker="")) if panels else ""


def _pictures(groups: Sequence[Group]) -> str:
    """What the largest cell of each label sees, where its runs have drawn it."""
    largest: dict[str, Group] = {}
    for group in sorted(groups, key=lambda g: (g.cell.parameters, g.cell.images)):
        largest[_label(group)] = group
    out = []
    for group in largest.values():
        for kind, what in (("pca", "patch features, by their principal components"),):
            found = sorted((group.runs[0].run.workdir / "pictures").glob(f"{kind}_[0-9]*.png"))
            if found:
                data = base64.b64encode(found[-1].read_bytes()).decode()
                address = f"data:image/png;base64,{data}"
                out.append(pages.picture(address, f"{group.cell.name}: {what}"))
    return "".join(out)


def _label(group: Group) -> str:
    labels = group.cell.labels
    return ", ".join(labels[key] for key in ("method", "data") if key in labels) or "all cells"


def _html(
    study: Study,
    folder: Path,
    groups: Sequence[Group],
    known: References,
    stated: Sequence[Finding],
    drawn: Mapping[str, str],
) -> str:
    done, runs = sum(len(group.runs) for group in groups), len(study.runs(folder))
    seconds = sum(run.seconds for group in groups for run in group.runs)
    items = "".join(
        f"<li><b>{html.escape(one.name)}</b>: {html.escape(one.text)}</li>" for one in stated
    )
    body = f"""<p class="soft">{done} of {runs} runs of {len(study.cells)} cells are done; they took
{format_seconds(seconds)} of wall time, evaluations included. Every sentence below is made by a rule
from the figures (webssl_jax/study/findings.py).</p>
<h2>What it shows</h2><ul>{items or "<li>No finding is asked.</li>"}</ul>
{"" if drawn else "<p>Nothing is measured yet.</p>"}
{_section("Figures", drawn.get("figures", ""), _FIGURES)}
{_section("Differences", drawn.get("differences", ""), _DIFFERENCES)}
<h2>Cells</h2><div class="scroll">{_table(groups, known)}</div>
<p class="soft">Mean over seeds ± standard deviation between them. runs.csv and runs.json hold every
run with every metric, findings.json the intervals. Time is wall time of this machine; energy is not
measured.</p>
{_section("How they learned", _curves(groups))}{_section("What they see", _pictures(groups))}"""
    return pages.document(study.title, body)


_FIGURES = """Small dots are runs, large ones means over seeds; a line is the least-squares fit over
the logarithm; broken lines are features that need no training, and models that were not trained
here."""
_DIFFERENCES = "Bars are 95 % intervals, grey where zero lies in them."


def _section(title: str, content: str, words: str = "") -> str:
    if not content:
        return ""
    below = f'\n<p class="soft">{words}</p>' if words else ""
    return f'<h2>{title}</h2><div class="scroll">{content}</div>{below}'


def _table(groups: Sequence[Group], known: References) -> str:
    metrics = results.headlines(groups)
    heads = ["cell", "parameters", "images seen", "seeds", *metrics, "time a run"]
    lines = []
    for name, levels in _levels(groups, known, metrics).items():
        cells = [name, "", "", "", *(levels.get(m, "") for m in metrics), ""]
        lines.append(cells)
    for group in groups:
        cell = group.cell
        cells = [cell.name, f"{cell.parameters:,}", f"{cell.images:,}", str(len(group.runs))]
        cells += [_mean(group.figures(metric)) for metric in metrics]
        seconds = float(np.mean([run.seconds for run in group.runs]))
        lines.append([*cells, format_seconds(seconds)])
        untrained = [_mean(group.figures(metric, untrained=True)) for metric in metrics]
        if any(untrained):
            lines.append([f"{cell.name}, untrained", "", "0", "", *untrained, ""])
    return pages.table(heads, lines)


def _mean(figures: np.ndarray) -> str:
    spread = f" ± {figures.std(ddof=1):.3f}" if len(figures) > 1 else ""
    return f"{figures.mean():.3f}{spread}" if len(figures) else ""


def _levels(
    groups: Sequence[Group], known: References, metrics: Sequence[str]
) -> dict[str, dict[str, str]]:
    out: dict[str, dict[str, str]] = {}
    for metric in metrics:
        for name, value in [*results.baselines(groups, metric).items(), *_figures(known, metric)]:
            out.setdefault(name, {})[metric] = f"{value:.3f}"
    return out
