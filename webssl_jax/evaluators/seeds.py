"""Runs that differ in their seed only, as one: mean figures, how far the seeds lie apart, and
paired comparisons with their own beginnings and with trivial features.

Two errors are told apart. The spread over seeds is the standard deviation of a figure between runs.
The standard error of a difference is that of the test images: other images of the same kind would
have given another figure, however many seeds are averaged.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from webssl_jax.config import UserError, drop_costs
from webssl_jax.evaluators.base import Difference, Score
from webssl_jax.evaluators.frozen import Measurement
from webssl_jax.evaluators.report import aligned
from webssl_jax.evaluators.results import COLUMNS, RETRIEVED, RETRIEVED_WAYS, Result, read_result
from webssl_jax.runs import read_config

# Groups of the config that change no figure: where checkpoints lie, when lines are written.
_WITHOUT_EFFECT = ("checkpoint", "host", "log", "profile")


class Seeds(NamedTuple):
    """name: in tables. batch: images a step. measured: {step: a result of each run}, by step, of
    those steps that all of them have. baselines: {name: result} of trivial features.

    A row below is a step or the name of trivial features; a column is a key of COLUMNS.
    """

    name: str
    batch: int
    measured: dict[int, list[Result]]
    baselines: dict[str, Result]

    @property
    def last(self) -> int:
        return max(self.measured)

    def scores(self, row: int | str, column: str) -> list[Score]:
        """One of each run; none where a run was not measured so."""
        results = self.measured[row] if isinstance(row, int) else [self.baselines[row]]
        found = [result.scores().get(column) for result in results]
        return [] if None in found else found

    def top1(self, row: int | str, column: str) -> np.ndarray:
        """(runs,) shares of hits; (0,) where a run was not measured so."""
        return np.array([score.top1 for score in self.scores(row, column)])

    def steps(self, column: str) -> list[int]:
        """Those at which all runs were measured so."""
        return [step for step in self.measured if self.scores(step, column)]

    def above(self, column: str, rival: int | str) -> Difference:
        """Mean share of hits of the last step minus that of the row ``rival``, paired image by
        image, or text by text.

        Of each image the hits are averaged over the runs first; ``se`` is the standard deviation of
        what is left, over the square root of the number of images.
        """
        hits, theirs = (
            np.mean([score.correct for score in self.scores(row, column)], axis=0)
            for row in (self.last, rival)
        )
        gap = hits - theirs
        return Difference(float(gap.mean()), float(gap.std() / np.sqrt(len(gap))))

    def retrieved(self, step: int) -> np.ndarray:
        """(runs,) recall at RETRIEVED, the mean of both ways; (0,) where there is none."""
        return np.mean([self.top1(step, way) for way in RETRIEVED_WAYS], axis=0)


def read_seeds(name: str, workdirs: Sequence[str]) -> Seeds:
    """Reads the evaluations that runs left in their folders.

    Raises:
      UserError: if a folder is no run, has no evaluation, or differs from the first in more than
        its seed, or if they were not measured on the same images.
    """
    runs, first = [], None
    for workdir in workdirs:
        config = read_config(workdir).to_dict()
        for key in ("seed", *_WITHOUT_EFFECT):
            config.pop(key, None)
        # A key that asks for nothing is as one that an older run does not have.
        config["eval"] = {key: value for key, value in config["eval"].items() if value}
        drop_costs(config)
        first = first or config
        differs = sorted(k for k in first.keys() | config.keys() if first.get(k) != config.get(k))
        if differs:
            raise UserError(
                f"{workdir}: is not {workdirs[0]} with another seed: config.{differs[0]} differs"
            )
        folder = pathlib.Path(workdir) / "eval"
        files = sorted(folder.glob("[0-9]*.json"))
        if not files:
            raise UserError(
                f"{workdir}: has no evaluation; run python -m webssl_jax.evaluate on it"
            )
        runs.append({row.step: row for row in map(read_result, files)})
    steps = sorted(set.intersection(*map(set, runs)))
    if not steps:
        raise UserError(f"{name}: no step was evaluated in all of {', '.join(workdirs)}")
    measured = {step: [run[step] for run in runs] for step in steps}
    baselines = {}
    if any(result.frozen for results in measured.values() for result in results):
        baselines = _read_baselines(pathlib.Path(workdirs[0]) / "eval" / "baselines.json")
    results = [*baselines.values(), *(result for step in steps for result in measured[step])]
    parts = [(kind, part.data) for result in results for kind, part in result.parts.items()]
    if len(set(parts)) > len({kind for kind, _ in parts}):
        raise UserError(f"{name}: the runs were evaluated on different images, or by older rules")
    return Seeds(name, first["global_batch"], measured, baselines)


def _read_baselines(path: pathlib.Path) -> dict[str, Result]:
    try:
        stored = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}); run python -m webssl_jax.evaluate again"
        ) from error
    return {kind: Result(None, Measurement.from_json(row)) for kind, row in stored.items()}


def table(group: Seeds) -> str:
    """Aligned rows: trivial features, the first step, the first checkpoint and the last; mean over
    the runs, and behind it the spread over seeds. Then by how much the last is above each."""
    columns = [column for column in COLUMNS if group.scores(group.last, column)]
    steps = list(group.measured)
    shown = sorted({steps[0], steps[min(1, len(steps) - 1)], steps[-1]})
    cells = [(group.name, *(COLUMNS[column] for column in columns))]

    def add(name: str, row: int | str) -> None:
        cells.append((name, *(_mean(group.top1(row, column)) for column in columns)))

    for name in group.baselines:
        add(name, name)
    if chance := group.measured[group.last][0].chance():
        figures = [chance.get(column) for column in columns]
        cells.append(("chance", *("-" if x is None else f"{x:.3f}" for x in figures)))
    for step in shown:
        add(f"step {step:,}", step)
    rivals = [name for name in group.baselines if name != "majority class"] + shown[:-1]
    for rival in rivals:
        what = f"step {rival:,}" if isinstance(rival, int) else rival
        cells.append((f"above {what}", *(_above(group, column, rival) for column in columns)))
    runs = len(group.measured[group.last])
    note = (
        f"{', '.join(_counts(group))}; mean of {runs} seed{'s' * (runs > 1)} ± standard deviation "
        "between them; in brackets the standard error of a difference, paired by image"
    )
    return "\n".join([*aligned(cells), note])


def summary(groups: Sequence[Seeds]) -> str:
    """All groups in one table: of each its step 0, untrained, and its last; for retrieval the mean
    of both ways."""
    columns = [
        column
        for column in COLUMNS
        if column not in RETRIEVED_WAYS and any(group.steps(column) for group in groups)
    ]
    with_texts = any(group.steps(way) for group in groups for way in RETRIEVED_WAYS)
    heads = [*(COLUMNS[column] for column in columns), *[f"retrieval R@{RETRIEVED}"] * with_texts]
    cells = [("", "images seen", *heads)]
    for group in groups:
        for step in sorted({0, group.last} & group.measured.keys()):
            figures = [group.top1(step, column) for column in columns]
            figures += [group.retrieved(step)] * with_texts
            name = group.name if step else f"{group.name}, untrained"
            cells.append((name, f"{step * group.batch:,}", *map(_mean, figures)))
    notes = ["retrieval: mean of image to text and text to image"] * with_texts
    counts = [words for group in groups for words in _counts(group)]
    notes += dict.fromkeys(counts)
    for what in ("top-1", "recall"):
        if len({words for words in counts if words.startswith(what)}) > 1:
            notes.append(f"NOT COMPARABLE: {what} of the groups is of different images")
    return "\n".join([*aligned(cells), *notes])


def _counts(group: Seeds) -> list[str]:
    """On how much the last step was measured."""
    last, words = group.measured[group.last][0], []
    if labelled := last.frozen or last.zero_shot:
        words.append(f"top-1 on {labelled.test_images:,} test images")
    if last.retrieval:
        words.append("recall among {:,} images and {:,} texts".format(*last.retrieval.counts))
    return words


def _above(group: Seeds, column: str, rival: int | str) -> str:
    if not group.scores(rival, column):
        return "-"
    gap = group.above(column, rival)
    return f"{gap.value:+.3f} ({gap.se:.3f})"


def _mean(values: np.ndarray) -> str:
    if not len(values):
        return "-"
    spread = f" ± {values.std(ddof=1):.3f}" if len(values) > 1 else ""
    return f"{values.mean():.3f}{spread}"
