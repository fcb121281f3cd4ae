"""Two blocks of a config's encoder, forward and backward, compiled for a TPU slice: the cheap way
to try what may make a whole step faster, before python -m webssl_jax.plan confirms it.

    python tools/plan_blocks.py --config configs/web_mae.py:size=5b,preset=v5p --slice v5p-256
        --tokens 1x257 --images 24 [--explain] [--option NAME=VALUE ...]
        [--config.key.path=value ...]

``--tokens`` says what a block sees of an image: crops x tokens of each, as 2x257,8x50 for Web-DINO
at 224 and 98 pixels, 1x65 for Web-MAE's visible quarter; where positions are rotated (DINOv3), CLS,
registers and a square of patches: 2x261,8x54. Stochastic depth is the config's, and the work that
it saves does not count. Takes about a minute of CPU. The figures are those of plan, of
these blocks alone (docs/plan.md).
"""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from typing import Any

from webssl_jax import cli
from webssl_jax import config as configs
from webssl_jax.config import UserError


def _parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True, help="NAME or FILE.py, and [:key=value,...]")
    parser.add_argument("--slice", required=True, help="as gcloud calls it: v5p-512, v5e-256, ...")
    parser.add_argument("--tokens", default="1x257", help="crops x tokens, with commas between")
    parser.add_argument("--images", type=int, default=24, help="a device")
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--explain", action="store_true", help="as of plan: docs/plan.md")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE")
    return parser


cli.help_early(_parser, __name__)

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from webssl_jax import methods
from webssl_jax.models.blocks import Placed, block_stack, subset_size
from webssl_jax.models.rope import DRAWS, grid_coordinates
from webssl_jax.models.sizes import ViTConfig
from webssl_jax.plan import bundles, command, hlo
from webssl_jax.plan import training as plan
from webssl_jax.sharding import compiler_options, rules, slices
from webssl_jax.sharding import mesh as meshes


def main(argv: list[str] | None = None) -> int:
    """The entry point. Returns 0, or plan's exit code for what does not fit."""
    args, overrides = _parser().parse_with_overrides(argv)
    if not re.fullmatch(r"\d+x\d+(,\d+x\d+)*", args.tokens):
        raise UserError(f"--tokens {args.tokens}: must be as 1x257 or 2x257,8x50")
    crops = [tuple(map(int, crop.split("x"))) for crop in args.tokens.split(",")]
    options, slice_ = command.read_options(args.option), slices.find(args.slice)
    config = configs.load(args.config, overrides)
    group = config.method.get("group_images")
    encoder = dataclasses.replace(
        methods.create(config).encoder,
        depth=args.blocks,
        drop_path_group=group and group * crops[0][0],
    )
    if jax.config.jax_platforms != "cpu":
        jax.config.update("jax_platforms", "cpu")
    mesh = meshes.create(config.sharding, slice_.devices())
    try:
        lowered = lower(encoder, mesh, crops, args.images)
        compiled = plan.compile_or_refuse(lowered, compiler_options.of(mesh) | options)
    except plan.OutOfMemory as refusal:
        print(str(refusal).partition("\n")[0], file=sys.stderr)
        return command.EXIT_DOES_NOT_FIT
    images = args.images * mesh.size
    flops = 0.0
    for count, tokens in crops:
        size = encoder.drop_path_group * count // crops[0][0] if encoder.drop_path_group else 1
        share = subset_size(size, encoder.drop_path) / size
        flops += 3 * images * count * share * encoder.block_flops(tokens)
    known = {"model_flops": flops, "global_batch": images, "chips": slice_.chips}
    text = compiled.as_text()
    kernels = bundles.cycles(hlo.kernels_of(text), slice_)
    r = plan.speed(hlo.cost(text, kernels), slice_, mesh, known, steps=1)
    r |= plan.limit(text, slice_, kernels, r)
    peak = compiled.memory_analysis().peak_memory_in_bytes / 2**30
    for line in (
        f"modelled MFU {r['mfu_modelled']:.3f}, with exposed ICI {r['mfu_with_exposed_ici']:.3f}",
        f"attainable MFU {r['mfu_attainable']:.3f}",
        f"{1e3 * r['compute_s']:.2f} ms, exposed ICI {1e3 * r['exposed_ici_s']:.2f} ms",
        f"executed flops {r['executed_over_model_flops']:.3f} times the model's",
        f"{r['wire_gb']:.3g} GB a device, {r['exposed_gb']:.3g} exposed; peak {peak:.2f} GiB",
        *(f"counted as free: {kernel}" for kernel in r["unpriced_kernels"]),
        *(f"{1e3 * x['seconds']:8.3f} ms  {x['name']}" for x in r["operations"]),
        *([plan.explanation(r)] if args.explain else []),
    ):
        print(line)
    return 0


def lower(
    encoder: ViTConfig, mesh: Mesh, crops: list[tuple[int, int]], images: int
) -> jax.stages.Lowered:
    """The gradient of a mean square of the blocks' output, to parameters and tokens. ``images``: a
    device."""
    cut = meshes.batch_sharding(mesh)
    x = tuple(
        jax.ShapeDtypeStruct(
            (images * mesh.size * count, tokens, encoder.width), encoder.dtype, sharding=cut
        )
        for count, tokens in crops
    )
    x = x if len(x) > 1 else x[0]
    more = positions(encoder, crops)
    stack = block_stack(encoder, train=True, placed=bool(more))
    slots = np.zeros(encoder.depth, int)

    def init():
        tokens = jax.tree.map(lambda t: jnp.zeros(t.shape, t.dtype), x)
        rngs = dict.fromkeys(("params", "drop_path"), jax.random.key(0))
        return {"blocks": stack.init(rngs, (tokens, None), slots, *more)["params"]}

    shapes = jax.eval_shape(init)
    params = jax.tree.map(
        lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s),
        shapes,
        rules.shardings(shapes, mesh),
    )

    def loss(params, x):
        rngs = {"drop_path": jax.random.key(0)}
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            (y, _), _ = stack.apply(
                {"params": params["blocks"]}, (x, None), slots, *more, rngs=rngs
            )
        return sum(jnp.square(t.astype(jnp.float32)).mean() for t in jax.tree.leaves(y))

    out = jax.tree.map(lambda leaf: leaf.sharding, (params, x))
    return jax.jit(jax.grad(loss, argnums=(0, 1)), out_shardings=out).lower(params, x)


def positions(encoder: ViTConfig, crops: list[tuple[int, int]]) -> tuple[Any, ...]:
    """What the blocks are told of their tokens, beside the slots; nothing without rope."""
    if encoder.rope is None:
        return ()
    placed = []
    for _, tokens in crops:
        side = math.isqrt(max(tokens - encoder.prefix, 0))
        if not side or side**2 + encoder.prefix != tokens:
            raise UserError(
                f"--tokens {tokens}: this config rotates positions; must be {encoder.prefix} and a "
                f"square of patches, as {encoder.prefix + 49}"
            )
        placed.append(Placed(grid_coordinates((side, side))))
    moved = np.zeros((encoder.depth, len(crops), DRAWS), np.float32)
    return moved, tuple(placed) if len(placed) > 1 else placed[0]


if __name__ == "__main__":
    cli.run(main)
