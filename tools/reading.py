#!/usr/bin/env python3
"""Draws characters and words in many fonts: a set that asks whether a network can read.

    python tools/reading.py --output reading [--cache DIR]              8 MB of downloads

Leaves the folders characters (0 to 9, A to Z) and words (40 of three and four letters) with the
shards train-* and test-*, for the rows of configs/evals/reading.py:

    webssl evaluate --model PATH --evals reading:folder=reading

Fonts: 22 families of the typeface-* packages of npm (OFL and Apache 2.0); six of them are in the
test images and in no training image. The same seed gives the same images with the same Pillow. Exit
codes: 0 done, 2 bad input.
"""

from __future__ import annotations

from pathlib import Path

from webssl_jax import cli
from webssl_jax.corpus import drawing, reading, texts
from webssl_jax.corpus.mini_web import packages


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
    parser.add_argument(
        "--train", type=int, default=80, metavar="N", help="images of each text (80)"
    )
    parser.add_argument(
        "--test", type=int, default=30, metavar="N", help="images of each text (30)"
    )
    parser.add_argument("--side", type=int, default=64, metavar="PX", help="of them (64)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    least = {"train": 1, "test": 1, "side": 16, "seed": 0}
    there = any(args.output.glob("*/*.arrayrecord"))
    folders = [args.output / kind for kind in texts.KINDS]
    cache = drawing.prepare(args, least, there, "records", folders)
    packages.download_shown(reading.PACKAGES, cache)
    fonts = reading.read(cache)
    seed = 4 * args.seed
    for kind, said in texts.KINDS.items():
        for part, each in (("train", args.train), ("test", args.test)):
            reading.write(args.output / kind, part, kind, fonts[part], each, args.side, seed)
            seed += 1
        print(
            f"{args.output / kind}: {len(said)} texts, {args.train * len(said):,} images for "
            f"training, {args.test * len(said):,} for the test"
        )
    return 0


if __name__ == "__main__":
    cli.run(main)
