#!/usr/bin/env python3
"""Converts images to ArrayRecord shards of webssl_jax. One command a kind of input:

    python tools/make_records.py folder --input photos/ --output shards/ --label-from folder
    python tools/make_records.py tar --input 'laion/*.tar' --output shards/
    python tools/make_records.py metaclip --input metaclip/ --output shards/ --first 0 --last 99
    python tools/make_records.py parquet --input 'cc3m/*.parquet' --output shards/ \\
        --image-column image --caption-column caption
    python tools/make_records.py tfds --input cifar10 --output shards/ --tfds-split train
    python tools/make_records.py layout --layout ade20k --input ADEChallengeData2016.zip \\
        --output shards/ --part val --split val
    python tools/make_records.py conversations --input llava_v1_5_mix665k.json \\
        --images llava_images/ --output shards/
    python tools/make_records.py records --input shards/ more/ --output merged/ \\
        --without takedowns.txt --by meta.url --min meta.score=5

The last one merges sets of records, selects (``--keys FILE``) and removes (``--without FILE``) by
the key, or by another field: source, label, or NAME.FIELD of an annotation that is a JSON object.
Values of a list that are in no record are told and written to ``<split>.unmatched.txt``.

``--annotation NAME=WHERE`` adds what evaluations need beside an image, one flag for each. WHERE is
a path relative to --input with {path}, {folder} or {stem} of the image in it, a member's extension
in a tar, a column of parquet, or a feature of TFDS. As in a shell, {stem%END} is {stem} without
that ending, {path#START} is {path} without that beginning:

    python tools/make_records.py folder --input ADE/images --output shards/ \\
        --annotation 'mask=../annotations/{path}.png'
    python tools/make_records.py folder --input leftImg8bit/train --output shards/ \\
        --annotation 'mask=../../gtFine/train/{path%_leftImg8bit}_gtFine_labelIds.png'
    python tools/make_records.py tar --input 'scenes/*.tar' --output shards/ \\
        --annotation mask=seg.png --annotation depth=depth.png
    python tools/make_records.py parquet --input 'llava/*.parquet' --output shards/ \\
        --annotation conversations=conversations --keep-duplicates
    python tools/make_records.py tfds --input oxford_iiit_pet --output shards/ \\
        --image-feature image --annotation mask=segmentation_mask

The names labels, questions, conversations, mask, depth and meta have a fixed meaning, others are
free (webssl_jax/data/annotations.py). What else a crawl says of an image (the rest of the json in a
tar, other columns of parquet) becomes the annotation meta: ``--no-metadata`` leaves it out. An
annotation that is missing or damaged is counted and named, and the image is kept without it;
``--require-annotations`` drops the image. ``--max-side`` shrinks masks and depth with the image,
but not positions in JSON. An image that comes again with other annotations is a duplicate all the
same: ``--keep-duplicates`` keeps both.

HEIC and JPEG XL are read with ``pip install 'webssl_jax[formats]'``, and become JPEG.

The same command again continues where it was stopped, by whatever; if there are new inputs, or an
input is another file than it was, it is refused and says which. It writes
``<split>-00000-of-00004.arrayrecord`` and ``<split>.summary.json`` with what was kept, what was
dropped and why, and which files are damaged. Exit codes as everywhere in webssl_jax: 0 done, 2 bad
input or full disk (one line says what; also if samples of a tar were not read as they should),
130 stopped by Ctrl-C. Damaged or missing inputs beside
whole ones leave it at 0: the last line on stderr says how many there are.

``--runner beam`` does the same work on Apache Beam (``pip install '.[beam]'``, in an environment of
its own): ``--beam-options='--runner=DataflowRunner --project=...'``. This package must be there for
all workers, and inputs and ``--output`` under the same paths: a shared file system, or a bucket.
``--output`` may be ``gs://BUCKET/FOLDER`` with any runner, and so may the ``--input`` of tars
(``pip install 'webssl_jax[gcp]'``); the bytes are those of a local run. Proven with Beam's
DirectRunner and a stand-in for the storage, on one machine only.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from webssl_jax import cli
from webssl_jax.config import UserError
from webssl_jax.data.converter import buckets, flags, items, kinds, plan, remote, runners, stats
from webssl_jax.data.converter.records_reader import list_digest, read_list
from webssl_jax.files import write_text
from webssl_jax.telemetry.progress import Progress


def main(argv: list[str] | None = None) -> int:
    """The entry point. Returns an exit code of cli.py."""
    parser = cli.ArgumentParser(description=__doc__)
    parsers = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    for name, kind in kinds.KINDS.items():
        mine = parsers.add_parser(name, help=kind.help)
        kind.add_flags(mine)
        _add_annotation(mine, kind.annotation)
        _add_common(mine, kind.unit)
    args, unknown = parser.parse_known_args(argv)
    if unknown:  # said by the subparser, so that it suggests its own flags
        parsers.choices[args.kind].error(f"unrecognized arguments: {' '.join(unknown)}")
    if getattr(args, "test_fraction", 0) and args.split == "test":
        raise UserError("--test-fraction: splits test images off --split, so that cannot be test")
    workers = args.workers or os.cpu_count() or 1
    runner = flags.runner_of(args, workers)
    args.annotation.sort()  # their order changes no byte
    for (name, _), (following, _) in itertools.pairwise(kinds.wanted(args)):
        if name == following:
            raise UserError(f"--annotation {name}: given twice; each name has one place")
    if args.require_annotations and not args.annotation:
        raise UserError("--require-annotations: only with --annotation")
    address = args.output
    with remote.opened(address) as (args.output, mirror):
        if mirror is not None:
            runner = mirror.runner(runner)
        return _convert(args, kinds.KINDS[args.kind], address, runner, workers)


def _add_annotation(parser: cli.ArgumentParser, where: str) -> None:
    if not where:  # of records all stay as they are, a layout brings its own
        parser.set_defaults(annotation=[], require_annotations=False)
        return
    parser.add_argument(
        "--annotation",
        action="append",
        type=flags.annotation,
        default=[],
        metavar="NAME=WHERE",
        help=f"what lies beside an image, one flag for each; WHERE is {where}",
    )
    parser.add_argument(
        "--require-annotations",
        action="store_true",
        help="drop images that lack one of these (default: keep)",
    )


def _add_common(parser: cli.ArgumentParser, unit: str) -> None:
    """What every kind of input shares."""
    parser.add_argument("--output", type=buckets.place, required=True, metavar="DIR")
    parser.add_argument(
        "--split", default="train", type=flags.name, help="first part of the shards' names"
    )
    parser.add_argument(
        "--source", help="what records name as their source (default: input's name)"
    )
    if unit == "kB":
        default = "default: one a tar"
    else:
        default = "instead of --images-per-shard"
        parser.add_argument(
            "--images-per-shard",
            type=flags.positive,
            default=5000,
            metavar="N",
            help="row groups of parquet and files of TFDS are not split",
        )
    parser.add_argument(
        "--shards", type=flags.positive, metavar="N", help=f"number of shards at most, {default}"
    )
    parser.add_argument(
        "--max-side",
        type=flags.natural,
        default=0,
        metavar="PX",
        help="shrink larger images to this longer side, as JPEG "
        "(0: keep every file's bytes as they are)",
    )
    parser.add_argument(
        "--min-side",
        type=flags.positive,
        default=32,
        metavar="PX",
        help="drop images whose shorter side is below it",
    )
    parser.add_argument(
        "--max-aspect",
        type=flags.aspect,
        default=8.0,
        metavar="RATIO",
        help="drop images whose sides differ by more than this factor",
    )
    parser.add_argument(
        "--require-caption", action="store_true", help="drop images without one (default: keep)"
    )
    if unit == "records":
        parser.set_defaults(min_side=1, max_aspect=1e9)  # the rules were applied once
        parser.add_argument(
            "--drop-duplicates",
            action="store_false",
            dest="keep_duplicates",
            help="drop images whose bytes came before (default: keep)",
        )
    else:
        parser.add_argument(
            "--keep-duplicates",
            action="store_true",
            help="keep images whose bytes came before (default: the first in order stays)",
        )
    flags.add_runner(parser)


def _convert(
    args: Any, kind: kinds.Kind, address: Path | str, runner: runners.Runner, workers: int
) -> int:
    """address: of the output; if that is in a bucket, args.output is its mirror."""
    begun = time.monotonic()
    args.input = _absolute(args.input)
    for name in ("keys", "without"):
        if getattr(args, name, None):
            setattr(args, name, getattr(args, name).resolve())
    settings = {name: str(v) if isinstance(v, Path) else v for name, v in vars(args).items()}
    for name in ("output", "workers", "runner", "beam_options", "traceback"):
        del settings[name]  # they change no byte
    lists = {
        name: str(getattr(args, name)) for name in ("keys", "without") if getattr(args, name, None)
    }
    for name, file in lists.items():
        settings[name] = f"{file} ({list_digest(file)})"
    if args.kind in ("folder", "metaclip") and not args.input.is_dir():
        kind.find(args)  # says what is wrong with it, before anything is made

    def make() -> tuple[kinds.Facts, plan.Dealt]:
        facts, units = kind.find(args)
        return facts | ({"source": args.source} if args.source else {}), _deal(units, args)

    facts, continued = plan.prepare(args.output, settings, make)
    if continued:
        print(f"continuing {address} by the plan made when it was begun", file=sys.stderr)
    total = sum(sum(sizes) for sizes in plan.planned(args.output).values())
    progress = Progress(total, "converting", kind.unit)
    before = None

    def update(size: int) -> None:
        nonlocal before
        if before is None:  # what was done before says nothing about the speed
            before = progress.done = size
            progress.resume()
        else:
            progress.update(size)

    names = [field.name for field in dataclasses.fields(items.Rules)]
    rules = items.Rules(**{name: getattr(args, name) for name in names})
    try:
        reader = kind.reader(args, facts)
        # A job of Beam starts slowly: all at once.
        first = {"wave": workers} if args.runner == "pool" else {}
        summaries = runners.convert(
            args.output, reader, rules, runner, update, workers=workers, **first
        )
    except KeyboardInterrupt:
        progress.close()
        print("stopped; the same command continues", file=sys.stderr)
        return cli.EXIT_INTERRUPTED
    images = sum(summary["inputs"] for summary in summaries.values())
    speed = f"{images / (time.monotonic() - begun):,.0f} images/s from start to end"
    progress.close("" if before else speed)
    for summary in summaries.values():
        print(stats.table(summary))
    if not any(summary["kept"] for summary in summaries.values()):
        named = " ".join(args.input) if isinstance(args.input, list) else args.input
        raise UserError(f"--input {named}: no usable image; {args.output} holds empty shards")
    for split, summary in summaries.items():
        if count := stats.damaged(summary):
            inputs = "1 input (or part of one)" if count == 1 else f"{count:,} inputs (or parts)"
            where = f"{address}/{split}.summary.json"
            print(f'{inputs} damaged, missing or empty; see "notes" in {where}', file=sys.stderr)
    _tell_unmatched(args, address, set().union(*map(read_list, lists.values())), summaries)
    for summary in summaries.values():
        _refuse_misread(args, summary)
    return 0


def _tell_unmatched(
    args: Any, address: Path | str, listed: set[str], summaries: Mapping[str, Any]
) -> None:
    """Tells the values of lists that are in no record."""
    left = sorted(listed.difference(*(summary["listed"] for summary in summaries.values())))
    if left:
        path = f"{address}/{args.split}.unmatched.txt"
        write_text(
            args.output / f"{args.split}.unmatched.txt", "".join(f"{value}\n" for value in left)
        )
        print(
            f"{len(left):,} of {len(listed):,} listed values of {args.by!r} are in no record "
            f"({', '.join(left[:3])}{', ...' if len(left) > 3 else ''}): {path}",
            file=sys.stderr,
        )


def _refuse_misread(args: Any, summary: Mapping[str, Any]) -> None:
    """Raises UserError if what is lost would be there had the input been read as it should."""
    for reason, advice in items.MISREAD.items():
        for row in (summary["dropped"].get(reason), summary["notes"].get(reason)):
            if row:
                raise UserError(
                    f"--input {' '.join(args.input)}: {row['count']:,} x {reason} "
                    f"({row['examples'][0]}, ...); {advice}, and convert into another folder: "
                    f"{args.output} lacks them"
                )


def _absolute(value: Any) -> Any:
    """Inputs as they are named in the plan: the same from whatever folder the command is given."""
    if isinstance(value, list):
        return [
            one if "://" in one or one.startswith("corpus:") else os.path.abspath(one)
            for one in value
        ]
    if isinstance(value, Path):
        return value.resolve()
    return os.path.abspath(value) if os.path.isdir(value) else value  # else a dataset's name


def _deal(units: Sequence[items.Unit], args: Any) -> dict[str, list[list[items.Unit]]]:
    """Splits and shards. A test set never takes all, and takes one image at least."""
    others = [unit for unit in units if "count" in unit]  # no images: a part of the first shard
    units = [unit for unit in units if "count" not in unit]
    parts: dict[str, list[items.Unit]] = {args.split: list(units)}
    fraction = getattr(args, "test_fraction", 0.0)
    if fraction:
        test = [unit for unit in units if _draw(unit["path"]) < fraction]
        rest = [unit for unit in units if _draw(unit["path"]) >= fraction]
        if not test or not rest:
            raise UserError(
                f"--test-fraction {fraction:g}: {len(units)} images are too few to split"
            )
        parts = {args.split: rest, "test": test}
    sizes = {split: sum(map(plan.size_of, mine)) for split, mine in parts.items()}
    per_shard = getattr(args, "images_per_shard", 0)
    if args.shards and per_shard:
        per_shard = -(-sizes[args.split] // args.shards)
    dealt = {}
    for split, mine in parts.items():
        wanted = -(-sizes[split] // per_shard) if per_shard else len(mine)
        if args.shards and split == args.split:
            wanted = args.shards
        # As many shards as units: one each, whatever their sizes.
        one_each = [[unit] for unit in mine]
        dealt[split] = one_each if wanted >= len(mine) else plan.deal(mine, max(1, wanted))
    dealt[args.split][0] += others
    return dealt


def _draw(path: str) -> float:
    """A number in [0, 1) that only the path decides."""
    return int.from_bytes(hashlib.sha256(os.fsencode(path)).digest()[:8], "big") / 2**64


if __name__ == "__main__":
    cli.run(main)
