#!/usr/bin/env python3
"""Compares groups of runs by the evaluations in their folders: a table for each group, one picture.

    python tools/compare.py mae=runs/mae0,runs/mae1,runs/mae2 dino=runs/dino0 [--output PNG]

A group is NAME=RUN[,RUN...]: runs that differ in their seed only. The table has trivial features,
step 0, the first checkpoint that was evaluated and the last; mean and spread over seeds, and by how
much the last is above each of them. The picture has the figures over the images seen.

Exit codes: 0 done · 2 bad input or a full disk, one line.
"""

from __future__ import annotations

import numpy as np

from webssl_jax import cli
from webssl_jax.config import UserError
from webssl_jax.evaluators.seeds import COLUMNS, Seeds, read_seeds, table
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
    image size moves them a little."""
    panels, levels = {}, {}
    for column, title in COLUMNS.items():
        panels[title] = {}
        for group in groups:
            x = np.array(list(group.measured)) * group.batch
            y = np.stack([group.top1(step, column) for step in group.measured], axis=1)
            panels[title][group.name] = (x, y)
        levels[title] = [
            (name, getattr(row, column).top1)
            for name, row in groups[0].baselines.items()
            if name != "majority class"
        ]
    return panels, levels


if __name__ == "__main__":
    cli.run(main)
