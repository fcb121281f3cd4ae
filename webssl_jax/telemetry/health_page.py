"""The health page of a run: its vital signs over the part of the run that is done, with the alarms
that were raised. Behind each curve lies that of a reference run.

    reference/METHOD.json    the committed run of a method's tiny config. Its curves are shares of
                             the possible range, so that they fit every size and batch
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from webssl_jax.config import UserError
from webssl_jax.files import write_text
from webssl_jax.methods.vitals import Vitals
from webssl_jax.telemetry.alarms import AlarmMonitor, Episode
from webssl_jax.visuals import curves
from webssl_jax.visuals.health import Line, Panel, health_figure

_POINTS = 50  # of a reference's curve
_SMOOTHED = 40  # a running median over 1/40 of a curve
_SHOWN = 3  # alarms whose messages are shown
_NORMS = ("grad_norm", "update_norm")
Series = dict[str, tuple[np.ndarray, np.ndarray]]


class Reference(NamedTuple):
    """A run to compare with. name: of the run. curves: {metric: (percent of the run, share)}."""

    name: str
    curves: Series


def stored_reference(method_name: str) -> Reference | None:
    """The committed reference of a method, by its name in the config; None when there is none."""
    path = pathlib.Path(__file__).parent / "reference" / f"{method_name}.json"
    return read_reference(path) if path.exists() else None


def read_reference(path: pathlib.Path) -> Reference:
    """What :func:`write_reference` wrote.

    Raises:
      UserError: if the file is missing or is no reference.
    """
    try:
        stored = json.loads(path.read_text())
        percent = np.array(stored["percent"], float)
        table = {
            metric: (percent, np.array(values, float))
            for metric, values in stored["curves"].items()
        }
        if any(values.shape != percent.shape for _, values in table.values()):
            raise ValueError("curves of another length than percent")
        return Reference(str(stored["name"]), table)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{path}: is not a reference that tools/health.py --save-reference wrote ({reason})"
        ) from error


def write_reference(
    path: pathlib.Path,
    name: str,
    rows: Iterable[Mapping[str, float]],
    vitals: Vitals,
    total_steps: int,
    made_by: Mapping[str, str],
) -> None:
    """Stores a run's vital signs, smoothed, at 50 points.

    Args:
      made_by: what a reader should know of the run.

    Raises:
      UserError: if the run has not logged its last step.
    """
    series = curves.collect(rows)
    logged = [sign for sign in vitals.signs if sign.metric in series]
    last = max((series[sign.metric][0][-1] for sign in logged), default=0)
    if last < total_steps:
        raise UserError(
            f"--save-reference {path}: the run is at step {last} of {total_steps}; let it finish"
        )
    first = max(series[sign.metric][0][0] for sign in logged)
    percent = np.linspace(100 * first / total_steps, 100, _POINTS)
    table = {}
    for sign in logged:
        steps, values = _smooth(series[sign.metric])
        shares = np.interp(percent, 100 * steps / total_steps, sign.share(values))
        table[sign.metric] = [float(f"{share:.4g}") for share in shares]
    stored = {
        "name": name,
        "made_by": dict(made_by),
        "percent": np.round(percent, 2).tolist(),
        "curves": table,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(stored) + "\n")


def page(
    rows: Iterable[Mapping[str, float]],
    alarms: AlarmMonitor,
    total_steps: int,
    name: str,
    reference: Reference | None = None,
) -> np.ndarray:
    """The picture, (H, W, 3) uint8.

    Args:
      rows: of metrics.jsonl; may be empty.
      alarms: has been given the same rows.
      name: of the run. reference: drawn behind the signs.
    """
    series, vitals, episodes = curves.collect(rows), alarms.vitals, alarms.episodes

    def percent(line: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        return 100 * line[0] / total_steps, line[1]

    panels = []
    for sign in vitals.signs:
        lines = []
        if sign.metric in series:
            steps, values = series[sign.metric]
            line = steps, sign.share(values)
            lines = [Line("", *percent(_smooth(line)), raw=percent(line))]
        limits = [
            limit
            for alarm in vitals.alarms
            for limit in alarm.limits
            if limit.metric == sign.metric
        ]
        panels.append(
            Panel(
                sign.title,
                lines,
                reference=reference.curves.get(sign.metric) if reference else None,
                below=max((limit.below for limit in limits), default=-np.inf),
                above=min((limit.above for limit in limits), default=np.inf),
                unit="" if sign.most is None else f"1 = {sign.most:.4g}",
            )
        )
    for norm, title in zip(_NORMS, ("gradient norm before clipping", "update norm")):
        found = [metric for metric in sorted(series) if metric.startswith(f"optim/{norm}_")]
        lines = [
            Line(metric.removeprefix(f"optim/{norm}_"), *percent(_smooth(series[metric])))
            for metric in found
        ]
        panels.append(Panel(title, lines, log=True))
    scheduled = [
        metric
        for metric in sorted(series)
        if metric.startswith("optim/") and not metric.startswith("optim/param_norm")
        if not any(metric.startswith(f"optim/{norm}") for norm in _NORMS)
    ]
    lines = []
    for metric in scheduled:
        steps, values = series[metric]
        most = float(np.max(np.abs(values)))
        label = f"{metric.removeprefix('optim/')} (1 = {most:.3g})"
        lines.append(Line(label, *percent((steps, values / (most or 1.0)))))
    panels.append(Panel("in force", lines))

    last = max((steps[-1] for steps, _ in series.values()), default=0)
    spans = [
        (100 * e.start / total_steps, 100 * (last if e.end is None else e.end) / total_steps)
        for e in episodes
    ]
    words = [in_words(episode) for episode in episodes[-_SHOWN:]]
    if len(episodes) > _SHOWN:
        words.insert(0, f"{len(episodes)} alarms; the last {_SHOWN}:")
    behind = f"grey: {reference.name}" if reference else "no reference"
    title = f"{name}, step {last:,} of {total_steps:,} ({behind})"
    return health_figure(panels, spans, words, title)


def in_words(episode: Episode) -> str:
    """The message of an alarm, and whether it is over."""
    over = "It lasts." if episode.end is None else f"It was over at step {episode.end:,}."
    return f"{episode.message}. {over}"


def _smooth(line: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Running medians of a (steps, values) line."""
    steps, values = line
    at, smoothed = curves.smooth(values, max(len(values) // _SMOOTHED, 1))
    return steps[at], smoothed
