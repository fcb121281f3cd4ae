#!/usr/bin/env python3
"""What a run will see, before it starts: its sources with their shares, and its first batch.

    python tools/peek.py --config CONFIG [--config.key=value ...] [--step N] [--output SHEET.png]

Prints a line a source: its records, its share of the images of the whole run, and how often each of
its records is seen. The sheet has the records of batch N as they are and as the network gets them,
which is what the run itself draws of its first batch. Nothing is trained, and no run is touched.

Exit codes: 0 · 2 bad input, one line.
"""

from __future__ import annotations

import pathlib

from webssl_jax import cli
from webssl_jax import config as configs
from webssl_jax.config import UserError


def _parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True, help="as of train")
    parser.add_argument("--step", type=int, default=0, help="the batch to draw")
    parser.add_argument("--output", help="the sheet, a PNG; none is drawn without")
    return parser


cli.help_early(_parser, __name__)

import numpy as np

from webssl_jax import methods, runs
from webssl_jax.data.mixture import Mixture
from webssl_jax.data.pipeline import TrainLoader
from webssl_jax.evaluators import fed
from webssl_jax.evaluators.tables import aligned
from webssl_jax.visuals import save_png


def main(argv: list[str] | None = None) -> int:
    """The entry point. Returns an exit code of cli.py."""
    args, overrides = _parser().parse_with_overrides(argv)
    if args.step < 0:
        raise UserError(f"--step {args.step}: must be 0 or more")
    config = configs.load(args.config, overrides)
    method = methods.create(config)
    source = runs.open_records(config, pathlib.Path())
    images = configs.total_steps(config) * config.global_batch
    print("\n".join(aligned(table(source, images))))
    if args.output:
        size, seed, threads = config.global_batch, config.seed, config.data.threads
        view = method.train_view()
        with TrainLoader(source, view, global_batch=size, seed=seed, threads=threads) as loader:
            batch = loader.batch_at(args.step)
        save_png(args.output, fed.picture(source, batch, method))
        print(f"  {args.output}  {min(12, size)} images of batch {args.step:,}")
    return 0


def table(source: runs.Records, images: int) -> list[tuple[str, ...]]:
    """The sources of a run of ``images`` images."""
    names, counts, seen = ("all",), [len(source)], np.array([images])
    if isinstance(source, Mixture):
        names, counts, seen = source.names, source.counts, source.schedule.seen(images)
    rows: list[tuple[str, ...]] = [("source", "records", "images", "share", "epochs")]
    for name, count, n in zip(names, counts, seen.tolist(), strict=True):
        rows.append((name, f"{count:,}", f"{n:,}", f"{n / images:.1%}", f"{n / count:.2f}"))
    return rows


if __name__ == "__main__":
    cli.run(main)
