"""What an evaluation needs and costs on a TPU slice that is not here.

    python -m webssl_jax.plan --config web_dino:size=7b,res=518 --slice v5e-64 --eval ROW
        [--evals configs/evals/NAME.py] [--images 1281167] [--test-images 50000] [--classes 1000]
        [--batch 256] [--evals.ROW.key=value ...]

Compiles the programs of the row as ``evaluate`` runs them: the network that makes features, the
training of heads, and what judges them. Plain data parallel, with the parameters cut over all
devices.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from webssl_jax import environment, methods
from webssl_jax import params as params_lib
from webssl_jax.config import UserError, suggest
from webssl_jax.evaluators import suite, work
from webssl_jax.evaluators.work import Program, Size
from webssl_jax.model import Model
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
from webssl_jax.train_state import device_bytes
from webssl_jax.weights.networks import Networks, encoder_of, template_of

# Images of ImageNet-1k's training and validation sets, and its classes.
IMAGENET = Size(images=1_281_167, test_images=50_000, classes=1000, batch=256)
_GIB = 2**30


def programs_of(
    rows: Mapping[str, Mapping[str, Any]], name: str, model: Model, size: Size
) -> list[Program]:
    """What the row ``name`` has the devices do.

    Raises:
      UserError: if there is no such row, or it asks for no features; if numbers do not divide.
    """
    complete = suite.complete(rows)
    if name not in complete:
        hint = suggest(name, complete) if complete else "the config has no rows; give --evals"
        raise UserError(f"--eval {name}: no such row; {hint}")
    kind = suite.find(complete[name]["kind"], f"evals.{name}")
    options = suite.options_of(complete[name], f"evals.{name}")
    if hasattr(kind, "work"):
        return kind.work(options, model, size)
    want = kind.want(options, model.networks)
    if want is None:
        raise UserError(f"--eval {name}: a row of this kind asks for no features")
    shape, batch = model.preprocess.shape, size.batch
    sets = {"training images": size.images, "test images": size.test_images}
    return [work.through(what, model, want, shape, n, batch)[0] for what, n in sets.items() if n]


def abstract_model(networks: Networks, mesh: jax.sharding.Mesh) -> Model:
    """The image encoder of ``networks``, with shapes for parameters, cut over a mesh."""
    shapes = {"encoder": template_of(networks)["encoder"]}
    params = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=sharding),
        shapes,
        rules.shardings(shapes, mesh),
    )
    return Model(networks, params)


def plan_evaluation(
    config: ConfigDict,
    rows: Mapping[str, Mapping[str, Any]],
    name: str,
    slice_: slices.Slice,
    count: int = 1,
    size: Size = IMAGENET,
) -> dict[str, Any]:
    """Compiles the programs of a row for the networks of ``config``.

    Returns:
      The figures, under the keys of ``--json``; hours are None where something does not fit.

    Raises:
      UserError: as :func:`programs_of`, and if there are no images.
    """
    for flag, number, least in (
        ("--images", size.images, 1),
        ("--test-images", size.test_images, 0),
        ("--classes", size.classes, 2),
    ):
        if number < least:
            raise UserError(f"{flag} {number}: must be at least {least}")
    mesh = meshes.create(ConfigDict({"replica": 1, "fsdp": -1, "tensor": 1}), slice_.devices(count))
    if size.batch < 1 or size.batch % mesh.size:
        raise UserError(f"--batch {size.batch}: does not divide over {mesh.size} devices")
    model = abstract_model(Networks.of(methods.create(config)), mesh)
    with nothing_runs():
        programs = programs_of(rows, name, model, size)
    result: dict[str, Any] = {
        "config": config.name,
        "row": name,
        "slice": slice_.name,
        "chips": slice_.chips * count,
        "parameters": params_lib.count(model.params),
        "hbm_gib": slice_.chip.hbm_gib,
        **size._asdict(),
    }
    began = time.process_time()
    known: dict[tuple[Any, ...], dict[str, Any]] = {}
    made: list[dict[str, Any]] = []
    for program in programs:
        # those of training and test images are often one
        leaves, tree = jax.tree.flatten(program.arguments)
        key = (program.function, *leaves, tree)
        if key not in known:
            known[key] = _compile(program, model, slice_, result["chips"])
        made.append(_used(program, known[key]))
    fits = all(one["fits"] for one in made)
    seconds = sum(one["seconds"] for one in made) if fits else None
    seen = sum(one["calls"] * one["images"] for one in made)
    return result | {
        "programs": made,
        "fits": fits,
        "peak_hbm_gib": max(one["peak_hbm_gib"] for one in made),
        "hours": seconds / 3600 if seconds else None,
        "images_per_s": seen / seconds if seconds else None,
        "compile_cpu_s": time.process_time() - began,
        "ignored": list(IGNORED),
        "versions": {name: environment.package_versions()[name] for name in ("jax", "libtpu")},
    }


def _compile(program: Program, model: Model, slice_: slices.Slice, chips: int) -> dict[str, Any]:
    """The figures of a call."""
    mesh = model.mesh
    assert mesh is not None  # shapes have places
    with nothing_runs():
        lowered = program.function.lower(*program.arguments)
    flops = program.images and forward_flops(model.networks, program.shape) * program.images
    found: dict[str, Any] = {"model_flops": flops}
    try:
        compiled = compile_or_refuse(lowered)
    except OutOfMemory as refusal:
        gone = {"seconds": None, "mfu_with_exposed_ici": None}
        error = str(refusal)
        return found | gone | {"fits": False, "peak_hbm_gib": refusal.needs, "error": error}
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert text is not None and memory is not None  # a compiler for TPUs gives both
    counted = cost(text, slice_)
    known = {"model_flops": flops or 1, "global_batch": 1, "chips": chips}
    modelled = speed(counted, slice_, mesh, known, 1)
    return found | {
        "fits": True,
        "error": None,
        "peak_hbm_gib": memory.peak_memory_in_bytes / _GIB,
        "seconds": 1 / modelled["images_per_s"],
        "mfu_with_exposed_ici": modelled["mfu_with_exposed_ici"] if flops else None,
        "unknown_loops": modelled["unknown_loops"],
        "unpriced_kernels": modelled["unpriced_kernels"],
    }


def _used(program: Program, known: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of all calls of a program, beside what else lies on the devices."""
    beside = device_bytes(program.beside) / _GIB
    seconds = known["seconds"] * program.calls if known["fits"] else None
    return {
        "name": program.name,
        "calls": program.calls,
        "images": program.images,
        "shape": list(program.shape),
        **known,
        "seconds": seconds,
        "beside_gib": beside,
        "peak_hbm_gib": known["peak_hbm_gib"] + beside,
    }


def forward_flops(networks: Networks, shape: tuple[int, int]) -> float:
    """Matrix products of one image of (height, width) pixels through the encoder, two a
    multiply-add. Where patches do not divide a side, it is filled up."""
    c = encoder_of(networks)
    height, width = c.grid_of(*(side + -side % c.patch_size for side in shape))
    return c.encode_flops(height * width)


def table(r: Mapping[str, Any]) -> str:
    """The figures for people."""
    head = (
        f"row {r['row']} of {r['config']} ({r['parameters']:,} parameters) on {r['slice']}: "
        f"{r['chips']} chips"
    )
    memory = f"{r['peak_hbm_gib']:.2f} of {r['hbm_gib']:.2f} GiB a device"
    rows = [("fits", f"yes, {memory}" if r["fits"] else f"NO: needs {memory}")]
    for one in r["programs"]:
        text = f"{one['calls']:,} calls"
        if one["images"]:
            height, width = one["shape"]
            text += f" of {one['images']:,} images of {height} x {width}"
        if one["fits"]:
            text += f": {one['seconds'] / 3600:.3g} hours at best"
        text += f", {one['peak_hbm_gib']:.2f} GiB"
        if one["mfu_with_exposed_ici"]:
            text += f", MFU {100 * one['mfu_with_exposed_ici']:.1f}% with exposed ICI"
        rows.append((one["name"], text))
        if one["error"]:
            rows.append(("", one["error"].split("\n")[0]))
    if r["fits"]:
        rows.append(("all", f"{r['hours']:.3g} hours at best, {r['images_per_s']:,.0f} images/s"))
    rows.append(("compiled in", f"{format_seconds(r['compile_cpu_s'])} of CPU"))
    rows += [("left out" if i == 0 else "", text) for i, text in enumerate(r["ignored"])]
    return lines(head, rows)
