#!/usr/bin/env python3
"""Asks a question by many runs: trains and judges the cells of a study, and says what they show.

    python tools/study.py STUDY --workdir DIR [--jobs N]
    python tools/study.py STUDY --workdir DIR --dry-run [--slice v5p-512 [--price DOLLARS]]
    python tools/study.py STUDY --workdir /mnt/BUCKET/DIR --jobs N --slice v5p-512 --price DOLLARS
        --max-dollars DOLLARS --tpu '--zone ZONE --mount BUCKET=/mnt/BUCKET ...'

STUDY is a shipped study (configs/studies: smoke, mini, paper) or a FILE.py. --slice says what its
cells would take on a TPU slice at best, by what the compiler says of their steps; --price is of a
chip and hour. With --max-dollars each run gets such a slice of its own, by tools/tpu.py babysit
(--tpu: its flags), N at a time; the budget is dealt out by what each takes at best. DIR must be a
folder that this machine and the slices see.

Nothing that is done is done again; whatever stopped it, the same command goes on. What comes of it
lies in DIR: index.html (the page), figures.png, runs.csv, runs.json, findings.json; the runs lie in
DIR/cells/CELL/seedN, each an ordinary run with its train.log. The page is written anew at the end,
and at any time by --page-only. outcomes.zip holds all that findings, tables and figures are made
of: --outcomes ZIP writes the page of it in an empty DIR, without the runs and their pictures.

Exit codes: 0 all runs are done · 1 some failed, and are named · 2 bad input, one line · 130 stopped
by Ctrl-C, all state saved.
"""

from __future__ import annotations

import datetime
import math
import pathlib
import shlex
from typing import Any

from webssl_jax import cli
from webssl_jax.config import UserError
from webssl_jax.study import price


def _parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("study", help="NAME or FILE.py, and [:key=value,...]")
    parser.add_argument("--workdir", type=pathlib.Path, required=True, help="of all runs")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--dry-run", action="store_true", help="print what would be run, and end")
    parser.add_argument("--slice", help="hours and cost there, as v5p-512")
    parser.add_argument("--price", type=float, help="with --slice: dollars a chip and hour")
    parser.add_argument("--max-dollars", type=float, help="run on slices, all within this budget")
    parser.add_argument("--tpu", default="", metavar="FLAGS", help="of tools/tpu.py babysit")
    parser.add_argument("--plan-table", type=pathlib.Path, default=price.TABLE, metavar="FILE")
    parser.add_argument("--page-only", action="store_true", help="write the page of what is done")
    parser.add_argument(
        "--outcomes",
        type=pathlib.Path,
        metavar="ZIP",
        help="of a study that was run elsewhere: write its page here",
    )
    return parser


cli.help_early(_parser, __name__)

from webssl_jax.evaluators.tables import aligned
from webssl_jax.study import cells, findings, on_slices, page, references, runner


def main(argv: list[str] | None = None) -> int:
    """The entry point. Returns an exit code of cli.py."""
    args = _parser().parse_args(argv)
    if args.jobs < 1:
        raise UserError(f"--jobs {args.jobs}: must be at least 1")
    if args.slice and not args.dry_run and args.max_dollars is None:
        raise UserError("--slice: goes with --dry-run, or --max-dollars to run there")
    if args.max_dollars is not None and (args.price is None or not args.max_dollars > 0):
        raise UserError("--max-dollars: needs --slice and --price, and dollars above 0")
    if args.tpu and args.max_dollars is None:
        raise UserError("--tpu: its flags go with --max-dollars")
    if args.price is not None and not (args.slice and 0 < args.price < 1e6):
        raise UserError(f"--price {args.price:g}: needs --slice, and dollars above 0")
    study = cells.load(args.study)
    findings.check(study)
    references.check(study)
    print("\n".join(aligned(_plan(study, args.workdir))), flush=True)
    if args.slice:
        priced = price.rows(study, args.slice, args.price, args.plan_table)
        print("\n" + "\n".join(aligned(priced)) + "\n")
    start = _start(study, args)
    if args.dry_run:
        for run in study.runs(args.workdir):
            try:
                if not runner.is_done(run):
                    print(shlex.join(start(run)))
            except UserError as error:
                print(f"# {run.name}: {error}")
        for reference in study.references:
            print(shlex.join(references.command(study, reference, args.workdir)))
        return 0
    if args.outcomes:
        _tell(study, args.workdir, args.outcomes)
        return 0
    if args.page_only:
        if not args.workdir.is_dir():
            raise UserError(f"--workdir {args.workdir}: no such folder")
        for name, words in _tell(study, args.workdir).items():
            print(f"left out: {name}: {words}")
        return 0
    try:
        progress = runner.run_all(study, args.workdir, args.jobs, _say, start)
        progress.failed |= references.judge(study, args.workdir, _say)
    except KeyboardInterrupt:
        _tell(study, args.workdir)
        print("stopped; the same command goes on")
        return cli.EXIT_INTERRUPTED
    progress.failed |= _tell(study, args.workdir)
    for name, words in progress.failed.items():
        print(f"failed: {name}: {words}")
    return cli.EXIT_FAILURE if progress.failed else 0


def _start(study: cells.Study, args: Any) -> runner.Command:
    """What starts a run: here, or on a slice of its own."""
    if args.max_dollars is None:
        return runner.command
    folder, budget = args.workdir, args.max_dollars
    parts = on_slices.shares(study, folder, args.slice, args.price, budget, args.plan_table)
    flags = shlex.split(args.tpu)
    return lambda run: on_slices.command(study, run, args.slice, args.price, parts[run.name], flags)


def _say(line: str) -> None:
    print(f"{datetime.datetime.now():%m-%d %H:%M:%S} {line}", flush=True)


def _plan(study: cells.Study, folder: pathlib.Path) -> list[tuple[str, ...]]:
    """A line a cell: what it is, how far it is, and what training takes of all its runs where the
    study says how fast a core is."""
    heads = ("cell", "config", "parameters", "images", "seeds", "done", "CPU hours")
    rows: list[tuple[str, ...]] = [heads]
    runs, total = study.runs(folder), 0.0
    for cell in study.cells:
        done = sum(_done(run) for run in runs if run.cell is cell)
        seconds = cell.images * len(cell.seeds) / (cell.images_per_s or math.inf)
        total += seconds
        size = (f"{cell.parameters:,}", f"{cell.images:,}")
        hours = f"{seconds / 3600:.2f}" if seconds else "-"
        rows.append((cell.name, cell.spec, *size, str(len(cell.seeds)), str(done), hours))
    if total:
        rows.append(("all", "", "", "", str(len(runs)), "", f"{total / 3600:.2f}"))
    return rows


def _done(run: cells.Run) -> bool:
    try:
        return runner.is_done(run)
    except UserError:  # of other settings: named when it would be run
        return False


def _tell(
    study: cells.Study, folder: pathlib.Path, stored: pathlib.Path | None = None
) -> dict[str, str]:
    """Writes the page. Returns {run: why} of those that are left out."""
    stated, left_out = page.write(study, folder, stored)
    for one in stated:
        print(f"{one.name}: {one.text}")
    print(f"  {folder / 'index.html'}")
    return left_out


if __name__ == "__main__":
    cli.run(main)
