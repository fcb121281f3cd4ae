#!/usr/bin/env python3
"""Features of a folder of images, or of records, as parquet files.

    python tools/features.py --model PATH --images FOLDER_OR_SHARDS --output DIR
        [--columns cls,patches,embedding] [--dtype float16] [--step N] [--batch N]

PATH is a run, or weights of any known family. DIR gets part-00000-of-0000N.parquet: a row an image,
in the order of the input (paths sorted, or records as they lie), with its index, name, label and
the columns asked: cls (the CLS token), patches (their mean) and, of CLIP, embedding (L2-normalised,
of the space that images and texts share). An image that cannot be read keeps its row: its features
are null, and the column problem says why. The same command goes on after a kill.

    pyarrow.parquet.read_table(DIR), pandas.read_parquet(DIR), duckdb: FROM 'DIR/*.parquet'

All devices of this machine are used. Exit codes: 0 done, also with gaps, which are counted · 2 bad
input or a full disk, one line.
"""

from __future__ import annotations

import pathlib

from webssl_jax import cli
from webssl_jax.config import UserError


def _parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="a run, or a weight file or folder")
    parser.add_argument("--step", type=int, help="a run's checkpoint; by default the newest")
    parser.add_argument("--heads", type=int, help="of weights that do not say it")
    parser.add_argument(
        "--images", required=True, help="a folder of images, or shards as config.data.train"
    )
    parser.add_argument("--output", required=True, help="folder for the parquet files")
    parser.add_argument("--columns", default="cls,patches", help="with commas")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16"))
    parser.add_argument("--batch", type=int, default=256, help="images a call")
    parser.add_argument("--threads", type=int, default=16, help="that read and decode")
    return parser


cli.help_early(_parser, __name__)

from ml_collections import ConfigDict

from webssl_jax import workdirs
from webssl_jax.data.image_folder import open_images
from webssl_jax.evaluators import feature_files
from webssl_jax.model import load
from webssl_jax.sharding import mesh as meshes


def main(argv: list[str] | None = None) -> int:
    """The entry point. Returns an exit code of cli.py."""
    args = _parser().parse_args(argv)
    for flag in ("batch", "threads"):
        if getattr(args, flag) < 1:
            raise UserError(f"--{flag} {getattr(args, flag)}: must be at least 1")
    source = open_images(args.images, "--images")
    mesh = meshes.create(ConfigDict({"replica": 1, "fsdp": -1, "tensor": 1}))
    heads = {} if workdirs.is_run(args.model) and args.heads is None else {"heads": args.heads}
    model = load(args.model, args.step, mesh, **heads)
    columns = feature_files.choose(args.columns, model, "--columns")
    print(f"{model.origin.name}: {', '.join(columns)} of {len(source):,} images", flush=True)
    asked = feature_files.Asked(columns, args.dtype, args.batch, args.threads)
    made = feature_files.write(model, source, pathlib.Path(args.output), asked)
    print(f"  {args.output}  {made.rows:,} rows in {made.parts:,} parts, {made.gaps:,} gaps")
    return 0


if __name__ == "__main__":
    cli.run(main)
