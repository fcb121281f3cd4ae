#!/usr/bin/env python3
"""Compares groups of runs by the evaluations in their folders: a table for each group, one picture.

    python tools/compare.py mae=runs/mae0,runs/mae1,runs/mae2 dino=runs/dino0 [--output PNG]

A group is NAME=RUN[,RUN...]: runs that differ in their seed only. The table has trivial features,
step 0, the first checkpoint that was evaluated and the last; mean and spread over seeds, and by how
much the last is above each of them. Several groups get one more table of them all: untrained and
trained, k-NN, linear probe and, of methods with texts, zero-shot and retrieval. The picture has the
figures over the images seen.

Exit codes: 0 done · 2 bad input or a full disk, one line.
"""

from __future__ import annotations

import numpy as np

from webssl_jax import cli
from webssl_jax.config import UserError
from webssl_jax.evaluators.results import COLUMNS
from webssl_jax.evaluators.seeds import Seeds, read_seeds, summary, table
from webssl_jax.visuals import save_png
from webssl_jax.visuals.comparison import comparison


def main(argv: list[str] | None = None) -> int:
    """The entry point. Returns an exit code of cli.py."""
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("groups", nargs="+", metavar="NAME=RUN[,RUN...]")
    parser.add_argument("--output", help="where the picture goes, as PNG")
    args = parser.parse_args(argv)
    groups = [_read(text) for text in args.groups]
    if len({group.name for group in groups}) < len(groups):
        raise UserError("two groups have the same name")
    print("\n\n".join(map(table, groups)))
    if len(groups) > 1:
        print(f"\n{summary(groups)}")
    if args.output:
        picture = comparison(*_curves(groups))
        save_png(args.output, picture)
        print(f"\n{args.output}  {picture.shape[1]} x {picture.shape[0]}")
    return 0


def _read(text: str) -> Seeds:
    name, equals, runs = text.partition("=")
    if not (name and equals and all(runs.split(","))):
        raise UserError(f"{text}: write NAME=RUN or NAME=RUN,RUN")
    return read_seeds(name, runs.split(","))


def _curves(groups: list[Seeds]) -> tuple[dict, dict]:
    """The arguments of :func:`comparison`. Trivial features are those of the first group: another
    image size moves them a little. Chance is that of the first group with texts."""
    panels, levels = {}, {}
    for column, title in COLUMNS.items():
        curves = {}
        for group in groups:
            if steps := group.steps(column):
                y = np.stack([group.top1(step, column) for step in steps], axis=1)
                curves[group.name] = (np.array(steps) * group.batch, y)
        if not curves:
            continue
        panels[title] = curves
        levels[title] = [
            (name, float(groups[0].top1(name, column)[0]))
            for name in groups[0].baselines
            if name != "majority class" and groups[0].scores(name, column)
        ]
        chances = (group.measured[group.last][0].chance() for group in groups)
        levels[title] += [("chance", x[column]) for x in chances if column in x][:1]
    return panels, levels


if __name__ == "__main__":
    cli.run(main)
