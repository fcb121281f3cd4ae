#!/usr/bin/env python3
"""Draws rooms with furniture and the depth of each pixel, out of 3D models that a Debian package
ships: a depth set where no other can be had.

    python tools/rooms.py --output rooms [--cache DIR]               120 MB of downloads

Leaves the shards train-* and test-*, for rows of depth:

    webssl evaluate --model PATH --evals.r.kind=depth --evals.r.layout=plain \\
        --evals.r.train='rooms/train-*' --evals.r.test='rooms/test-*' --evals.r.size='(126, 168)'

Models: sweethome3d-furniture (CC-BY, CC0, Free Art; the package's copyright file says whose). What
stands in test rooms is in no training room, nor is a thing of the same name. The same seed gives
the same rooms. Exit codes: 0 done, 2 bad input.
"""

from __future__ import annotations

from pathlib import Path

from webssl_jax import cli
from webssl_jax.corpus import drawing, rooms
from webssl_jax.corpus.mini_web import packages
from webssl_jax.corpus.mini_web.catalogue import BY_NAME
from webssl_jax.telemetry.progress import Progress


def main(argv: list[str] | None = None) -> int:
    """The entry point. Returns an exit code of cli.py."""
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        help="keep the downloaded package here (default: OUTPUT/packages)",
    )
    parser.add_argument("--train", type=int, default=400, metavar="N", help="rooms (400)")
    parser.add_argument("--test", type=int, default=80, metavar="N", help="rooms (80)")
    parser.add_argument("--width", type=int, default=168, metavar="PX", help="of them (168)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    least = {"train": 1, "test": 1, "width": 32, "seed": 0}
    there = any(args.output.glob("*.arrayrecord"))
    folders = [args.output]
    cache = drawing.prepare(args, least, there, "records", folders)
    packages.download_shown(BY_NAME[rooms.FURNITURE].packages, cache)
    models = rooms.read(cache)
    progress = Progress(args.train + args.test, "drawing", "rooms")
    for number, (part, count) in enumerate((("train", args.train), ("test", args.test))):
        seed = 2 * args.seed + number
        rooms.write(args.output, part, models[part], count, args.width, seed, progress.update)
    progress.close()
    print(f"{args.output}: {args.train:,} rooms for training, {args.test:,} for the test")
    return 0


if __name__ == "__main__":
    cli.run(main)
