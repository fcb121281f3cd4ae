#!/usr/bin/env python3
"""Is my run healthy? Draws a run's vital signs on one page and prints the alarms that were raised.

    python tools/health.py --workdir RUN --output PNG [--reference FILE]
    python tools/health.py --workdir RUN --save-reference FILE

The run may be under way, finished or dead; only its JSON files are read. Behind
each curve lies that of a reference: by default the committed run of the method's tiny twin, if
there is one (webssl_jax/telemetry/reference/METHOD.json). --save-reference makes such a file of a
finished run. docs/health.md says how to read the page.

Exit codes: 0 done, also when alarms were raised · 2 bad input or a full disk, one line.
"""

from __future__ import annotations

import json
import pathlib

from webssl_jax import cli
from webssl_jax import config as configs
from webssl_jax.config import UserError


def _parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", required=True, help="a run")
    parser.add_argument("--output", help="where the page goes, as PNG")
    parser.add_argument("--reference", help="a file that --save-reference wrote")
    parser.add_argument("--save-reference", help="write this run's curves there")
    return parser


cli.help_early(_parser, __name__)

from webssl_jax import methods, runs
from webssl_jax.telemetry import health_page
from webssl_jax.telemetry.alarms import AlarmMonitor
from webssl_jax.telemetry.writer import read_rows
from webssl_jax.visuals import save_png


def main(argv: list[str] | None = None) -> int:
    """The entry point. Returns an exit code of cli.py."""
    args = _parser().parse_args(argv)
    if not (args.output or args.save_reference):
        raise UserError("give --output PNG or --save-reference FILE; else there is nothing to do")
    for flag, path in (("--output", args.output), ("--save-reference", args.save_reference)):
        if path and pathlib.Path(path).is_dir():
            raise UserError(f"{flag} {path}: is a folder; give a file")
    workdir = pathlib.Path(args.workdir)
    config = runs.read_config(workdir)
    rows = read_rows(workdir / "metrics.jsonl")
    if not rows:
        raise UserError(f"--workdir {workdir}: has logged no step yet")
    total = configs.total_steps(config)
    vitals = methods.create(config).vitals(config.global_batch)
    alarms = AlarmMonitor(vitals, configs.steps(config.optim, "warmup", config))
    alarms.update_all(rows)
    print(f"{config.name}, step {rows[-1]['step']:,} of {total:,}: ", end="")
    print(f"{len(alarms.episodes)} alarm(s)" if alarms.episodes else "no alarm")
    for episode in alarms.episodes:
        print(f"  {health_page.in_words(episode)}")
    if args.save_reference:
        path = pathlib.Path(args.save_reference)
        health_page.write_reference(
            path, config.name, rows, vitals, total, _made_by(workdir, config)
        )
        print(f"  reference: {path}")
    if args.output:
        reference = (
            health_page.read_reference(pathlib.Path(args.reference))
            if args.reference
            else health_page.stored_reference(config.method.name)
        )
        if reference and not set(reference.curves) & {sign.metric for sign in vitals.signs}:
            raise UserError(f"{args.reference}: is of another method than this run")
        picture = health_page.page(rows, alarms, total, config.name, reference)
        save_png(args.output, picture)
        behind = reference.name if reference else "no reference"
        print(f"  {args.output}  {picture.shape[1]} x {picture.shape[0]}, beside {behind}")
    return 0


def _made_by(workdir: pathlib.Path, config) -> dict[str, str]:
    """What a reader of the reference wants to know of the run."""
    path = workdir / "environment.json"
    environment = json.loads(path.read_text()) if path.exists() else {}
    return {
        "global_batch": str(config.global_batch),
        "total_steps": str(configs.total_steps(config)),
        "git_revision": str(environment.get("git_revision")),
    }


if __name__ == "__main__":
    cli.run(main)
