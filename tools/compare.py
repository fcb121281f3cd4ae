#!/usr/bin/env python3
"""Compares groups of runs by the evaluations in their folders: a table for each group, one picture.

    python tools/compare.py mae=runs/mae0,runs/mae1,runs/mae2 dino=runs/dino0 [--output PNG]

A group is NAME=RUN[,RUN...]: runs that differ in their seed only. The table has trivial features,
step 0, the first checkpoint that was evaluated and the last; mean and spread over seeds, and by how
much the last is above each of them, for the headline figures of every row of their configs' evals.
Several groups get one more table of them all, untrained and trained. The picture has the figures
over the images seen.

Exit codes: 0 done · 2 bad input or a full disk, one line.
"""

from __future__ import annotations

from webssl_jax import cli
from webssl_jax.config import UserError


def _parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("groups", nargs="+", metavar="NAME=RUN[,RUN...]")
    parser.add_argument("--output", help="where the picture goes, as PNG")
    return parser


cli.help_early(_parser, __name__)

import numpy as np

from webssl_jax.evaluators.probes.labelled import MAJORITY
from webssl_jax.evaluators.seeds import Seeds, read_seeds, summary, table
from webssl_jax.visuals import save_png
from webssl_jax.visuals.comparison import comparison


def main(argv: list[str] | None = None) -> int:
    """The entry point. Returns an exit code of cli.py."""
    args = _parser().parse_args(argv)
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
    """The arguments of :func:`comparison`. Trivial features and chance are those of the first group
    that has the row: another image size moves trivial features a little."""
    panels, levels = {}, {}
    for column in dict.fromkeys(column for group in groups for column in group.columns):
        curves = {}
        for group in groups:
            if steps := group.steps(column):
                y = np.stack([group.values(step, column) for step in steps], axis=1)
                curves[group.name] = (np.array(steps) * group.batch, y)
        panels[column.title] = curves
        first = next(group for group in groups if column in group.columns)
        rivals = [name for name in first.baselines if name != MAJORITY]
        found = [(name, first.values(name, column)) for name in rivals]
        levels[column.title] = [(name, float(x[0])) for name, x in found if len(x)]
        if (chance := first.chance(column)) is not None and not levels[column.title]:
            levels[column.title].append(("chance", chance))
    return panels, levels


if __name__ == "__main__":
    cli.run(main)
