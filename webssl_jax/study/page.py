"""The page of a study: what was asked, what is known, and every figure behind it. One HTML file
that needs nothing else, and beside it the same as PNG, CSV and JSON."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from webssl_jax.files import make_folder, write_text
from webssl_jax.study import archive, findings, references, results, tables
from webssl_jax.study.cells import Study, chosen
from webssl_jax.study.findings import Finding
from webssl_jax.study.results import Group
from webssl_jax.study.tables import References
from webssl_jax.visuals import axes, comparison, intervals, pages, save_png, scaling

_MOST_SENTENCES = 12  # that stand open on the page


def write(
    study: Study, folder: Path, stored: Path | None = None
) -> tuple[list[Finding], dict[str, str]]:
    """Writes ``index.html``, ``figures.png``, ``differences.png``, ``runs.csv``, ``runs.json``,
    ``findings.json`` and ``outcomes.zip`` (archive.py) of the runs that are done, or, without
    pictures of what they see, of those whose outcomes another study stored. Returns the findings,
    and {run: why} of those that are left out (results.read).

    Raises:
      UserError: for ``stored``, or an outcome of a reference, that cannot be read.
    """
    left_out: dict[str, str] = {}
    if stored is None:
        (groups, left_out), known = results.read(study, folder), references.read(study, folder)
    else:
        groups, known = archive.read(study, stored)
        make_folder(folder, "--workdir")
    archive.write(folder / "outcomes.zip", groups, known)
    stated = findings.state(study, groups)
    table = results.rows(groups)
    write_text(folder / "runs.csv", results.as_csv(table) if table else "")
    write_text(folder / "runs.json", results.as_json(table))
    told = [
        {key: None if x != x else x for key, x in vars(one).items()}  # JSON has no NaN
        for one in stated
    ]
    write_text(folder / "findings.json", json.dumps(told, indent=1) + "\n")
    drawn = {}
    if panels := _panels(study, groups, known):
        drawn["figures"] = scaling.draw(panels)
    if differences := _differences(study, stated):
        drawn["differences"] = intervals.draw(differences)
    figures = {name: axes.svg(figure) for name, figure in drawn.items()}
    for name, figure in drawn.items():
        save_png(folder / f"{name}.png", axes.png(figure))
    done, runs = sum(len(group.runs) for group in groups), len(study.runs(folder))
    how_far = f"{done} of {runs} runs of {len(study.cells)} cells are done."
    if left_out:
        how_far += f" {len(left_out)} are left out: of other settings, or damaged."
    write_text(folder / "index.html", _html(study, folder, how_far, groups, known, stated, figures))
    return stated, left_out


def _differences(
    study: Study, stated: Sequence[Finding]
) -> dict[str, dict[str, intervals.Interval]]:
    """{metric: {finding: its interval}} of what is above or below something."""
    panels: dict[str, dict[str, intervals.Interval]] = {}
    for one in stated:
        if one.kind in ("difference", "above") and one.verdict != findings.MISSING:
            metric = study.findings[one.name]["metric"]
            own = panels.setdefault(f"difference in {metric}", {})
            own[tables.question(one.name, metric)] = (one.value, one.low, one.high)
    return panels


def _panels(study: Study, groups: Sequence[Group], known: References) -> list[scaling.Panel]:
    """One for each pair of a metric and an x that a finding asks for."""
    asked: dict[tuple[str, str], list[Group]] = {}
    lines = set()
    for row in study.findings.values():
        if "x" not in row:
            continue
        names = {cell.name for cell in chosen(study.cells, row["cells"])}
        panel = asked.setdefault((row["metric"], row["x"]), [])
        panel += [g for g in groups if g.cell.name in names and g not in panel]
        if row["kind"] == "slope":
            lines.add((row["metric"], row["x"]))
    panels = []
    for (metric, x), members in asked.items():
        by_label: dict[str, list[Group]] = {}
        for group in members:
            if len(group.figures(metric)):
                by_label.setdefault(tables.label(group), []).append(group)
        points = {}
        for label, own in by_label.items():
            places = np.array([findings.x_of(group.cell, x) for group in own], float)
            figures = [group.figures(metric) for group in own]
            line = None
            if (metric, x) in lines and len(set(places.tolist())) > 1:
                means = [float(y.mean()) for y in figures]
                tilt = float(findings.slope(places, means))
                middle = float(np.mean(means))
                line = (middle - tilt * float(np.log10(places).mean()), tilt)
            points[label] = scaling.Points(places, figures, line)
        if points:
            levels = tables.levels_of(members, known, metric)
            what = "parameters of the encoder" if x == "parameters" else "images seen"
            panels.append(scaling.Panel(metric, what, points, levels))
    return panels


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
        panels.setdefault(f"{tables.label(group)}: loss", {})[group.cell.name] = (images, values)
    return axes.svg(comparison.draw(panels, {}, marker="", columns=2)) if panels else ""


def _pictures(groups: Sequence[Group]) -> tuple[str, str]:
    """What the largest cell of each label sees, and what its evaluations drew (maps of layers that
    agree, masks), where its runs have drawn it."""
    largest: dict[str, Group] = {}
    for group in sorted(groups, key=lambda g: (g.cell.parameters, g.cell.images)):
        largest[tables.label(group)] = group
    seen, judged = [], []
    for group in largest.values():
        cell, folder = group.cell, group.runs[0].run.workdir
        if found := sorted((folder / "pictures").glob("pca_[0-9]*.png")):
            words = f"{cell.name}: patch features, by their principal components"
            seen.append(_picture(found[-1], words))
        for path in sorted((folder / "eval").glob(f"*/{cell.steps:08d}.*.png")):
            judged.append(_picture(path, f"{cell.name}: {path.parent.name}"))
    return "".join(seen), "".join(judged)


def _of_references(study: Study, folder: Path) -> str:
    found = [
        (one.name, path)
        for one in study.references
        for path in sorted(references.eval_folder(one, folder).glob("*/00000000.*.png"))
    ]
    return "".join(_picture(path, f"{name}: {path.parent.name}") for name, path in found)


def _picture(path: Path, words: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return pages.picture(f"data:image/png;base64,{data}", words)


def _html(
    study: Study,
    folder: Path,
    how_far: str,
    groups: Sequence[Group],
    known: References,
    stated: Sequence[Finding],
    drawn: Mapping[str, str],
) -> str:
    seen, judged = _pictures(groups)
    judged += _of_references(study, folder)
    body = f"""<p class="soft">{how_far} Every verdict and sentence below is made by a
rule from the figures (webssl_jax/study/findings.py).</p>
<h2>What it shows</h2>{_answers(study, stated)}
{"" if drawn else "<p>Nothing is measured yet.</p>"}
{_section("Figures", drawn.get("figures", ""), _FIGURES)}
{_section("Differences", drawn.get("differences", ""), _DIFFERENCES)}
{_section("Methods and categories", _table(tables.categories(study, groups, known)), _CATEGORIES)}
{_section("Cells", _table(tables.cells(groups, known)), _CELLS)}
{_section("What it cost", _table(tables.cost(groups)), _machines(groups))}
{_section("How they learned", _curves(groups))}{_section("What they see", seen)}
{_section("What the evaluations drew", judged)}"""
    return pages.document(study.title, body)


def _answers(study: Study, stated: Sequence[Finding]) -> str:
    if not stated:
        return "<p>No finding is asked.</p>"
    table = pages.wide_table(*tables.answers(study, stated))
    sentences = "".join(
        f"<li><b>{html.escape(one.name)}</b>: {html.escape(one.text)}</li>" for one in stated
    )
    state = " open" if len(stated) <= _MOST_SENTENCES else ""
    return f"""{table}<p class="soft">{_ANSWERS}</p>
<details{state}><summary>In sentences</summary><ul>{sentences}</ul></details>"""


def _table(table: tables.Table) -> str:
    heads, lines = table
    return pages.table(heads, lines) if lines else ""


def _machines(groups: Sequence[Group]) -> str:
    """What the runs say of where they ran."""
    names: dict[str, int] = {}
    for group in groups:
        for run in group.runs:
            devices, cpu = run.environment.get("devices", {}), run.environment.get("cpu", "")
            kind = f"{devices.get('count', 1)} x {devices.get('kind', 'device not recorded')}"
            name = f"{kind}, {cpu}" if cpu else kind
            names[name] = names.get(name, 0) + 1
    told = "; ".join(f"{html.escape(name)} ({count} runs)" for name, count in names.items())
    return f"{_COST} Devices a run: {told}." if told else _COST


_ANSWERS = """▲ above zero, ▼ below zero, ? cannot tell: by the 95 % interval below each figure, of
seeds and test items; where cells have one seed, of items alone. One in twenty intervals misses:
of many, some verdicts are chance."""
_FIGURES = """Small dots are runs, large ones means over seeds; a line is the least-squares fit over
the logarithm; broken lines are features that need no training, and models that were not trained
here."""
_DIFFERENCES = "Bars are 95 % intervals, grey where zero lies in them."
_CATEGORIES = """Mean of the figures of a category; ± is the standard deviation between seeds."""
_CELLS = """Mean over seeds ± standard deviation between them. runs.csv and runs.json hold every run
with every metric, findings.json the intervals."""
_COST = """Sums over all runs and all their starts. Device seconds are wall time of training steps
times devices, on a machine that may have had other work. Energy was not measured: joules are
unknown."""


def _section(title: str, content: str, words: str = "") -> str:
    if not content:
        return ""
    below = f'\n<p class="soft">{words}</p>' if words else ""
    return f'<h2>{title}</h2><div class="scroll">{content}</div>{below}'
