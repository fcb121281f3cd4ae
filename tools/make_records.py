#!/usr/bin/env python3
"""Converts images to ArrayRecord shards of webssl_jax.

    python tools/make_records.py folder --input photos/ --output shards/ --label-from folder

The same command again continues where it was stopped, by whatever: finished shards are never
written again. It writes ``<split>-00000-of-00004.arrayrecord`` and ``<split>.summary.json`` with
what was kept and what was dropped and why. Exit codes as everywhere in webssl_jax: 0 done, 2 bad
input or full disk (one line says what), 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from webssl_jax import cli
from webssl_jax.config import UserError
from webssl_jax.data import converter
from webssl_jax.data.folder_reader import CAPTIONS, LABELS, FolderReader, list_folder
from webssl_jax.telemetry.progress import Progress


def main() -> int:
    parser = cli.ArgumentParser(description=__doc__)
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    folder = kinds.add_parser("folder", help="a folder tree of image files")
    folder.add_argument("--input", type=Path, required=True, metavar="DIR")
    folder.add_argument(
        "--label-from",
        choices=LABELS,
        default="none",
        help="folder: the first folder below --input",
    )
    folder.add_argument(
        "--captions",
        choices=CAPTIONS,
        default="none",
        help="sidecar-txt: each line of NAME.txt beside NAME.jpg",
    )
    _add_common(folder)
    args, unknown = parser.parse_known_args()
    if unknown:  # said by the subparser, so that it suggests its own flags
        kinds.choices[args.kind].error(f"unrecognized arguments: {' '.join(unknown)}")
    if args.test_fraction and args.split == "test":
        raise UserError("--test-fraction: splits test images off --split, so that cannot be test")
    return _convert_folder(args)


def _add_common(parser: cli.ArgumentParser) -> None:
    """What every kind of input shares."""
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--split", default="train", type=_name, help="first part of the shards' names"
    )
    parser.add_argument(
        "--source", help="what records name as their source (default: input's name)"
    )
    parser.add_argument("--images-per-shard", type=_positive, default=5000, metavar="N")
    parser.add_argument(
        "--shards",
        type=_positive,
        metavar="N",
        help="number of shards, instead of --images-per-shard",
    )
    parser.add_argument("--workers", type=_positive, default=os.cpu_count(), metavar="N")
    parser.add_argument(
        "--max-side",
        type=_natural,
        default=0,
        metavar="PX",
        help="shrink larger images to this longer side, as JPEG "
        "(0: keep every file's bytes as they are)",
    )
    parser.add_argument(
        "--min-side",
        type=_positive,
        default=32,
        metavar="PX",
        help="drop images whose shorter side is below it",
    )
    parser.add_argument(
        "--max-aspect",
        type=_aspect,
        default=8.0,
        metavar="RATIO",
        help="drop images whose sides differ by more than this factor",
    )
    parser.add_argument(
        "--test-fraction",
        type=_fraction,
        default=0.0,
        metavar="F",
        help="put this share of the images, chosen by a digest of the key, into a split named test",
    )


def _convert_folder(args: Any) -> int:
    root = args.input.resolve()
    source = args.source or root.name or "images"
    settings = {
        "kind": args.kind,
        "input": str(root),
        "source": source,
        "split": args.split,
        "label_from": args.label_from,
        "captions": args.captions,
        "shards": args.shards,
        "images_per_shard": None if args.shards else args.images_per_shard,
        "max_side": args.max_side,
        "min_side": args.min_side,
        "max_aspect": args.max_aspect,
        "test_fraction": args.test_fraction,
    }
    if not root.is_dir():
        list_folder(root)  # says what is wrong with it, before anything is made

    def plan() -> converter.Dealt:
        progress = Progress(None, "listing", "images")
        units = list_folder(root, progress.update)
        progress.close()
        return _deal(units, args)

    continued = converter.prepare(args.output, settings, plan)
    if continued:
        print(f"continuing {args.output} by the plan made when it was begun", file=sys.stderr)
    reader = FolderReader(str(root), source, args.label_from, args.captions)
    rules = converter.Rules(args.max_side, args.min_side, args.max_aspect)
    progress = Progress(converter.planned(args.output), "converting", "images")
    started = False

    def update(n: int) -> None:
        nonlocal started
        if started:
            progress.update(n)
        else:  # what was finished before says nothing about the speed
            started, progress.done = True, n
            progress.resume()

    try:
        summaries = converter.run_local(args.output, reader, rules, args.workers, update)
    except KeyboardInterrupt:
        progress.close()
        print("stopped; the same command continues", file=sys.stderr)
        return cli.EXIT_INTERRUPTED
    progress.close()
    for summary in summaries.values():
        print(_table(summary))
    if not any(summary["kept"] for summary in summaries.values()):
        raise UserError(f"--input {args.input}: no usable image; {args.output} holds empty shards")
    return 0


def _deal(units: Sequence[converter.Unit], args: Any) -> dict[str, list[list[converter.Unit]]]:
    """Splits and shards. A test set never takes all, and takes one image at least."""
    parts: dict[str, list[converter.Unit]] = {args.split: list(units)}
    if args.test_fraction:
        test = [unit for unit in units if _draw(unit["path"]) < args.test_fraction]
        rest = [unit for unit in units if _draw(unit["path"]) >= args.test_fraction]
        if not test or not rest:
            raise UserError(
                f"--test-fraction {args.test_fraction:g}: {len(units)} images are too few to split"
            )
        parts = {args.split: rest, "test": test}
    per_shard = args.images_per_shard
    if args.shards:
        per_shard = -(-len(parts[args.split]) // args.shards)
    dealt = {}
    for split, mine in parts.items():
        wanted = args.shards if args.shards and split == args.split else -(-len(mine) // per_shard)
        dealt[split] = converter.deal(mine, max(1, min(wanted, len(mine))))
    return dealt


def _draw(path: str) -> float:
    """A number in [0, 1) that only the path decides."""
    return int.from_bytes(hashlib.sha256(os.fsencode(path)).digest()[:8], "big") / 2**64


def _table(summary: Mapping[str, Any]) -> str:
    """The summary for the eye."""
    lines = [
        f"{summary['split']}: {summary['kept']:,} of {summary['inputs']:,} images kept in "
        f"{summary['shards']} shards, {summary['bytes'] / 1e6:,.1f} MB"
        + (f", {summary['reencoded']:,} shrunk" if summary["reencoded"] else "")
        + (f", {summary['captioned']:,} with captions" if summary["captioned"] else "")
    ]
    for reason, row in summary["dropped"].items():
        examples = ", ".join(row["examples"]) + (
            ", ..." if row["count"] > len(row["examples"]) else ""
        )
        lines.append(f"  dropped {row['count']:>8,}  {reason}: {examples}")
    for title, name in (("shorter side", "shorter_side"), ("aspect", "aspect")):
        if summary[name]:
            bins = "   ".join(f"{key}: {n:,}" for key, n in summary[name].items())
            lines.append(f"  {title:12} {bins}")
    if summary["labels"]:
        common = sorted(summary["labels"].items(), key=lambda item: (-item[1], item[0]))
        shown = ", ".join(f"{name} {n:,}" for name, n in common[:8])
        lines.append(f"  {len(common)} labels   {shown}{', ...' if len(common) > 8 else ''}")
    return "\n".join(lines)


def _positive(text: str) -> int:
    return _number(text, int, 1, None)


def _natural(text: str) -> int:
    return _number(text, int, 0, None)


def _aspect(text: str) -> float:
    return _number(text, float, 1.0, None)


def _fraction(text: str) -> float:
    return _number(text, float, 0.0, 0.9)


def _number(text: str, kind: type, low: float, high: float | None) -> Any:
    value = kind(text)  # argparse turns a ValueError into its own one-line error
    if not value >= low or (high is not None and value > high):
        raise ValueError
    return value


def _name(text: str) -> str:
    if not text.replace("_", "").isalnum():
        raise ValueError
    return text


# argparse names the type in its message: "invalid positive whole number value: '0'".
_positive.__name__, _natural.__name__ = "positive whole number", "whole number"
_aspect.__name__, _fraction.__name__ = "ratio (1 or more)", "share (0 to 0.9)"
_name.__name__ = "name (letters, digits, _)"


if __name__ == "__main__":
    cli.run(main)
