#!/usr/bin/env python3
"""Says what is in a set of records, and whether it is whole.

    python tools/inspect_records.py 'SHARDS/train-*.arrayrecord' --verify --sheet sheet.png

Prints counts, bytes, image sizes, formats, captions, sources, labels, annotations, duplicate keys
and duplicate images. Every damaged record is named by shard, place in it, key and reason; a shard
that is missing from its set or damaged as a whole is named, and all others are read. Without
--verify that is what cannot be read; with it also images that cannot be decoded or are not of the
size their records say, masks and depth that cannot be decoded or are not of their image's size, and
labels, questions and conversations that are not such.
Exit codes: 0 all is whole, 2 there is damage (or bad input), 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from webssl_jax import cli
from webssl_jax.config import UserError
from webssl_jax.data import inspection, records
from webssl_jax.data.decode import DecodeError, decode_image
from webssl_jax.data.sources import ArrayRecordSource
from webssl_jax.telemetry.progress import Progress

_COLUMNS = 8
_CELL = 256  # the most pixels a sheet shows of an image's side
_SHOWN = 8  # names of a list that may be long


def main(argv: list[str] | None = None) -> int:
    """The entry point. Returns an exit code of cli.py."""
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument(
        "pattern", nargs="+", metavar="PATTERN", help="a glob, a folder or a file; several add up"
    )
    parser.add_argument("--verify", action="store_true", help="decode every image and annotation")
    parser.add_argument(
        "--sheet", type=Path, metavar="FILE.png", help="draw a contact sheet with captions"
    )
    parser.add_argument(
        "--sample",
        type=_positive,
        default=40,
        metavar="N",
        help="images on the sheet, drawn evenly over the sources (default: 40)",
    )
    parser.add_argument("--seed", type=_natural, default=0, metavar="N", help="of the sample")
    parser.add_argument("--workers", type=_positive, default=os.cpu_count(), metavar="N")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)

    source = ArrayRecordSource(args.pattern, max_lost=1.0)
    damages = []
    lost = list(source.lost.values())
    for trouble in [] if args.json else lost:
        print(f"lost: {trouble}", flush=True)

    def on_damage(place: inspection.DamagedPlace) -> None:
        if args.json:
            damages.append(vars(place))
        else:
            print(f"damaged: {place}", flush=True)

    progress = Progress(len(source), "verifying" if args.verify else "reading", "records")
    report = inspection.inspect(
        source,
        verify=args.verify,
        sample=args.sample if args.sheet else 0,
        seed=args.seed,
        workers=args.workers,
        on_damage=on_damage,
        progress=progress.update,
    )
    progress.close()
    facts = report.to_json(source) | {"lost": lost}
    print(json.dumps(facts | {"damages": damages}, indent=1) if args.json else _table(facts))
    if args.sheet:
        _draw_sheet(args.sheet, source, report.tally, args.sample)
    return cli.EXIT_BAD_INPUT if report.damaged or lost else 0


def _draw_sheet(
    path: Path, source: ArrayRecordSource, tally: inspection.Tally, sample: int
) -> None:
    from webssl_jax.visuals import image_grid, save_png  # a second that only who draws should wait

    images, captions = [], []
    indices = inspection.draw(tally, sample)
    for index in indices:
        record = records.decode(source[index])
        try:
            image = decode_image(record.image, min_size=_CELL)
        except DecodeError as error:
            print(f"not drawn: {source.describe(index)}: {error}", file=sys.stderr)
            continue
        image.thumbnail((2 * _CELL, 2 * _CELL))
        images.append(np.asarray(image))
        text = record.captions[0] if record.captions else record.label or record.key
        captions.append(f"{record.source}: {text}" if len(tally.sources) > 1 else text)
    if not images:
        raise UserError(f"--sheet {path}: none of the {len(indices)} sampled images can be drawn")
    names = ", ".join(sorted(tally.sources)[:_SHOWN])
    title = f"{len(images)} of {len(source):,} records from {names}"
    try:
        save_png(path, image_grid(images, _COLUMNS, captions, title))
    except OSError as error:
        raise UserError(f"--sheet {path}: cannot be written: {error.strerror}") from None
    print(f"sheet of {len(images)} images: {path}", file=sys.stderr)


def _table(facts: Mapping[str, Any]) -> str:
    """The facts for the eye."""
    count = facts["whole"]
    shards = "1 shard" if facts["shards"] == 1 else f"{facts['shards']:,} shards"
    if facts["lost"]:
        shards += f", of which {len(facts['lost']):,} cannot be read"
    lines = [
        f"{facts['records']:,} records in {shards}: {count:,} whole, {facts['damaged']:,} damaged"
    ]
    if count:
        lines += [
            f"  images        {facts['image_bytes'] / 1e6:,.1f} MB, on average "
            f"{facts['image_bytes'] / count:,.0f} bytes, at most "
            f"{facts['largest_image_bytes']:,}",
            f"  width         {facts['width']['min']:,} to {facts['width']['max']:,} px",
            f"  height        {facts['height']['min']:,} to {facts['height']['max']:,} px",
            _row("shorter side", facts["shorter_side"]),
            _row("formats", facts["formats"]),
            f"  captions      {facts['captions']:,}",
        ]
        if facts["captions"]:
            lines += [
                _row("per image", facts["captions_per_image"]),
                _row("characters", facts["caption_characters"]),
            ]
        lines.append(_names("sources", facts["sources"]))
        if facts["labels"]:
            lines.append(_names("labels", facts["labels"]))
            lines.append(f"  no label      {facts['unlabelled']:,}")
        lines += [_annotation(*item) for item in facts["annotations"].items()]
        for what in ("keys", "images"):
            lines += _duplicates(what, facts[f"duplicate_{what}"])
    return "\n".join(lines)


def _row(title: str, bins: Mapping[str, int]) -> str:
    return f"  {title:12}  " + "   ".join(f"{name}: {n:,}" for name, n in bins.items())


def _names(title: str, counts: Mapping[str, int]) -> str:
    shown = ", ".join(f"{name} {n:,}" for name, n in list(counts.items())[:_SHOWN])
    more = ", ..." if len(counts) > _SHOWN else ""
    return f"  {title:12}  {len(counts):,}: {shown}{more}"


def _annotation(name: str, facts: Mapping[str, Any]) -> str:
    count = facts["records"]
    formats = ", ".join(f"{kind} {n:,}" for kind, n in facts["formats"].items())
    return (
        f"  annotation    {name}: {count:,} ({facts['share']:.1%} of records), {formats}; "
        f"on average {facts['bytes'] / count:,.0f} bytes, at most {facts['largest_bytes']:,}"
    )


def _duplicates(what: str, found: Mapping[str, Any]) -> list[str]:
    lines = [f"  duplicate {what}: {found['records']:,}"]
    for group in found["examples"]:
        places = (f"{Path(p['shard']).name} {p['record']} ({p['key']})" for p in group)
        lines.append("    " + " = ".join(places))
    return lines


def _positive(text: str) -> int:
    return _at_least(1, text)


def _natural(text: str) -> int:
    return _at_least(0, text)


def _at_least(low: int, text: str) -> int:
    if int(text) < low:  # argparse turns a ValueError into its own one-line error
        raise ValueError
    return int(text)


# argparse names the type in its message: "invalid positive whole number value: '0'".
_positive.__name__, _natural.__name__ = "positive whole number", "whole number"


if __name__ == "__main__":
    cli.run(main)
