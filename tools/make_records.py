#!/usr/bin/env python3
"""Converts images to ArrayRecord shards of webssl_jax. One command a kind of input:

    python tools/make_records.py folder --input photos/ --output shards/ --label-from folder
    python tools/make_records.py tar --input 'laion/*.tar' --output shards/
    python tools/make_records.py metaclip --input metaclip/ --output shards/ --first 0 --last 99
    python tools/make_records.py parquet --input 'cc3m/*.parquet' --output shards/ \\
        --image-column image --caption-column caption
    python tools/make_records.py tfds --input cifar10 --output shards/ --tfds-split train

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

The names labels, questions, conversations, mask and depth have a fixed meaning, others are free
(webssl_jax/data/annotations.py). An annotation that is missing or damaged is counted and named, and
the image is kept without it; ``--require-annotations`` drops the image. ``--max-side`` shrinks
masks and depth with the image, but not positions in JSON. An image that comes again with other
annotations is a duplicate all the same: ``--keep-duplicates`` keeps both.

The same command again continues where it was stopped, by whatever. It writes
``<split>-00000-of-00004.arrayrecord`` and ``<split>.summary.json`` with what was kept, what was
dropped and why, and which files are damaged. Exit codes as everywhere in webssl_jax: 0 done, 2 bad
input or full disk (one line says what), 130 stopped by Ctrl-C. Damaged or missing inputs beside
whole ones leave it at 0: the last line on stderr says how many there are.

``--runner beam`` does the same work on Apache Beam (``pip install '.[beam]'``, in an environment of
its own): ``--beam-options='--runner=DataflowRunner --project=...'``. Inputs, ``--output`` and this
package must be there for all workers, the first two under the same paths: a shared file system, or
a bucket mounted in the workers' container. ``gs://`` addresses are not understood. Proven with
Beam's DirectRunner on one machine only.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from webssl_jax import cli
from webssl_jax.config import UserError
from webssl_jax.data.converter import flags, items, plan, runners, stats
from webssl_jax.data.converter import folder_reader as folders
from webssl_jax.data.converter import parquet_reader as parquet
from webssl_jax.data.converter import tar_reader as tars
from webssl_jax.data.converter import tfds_reader as tfds
from webssl_jax.telemetry.progress import Progress

Facts = dict[str, Any]  # what listing found out and the reader needs; plain JSON, kept in the plan


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of input. ``unit`` is what sizes of its units count, ``annotation`` what names the
    place of an annotation."""

    help: str
    unit: str
    annotation: str
    add_flags: Callable[[cli.ArgumentParser], None]
    find: Callable[[Any], tuple[Facts, list[items.Unit]]]
    reader: Callable[[Any, Facts], items.Reader]


def main(argv: list[str] | None = None) -> int:
    """The entry point. Returns an exit code of cli.py."""
    parser = cli.ArgumentParser(description=__doc__)
    parsers = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    for name, kind in KINDS.items():
        mine = parsers.add_parser(name, help=kind.help)
        kind.add_flags(mine)
        _add_annotation(mine, kind.annotation)
        _add_common(mine, kind.unit)
    args, unknown = parser.parse_known_args(argv)
    if unknown:  # said by the subparser, so that it suggests its own flags
        parsers.choices[args.kind].error(f"unrecognized arguments: {' '.join(unknown)}")
    if getattr(args, "test_fraction", 0) and args.split == "test":
        raise UserError("--test-fraction: splits test images off --split, so that cannot be test")
    if args.beam_options and args.runner != "beam":
        raise UserError("--beam-options: only with --runner beam")
    args.annotation.sort()  # their order changes no byte
    for (name, _), (following, _) in itertools.pairwise(_annotations(args)):
        if name == following:
            raise UserError(f"--annotation {name}: given twice; each name has one place")
    if args.require_annotations and not args.annotation:
        raise UserError("--require-annotations: only with --annotation")
    return _convert(args, KINDS[args.kind])


# ----------------------------------------------------------------------------------- kinds of input


def _folder_flags(parser: cli.ArgumentParser) -> None:
    parser.add_argument("--input", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--label-from",
        choices=folders.LABELS,
        default="none",
        help="folder: the first folder below --input",
    )
    parser.add_argument(
        "--captions",
        choices=folders.CAPTIONS,
        default="none",
        help="sidecar-txt: each line of NAME.txt beside NAME.jpg",
    )
    parser.add_argument(
        "--test-fraction",
        type=flags.fraction,
        default=0.0,
        metavar="F",
        help="put this share of the images, chosen by a digest of the key, into a split named test",
    )


def _folder_find(args) -> tuple[Facts, list[items.Unit]]:
    progress = Progress(None, "listing", "images")
    units = folders.list_folder(args.input, progress.update, _annotations(args))
    progress.close()
    return {"root": str(args.input), "source": args.input.name or "images"}, units


def _folder_reader(args, facts: Facts) -> items.Reader:
    return folders.FolderReader(
        **facts, label_from=args.label_from, captions=args.captions, annotations=_annotations(args)
    )


def _tar_flags(parser: cli.ArgumentParser) -> None:
    _add_patterns(parser)
    _add_label_field(parser)


def _tar_find(args) -> tuple[Facts, list[items.Unit]]:
    root, units = tars.list_tars(args.input)
    return {"root": str(root), "source": root.name}, units


def _tar_reader(args, facts: Facts) -> items.Reader:
    wanted = tuple((name, where.lstrip(".").lower()) for name, where in _annotations(args))
    return tars.TarReader(**facts, label_field=args.label_field, annotations=wanted)


def _metaclip_flags(parser: cli.ArgumentParser) -> None:
    parser.add_argument("--input", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--first", type=flags.natural, metavar="N", help="first shard (default: all)"
    )
    parser.add_argument("--last", type=flags.natural, metavar="N", help="last shard (default: all)")
    _add_label_field(parser)


def _metaclip_find(args) -> tuple[Facts, list[items.Unit]]:
    units = tars.list_metaclip(args.input, args.first, args.last)
    return {"root": str(args.input), "source": args.input.name}, units


def _parquet_flags(parser: cli.ArgumentParser) -> None:
    _add_patterns(parser)
    parser.add_argument(
        "--image-column",
        default="image",
        metavar="NAME",
        help="bytes, paths, or Hugging Face's struct of both",
    )
    parser.add_argument(
        "--image-root",
        type=Path,
        metavar="DIR",
        help="what paths are relative to; none outside is read (default: the parquet's folder)",
    )
    parser.add_argument("--caption-column", nargs="+", default=[], metavar="NAME")
    parser.add_argument("--key-column", metavar="NAME", help="default: file and row")
    parser.add_argument("--label-column", metavar="NAME")


def _columns(args) -> parquet.Columns:
    captions = tuple(args.caption_column)
    key, label = args.key_column, args.label_column
    return parquet.Columns(args.image_column, captions, key, label, _annotations(args))


def _parquet_find(args) -> tuple[Facts, list[items.Unit]]:
    root, units = parquet.list_parquet(args.input, _columns(args))
    image_root = os.path.abspath(args.image_root or root)
    return {"root": str(root), "source": root.name, "image_root": image_root}, units


def _parquet_reader(args, facts: Facts) -> items.Reader:
    return parquet.ParquetReader(**facts, columns=_columns(args))


def _tfds_flags(parser: cli.ArgumentParser) -> None:
    parser.add_argument(
        "--input", required=True, metavar="DIR|NAME", help="a prepared folder, or coco/2017"
    )
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="where datasets by name lie")
    parser.add_argument(
        "--tfds-split", default="train", metavar="SPLIT", help="train, train[:10%%], train+test"
    )
    parser.add_argument("--image-feature", metavar="PATH", help="default: the only one there is")
    parser.add_argument(
        "--caption-feature", nargs="+", default=[], metavar="PATH", help="captions/text, say"
    )
    parser.add_argument("--key-feature", metavar="PATH", help="default: file and number")
    parser.add_argument(
        "--label-feature", metavar="PATH", help="default: the class label, if there is one"
    )


def _tfds_find(args) -> tuple[Facts, list[items.Unit]]:
    captions, key, label = tuple(args.caption_feature), args.key_feature, args.label_feature
    asked = tfds.Features(args.image_feature, captions, key, label, _annotations(args))
    root, source, features, units = tfds.list_tfds(
        args.input, args.data_dir, args.tfds_split, asked
    )
    facts = {"root": str(root), "source": source, "features": dataclasses.asdict(features)}
    return facts, units


def _tfds_reader(args, facts: Facts) -> items.Reader:
    lists = {"captions": facts["features"]["captions"], "annotations": _annotations(args)}
    features = facts["features"] | {name: tuple(value) for name, value in lists.items()}
    return tfds.TfdsReader(**facts | {"features": tfds.Features(**features)})


def _add_patterns(parser: cli.ArgumentParser) -> None:
    parser.add_argument(
        "--input", nargs="+", required=True, metavar="GLOB", help="files; ** goes into folders"
    )


def _add_label_field(parser: cli.ArgumentParser) -> None:
    parser.add_argument(
        "--label-field", metavar="NAME", help="field of the json that is the label (beside .cls)"
    )


KINDS = {
    "folder": Kind(
        "a folder tree of image files",
        "images",
        "a path relative to --input with {path}, {folder} or {stem} of the image in it",
        _folder_flags,
        _folder_find,
        _folder_reader,
    ),
    "tar": Kind(
        "tars of img2dataset or webdataset; plain, gzip or zstd",
        "kB",
        "a member's extension, such as seg.png",
        _tar_flags,
        _tar_find,
        _tar_reader,
    ),
    "metaclip": Kind(
        "MetaCLIP's tars DIR/{n %% 100}/{n}.tar",
        "kB",
        "a member's extension, such as json",
        _metaclip_flags,
        _metaclip_find,
        _tar_reader,
    ),
    "parquet": Kind(
        "parquet files with images or their paths",
        "rows",
        "a column",
        _parquet_flags,
        _parquet_find,
        _parquet_reader,
    ),
    "tfds": Kind(
        "a TFDS dataset, without TensorFlow",
        "examples",
        "the path of a feature",
        _tfds_flags,
        _tfds_find,
        _tfds_reader,
    ),
}


# -------------------------------------------------------------------------------------- all of them


def _add_annotation(parser: cli.ArgumentParser, where: str) -> None:
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


def _annotations(args: Any) -> items.Wanted:
    return tuple(tuple(text.split("=", 1)) for text in args.annotation)


def _add_common(parser: cli.ArgumentParser, unit: str) -> None:
    """What every kind of input shares."""
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
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
    parser.add_argument(
        "--keep-duplicates",
        action="store_true",
        help="keep images whose bytes came before (default: the first in order stays)",
    )
    parser.add_argument("--workers", type=flags.positive, default=os.cpu_count(), metavar="N")
    parser.add_argument(
        "--runner", choices=("pool", "beam"), default="pool", help="pool: processes of this machine"
    )
    parser.add_argument(
        "--beam-options", default="", metavar="FLAGS", help="Beam's own flags, in quotes"
    )


def _convert(args: Any, kind: Kind) -> int:
    begun = time.monotonic()
    args.input = _absolute(args.input)
    settings = {name: str(v) if isinstance(v, Path) else v for name, v in vars(args).items()}
    for name in ("output", "workers", "runner", "beam_options", "traceback"):
        del settings[name]  # they change no byte
    if args.kind in ("folder", "metaclip") and not args.input.is_dir():
        kind.find(args)  # says what is wrong with it, before anything is made

    def make() -> tuple[Facts, plan.Dealt]:
        facts, units = kind.find(args)
        return facts | ({"source": args.source} if args.source else {}), _deal(units, args)

    facts, continued = plan.prepare(args.output, settings, make)
    if continued:
        print(f"continuing {args.output} by the plan made when it was begun", file=sys.stderr)
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

    runner = functools.partial(runners.pool, args.workers)
    if args.runner == "beam":
        runner = functools.partial(runners.beam, args.beam_options)
    names = [field.name for field in dataclasses.fields(items.Rules)]
    rules = items.Rules(**{name: getattr(args, name) for name in names})
    try:
        summaries = runners.convert(args.output, kind.reader(args, facts), rules, runner, update)
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
            where = args.output / f"{split}.summary.json"
            print(f'{inputs} damaged or missing; see "notes" in {where}', file=sys.stderr)
    return 0


def _absolute(value: Any) -> Any:
    """Inputs as they are named in the plan: the same from whatever folder the command is given."""
    if isinstance(value, list):
        return [os.path.abspath(one) if "://" not in one else one for one in value]
    if isinstance(value, Path):
        return value.resolve()
    return os.path.abspath(value) if os.path.isdir(value) else value  # else a dataset's name


def _deal(units: Sequence[items.Unit], args: Any) -> dict[str, list[list[items.Unit]]]:
    """Splits and shards. A test set never takes all, and takes one image at least."""
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
    return dealt


def _draw(path: str) -> float:
    """A number in [0, 1) that only the path decides."""
    return int.from_bytes(hashlib.sha256(os.fsencode(path)).digest()[:8], "big") / 2**64


if __name__ == "__main__":
    cli.run(main)
