"""What extracting features for an evaluation needs and costs on a TPU slice that is not here.

    python -m webssl_jax.plan --config web_dino:size=7b,res=518 --slice v5e-64 --eval ROW
        [--evals configs/evals/NAME.py] [--images 1281167] [--batch 256]

Compiles the forward pass that the row asks for, as ``evaluate`` runs it: plain data parallel, with
the parameters cut over all devices.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from webssl_jax import config as configs
from webssl_jax import methods
from webssl_jax import params as params_lib
from webssl_jax.config import UserError, suggest
from webssl_jax.evaluators import suite
from webssl_jax.model import Model, feature_program
from webssl_jax.models.features import Want
from webssl_jax.plan.training import (
    IGNORED,
    OutOfMemory,
    compile_or_refuse,
    cost,
    lines,
    nothing_runs,
    speed,
)
from webssl_jax.sharding import mesh as meshes
from webssl_jax.sharding import rules, slices
from webssl_jax.telemetry.progress import format_seconds
from webssl_jax.weights.networks import Networks, encoder_of, template_of

IMAGENET_TRAIN = 1_281_167
_GIB = 2**30


def want_of(rows: Mapping[str, Mapping[str, Any]], name: str, networks: Networks) -> Want:
    """Which features the row ``name`` asks for.

    Raises:
      UserError: if there is no such row, or it asks for none.
    """
    complete = suite.complete(rows)
    if name not in complete:
        hint = suggest(name, complete) if complete else "the config has no rows; give --evals"
        raise UserError(f"--eval {name}: no such row; {hint}")
    kind = suite.find(complete[name]["kind"], f"evals.{name}")
    want = kind.want(suite.options_of(complete[name], f"evals.{name}"), networks)
    if want is None:
        raise UserError(f"--eval {name}: a row of this kind asks for no features")
    return want


def plan_extraction(
    config: ConfigDict,
    want: Want,
    slice_: slices.Slice,
    count: int = 1,
    batch: int = 256,
    images: int = IMAGENET_TRAIN,
) -> dict[str, Any]:
    """Compiles the extraction for the networks of ``config``, at the size of their evaluation.

    Args:
      batch: images a call, over all devices; a multiple of them.
      images: how many there are, for the time.

    Returns:
      The figures, under the keys of ``--json``; hours are None where it does not fit.

    Raises:
      UserError: if the batch does not divide over the devices, or there are no images.
    """
    method = methods.create(config)
    networks = Networks.of(method)
    mesh = meshes.create(ConfigDict({"replica": 1, "fsdp": -1, "tensor": 1}), slice_.devices(count))
    if batch < 1 or batch % mesh.size:
        raise UserError(f"--batch {batch}: does not divide over {mesh.size} devices")
    if images < 1:
        raise UserError(f"--images {images}: must be at least 1")
    shapes = {"encoder": template_of(networks)["encoder"]}
    laid = rules.shardings(shapes, mesh)
    params = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=sharding),
        shapes,
        laid,
    )
    side = method.preprocess.shape[0]  # every method makes squares
    pixels = jax.ShapeDtypeStruct(
        (batch, side, side, 3), jnp.uint8, sharding=meshes.batch_sharding(mesh)
    )
    flops = forward_flops(networks, side) * batch
    result: dict[str, Any] = {
        "config": config.name,
        "slice": slice_.name,
        "chips": slice_.chips * count,
        "pixels": side,
        "want": {"cls": want.cls, "patches": want.patches, "blocks": list(want.blocks)},
        "batch": batch,
        "images": images,
        "parameters": params_lib.count(shapes),
        "hbm_gib": slice_.chip.hbm_gib,
        "model_flops": flops,
    }
    began = time.process_time()
    with nothing_runs():
        lowered = feature_program(mesh, want).lower(Model(networks, params), pixels)
    try:
        compiled = compile_or_refuse(lowered)
    except OutOfMemory as refusal:
        gone = dict.fromkeys(("images_per_s", "hours", "mfu_with_exposed_ici"))
        fits = {"fits": False, "peak_hbm_gib": refusal.needs, "error": str(refusal)}
        return result | gone | fits | {"compile_cpu_s": time.process_time() - began}
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert text is not None and memory is not None  # a compiler for TPUs gives both
    known = {"model_flops": flops, "global_batch": batch, "chips": result["chips"]}
    modelled = speed(cost(text, slice_), slice_, mesh, known, -(-images // batch))
    return result | {
        "fits": True,
        "error": None,
        "peak_hbm_gib": memory.peak_memory_in_bytes / _GIB,
        "images_per_s": modelled["images_per_s"],
        "hours": 24 * modelled["days"],
        "mfu_with_exposed_ici": modelled["mfu_with_exposed_ici"],
        "compile_cpu_s": time.process_time() - began,
        "ignored": list(IGNORED),
        "versions": {name: configs.package_versions()[name] for name in ("jax", "libtpu")},
    }


def forward_flops(networks: Networks, side: int) -> float:
    """Matrix products of one image of ``side`` pixels through the encoder, two a multiply-add."""
    c = encoder_of(networks)
    height, width = c.grid_of(side, side)
    tokens = height * width + c.num_registers + (c.pooling == "cls")
    return 2.0 * height * width * c.patch_size**2 * 3 * c.width + c.block_flops(tokens)


def table(r: Mapping[str, Any]) -> str:
    """The figures for people."""
    blocks = f", blocks {r['want']['blocks']}" if r["want"]["blocks"] else ""
    wanted = f"{'CLS, ' if r['want']['cls'] else ''}patches: {r['want']['patches']}{blocks}"
    head = (
        f"features of {r['config']} ({r['parameters']:,} parameters) at {r['pixels']} pixels on "
        f"{r['slice']}: {r['chips']} chips"
    )
    rows = [("wanted", wanted), ("images a call", f"{r['batch']:,}")]
    memory = f"{r['peak_hbm_gib']:.2f} of {r['hbm_gib']:.2f} GiB a device"
    if not r["fits"]:
        return lines(
            head, [("fits", f"NO: needs {memory}"), *rows, ("", r["error"].split("\n")[0])]
        )
    rows = [("fits", f"yes, {memory}"), *rows]
    rows += [
        ("modelled MFU", f"{100 * r['mfu_with_exposed_ici']:.1f}% with exposed ICI"),
        ("at best", f"{r['images_per_s']:,.0f} images/s"),
        (f"{r['images']:,} images", f"{r['hours']:.3g} hours at best"),
        ("compiled in", f"{format_seconds(r['compile_cpu_s'])} of CPU"),
    ]
    rows += [("left out" if i == 0 else "", text) for i, text in enumerate(r["ignored"])]
    return lines(head, rows)
