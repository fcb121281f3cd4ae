#!/usr/bin/env python3
"""Draws what a checkpoint, or weights from elsewhere, see in images.

    python tools/pictures.py --workdir RUN [--step N] --output DIR [--images FOLDER_OR_SHARDS]
    python tools/pictures.py --weights FILE_OR_FOLDER --output DIR [--images FOLDER_OR_SHARDS]

Writes DIR/NAME.png for each picture: reconstruction (masked autoencoders with their decoder), pca
(of patch features: over all images, in each image, of the foreground), attention (of the CLS token
in the last block, head by head), neighbours (the nearest images in feature space), norms (a
histogram of token norms, with outliers) and, of CLIP, similarity (of images and captions, all to
all), image_to_text and text_to_image (what each finds first among --candidates). --weights takes a
.pth or .safetensors file or a folder of transformers. --size draws at another resolution than that
of training: positions are interpolated.

Exit codes: 0 done · 2 bad input or a full disk, one line.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import NamedTuple

from webssl_jax import cli
from webssl_jax.config import MOST_PICTURES, UserError
from webssl_jax.weights import given


def _parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(description=__doc__)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--workdir", help="a run")
    which.add_argument("--weights", help="a .pth or .safetensors file, or a transformers folder")
    parser.add_argument(
        "--step", type=int, help="which checkpoint of the run; by default the newest"
    )
    given.add_flags(parser)
    parser.add_argument(
        "--images",
        help="a folder of images (folders in it are labels), or shards as config.data.train names "
        "them; by default the run's test images, or corpus:test",
    )
    parser.add_argument("--output", required=True, help="folder for the pictures")
    parser.add_argument("--pictures", default="all", help="names with commas; by default all")
    parser.add_argument("--size", type=int, help="side of the images in pixels")
    parser.add_argument("--count", type=int, default=8, help="images shown on a sheet")
    parser.add_argument(
        "--candidates",
        type=int,
        default=256,
        help="images that neighbours and norms are taken from",
    )
    return parser


cli.help_early(_parser, __name__)

import jax
import numpy as np
from ml_collections import ConfigDict

from webssl_jax import runs
from webssl_jax.data.image_folder import open_images
from webssl_jax.evaluators.pictures import (
    ModelPictures,
    available,
    choose,
    images_needed,
    read_images,
)
from webssl_jax.evaluators.text_pictures import read_pictured
from webssl_jax.model import Model, Origin, load
from webssl_jax.sharding import mesh as meshes
from webssl_jax.visuals import save_png


class Subject(NamedTuple):
    """What is looked at. ``own``: pictures that its training method draws itself. ``images``: to
    look at when none are given."""

    model: Model
    own: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]
    own_names: tuple[str, ...]
    images: str


def main(argv: list[str] | None = None) -> int:
    """The entry point. Returns an exit code of cli.py."""
    args = _parser().parse_args(argv)
    if args.step is not None and not args.workdir:
        raise UserError("--step: goes with --workdir; a file of weights has no steps")
    if given.options(args) and not args.weights:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given.options(args))
        raise UserError(f"{flags}: goes with --weights; a run knows it")
    if not 1 <= args.count <= MOST_PICTURES:
        raise UserError(f"--count {args.count}: must lie between 1 and {MOST_PICTURES}")
    if args.candidates < 2:
        raise UserError(f"--candidates {args.candidates}: must be at least 2")

    mesh = meshes.create(ConfigDict({"replica": 1, "fsdp": -1, "tensor": 1}))
    subject = _run(args, mesh) if args.workdir else _weights(args, mesh)
    model = subject.model
    known = (*subject.own_names, *available(model.networks))
    names = choose(args.pictures, known, "--pictures")
    _check_size(model, args.size)
    view = model.preprocess if args.size is None else model.preprocess.at(args.size)
    source = open_images(args.images or subject.images, "--images")
    limit = images_needed(names, args.count, args.candidates)
    images = read_images(source, view, limit)
    pairs = read_pictured(source, view, names, args.candidates)
    print(f"{model.origin.name}: {len(images.pixels):,} of {len(source):,} images", flush=True)
    output = pathlib.Path(args.output)
    try:  # before the work, not after it
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {output}: cannot be made ({error.strerror})") from error
    drawing = ModelPictures(images, names, args.count, pairs=pairs)
    drawn = drawing.draw(model)
    if any(name in subject.own_names for name in names):
        drawn |= subject.own(drawing.batch)
    for name, picture in drawn.items():
        path = output / f"{name}.png"
        save_png(path, picture)
        print(f"  {path}  {picture.shape[1]} x {picture.shape[0]}")
    if not model.networks.decoder and not subject.own_names:
        print("  no reconstruction: these weights are an encoder without a decoder")
    return 0


def _run(args, mesh: jax.sharding.Mesh) -> Subject:
    run = runs.load_run(args.workdir, args.step, mesh)
    model = Model.of(run.method, run.variables, Origin(args.workdir, run.step))

    def own(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return run.method.pictures(run.variables, batch, jax.random.key(0))

    images = run.config.pictures.source or run.config.data.train
    return Subject(model, own, run.method.picture_names, images)


def _weights(args, mesh: jax.sharding.Mesh) -> Subject:
    model = load(args.weights, mesh=mesh, **given.options(args))
    return Subject(model, lambda batch: {}, (), "corpus:test")


def _check_size(model: Model, size: int | None) -> None:
    if size is None:
        return
    if size < 1:
        raise UserError(f"--size {size}: must be a positive number of pixels")
    try:
        model.networks.encoder.grid_of(size, size)
    except ValueError as error:
        raise UserError(f"--size {size}: {error}; give a multiple of the patch size") from error


if __name__ == "__main__":
    cli.run(main)
