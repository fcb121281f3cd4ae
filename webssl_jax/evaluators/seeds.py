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

from webssl_jax import checkpoints
from webssl_jax.config import UserError, drop_costs
from webssl_jax.evaluators.base import Difference, Score
from webssl_jax.evaluators.frozen import Measurement

COLUMNS = {"knn": "k-NN", "linear": "linear probe"}


class Seeds(NamedTuple):
    """name: in tables. batch: images a step. measured: {step: a measurement of each run}, by step,
    of those steps that all of them have. baselines: {name: measurement} of trivial features."""

    name: str
    batch: int
    measured: dict[int, list[Measurement]]
    baselines: dict[str, Measurement]

    @property
    def last(self) -> int:
        return max(self.measured)

    def top1(self, step: int, column: str) -> np.ndarray:
        """(runs,) accuracies; ``column``: a key of COLUMNS."""
        return np.array([score.top1 for score in self.scores(step, column)])

    def scores(self, step: int, column: str) -> list[Score]:
        """One of each run."""
        return [getattr(row, column) for row in self.measured[step]]

    def above(self, column: str, rival: int | str) -> Difference:
        """Mean accuracy of the last step minus that of ``rival``, a step of the same runs or the
        name of a trivial feature, paired image by image.

        Of each image the hits are averaged over the runs first; ``se`` is the standard deviation of
        what is left, over the square root of the number of images.
        """
        hits = np.mean([score.correct for score in self.scores(self.last, column)], axis=0)
        theirs = (
            self.scores(rival, column)
            if isinstance(rival, int)
            else [getattr(self.baselines[rival], column)]
        )
        gap = hits - np.mean([score.correct for score in theirs], axis=0)
        return Difference(float(gap.mean()), float(gap.std() / np.sqrt(len(gap))))


def read_seeds(name: str, workdirs: Sequence[str]) -> Seeds:
    """Reads the evaluations that runs left in their folders.

    Raises:
      UserError: if a folder is no run, has no evaluation, or differs from the first in more than
        its seed, or if they were not measured on the same images.
    """
    runs, first = [], None
    for workdir in workdirs:
        config = checkpoints.read_config(workdir).to_dict()
        config.pop("seed")
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
        rows = [Measurement.from_json(_stored(file)) for file in files]
        runs.append({row.step: row for row in rows})
    steps = sorted(set.intersection(*map(set, runs)))
    if not steps:
        raise UserError(f"{name}: no step was evaluated in all of {', '.join(workdirs)}")
    stored = _stored(pathlib.Path(workdirs[0]) / "eval" / "baselines.json")
    baselines = {kind: Measurement.from_json(row) for kind, row in stored.items()}
    measured = {step: [run[step] for run in runs] for step in steps}
    rows = [*baselines.values(), *(row for step in steps for row in measured[step])]
    if len({row.data for row in rows}) > 1:
        raise UserError(f"{name}: the runs were evaluated on different images, or by older rules")
    return Seeds(name, first["global_batch"], measured, baselines)


def _stored(path: pathlib.Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}); run python -m webssl_jax.evaluate again"
        ) from error


def table(group: Seeds) -> str:
    """Aligned rows: trivial features, the first step, the first checkpoint and the last; mean over
    the runs, and behind it the spread over seeds. Then by how much the last is above each."""
    steps = list(group.measured)
    shown = sorted({steps[0], steps[min(1, len(steps) - 1)], steps[-1]})
    cells = [(group.name, *COLUMNS.values())]
    for name, row in group.baselines.items():
        cells.append((name, *(f"{getattr(row, column).top1:.3f}" for column in COLUMNS)))
    for step in shown:
        cells.append((f"step {step:,}", *(_mean(group.top1(step, column)) for column in COLUMNS)))
    rivals = [name for name in group.baselines if name != "majority class"] + shown[:-1]
    for rival in rivals:
        what = f"step {rival:,}" if isinstance(rival, int) else rival
        gaps = [group.above(column, rival) for column in COLUMNS]
        cells.append((f"above {what}", *(f"{gap.value:+.3f} ({gap.se:.3f})" for gap in gaps)))
    widths = [max(len(row[i]) for row in cells) for i in range(3)]
    lines = ["  ".join(t.ljust(w) for t, w in zip(row, widths)).rstrip() for row in cells]
    lines.insert(1, "-" * (sum(widths) + 4))
    images = len(group.scores(steps[-1], "knn")[0].correct)
    runs = len(group.measured[steps[-1]])
    lines.append(
        f"top-1 on {images:,} test images; mean of {runs} seed{'s' * (runs > 1)} ± standard "
        "deviation between them; in brackets the standard error of a difference, paired by image"
    )
    return "\n".join(lines)


def _mean(values: np.ndarray) -> str:
    spread = f" ± {values.std(ddof=1):.3f}" if len(values) > 1 else ""
    return f"{values.mean():.3f}{spread}"
