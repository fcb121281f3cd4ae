#!/usr/bin/env python3
"""Measures a train step on the CPU, ours against PyTorch's, in turns.

    git clone https://github.com/facebookresearch/dinov2 /tmp/d2
    git -C /tmp/d2 checkout b8931f7
    pip install torch==2.13.0
    python tools/bench_step.py --dinov2 /tmp/d2
    python tools/bench_step.py --method mae     # needs transformers, and no checkout
    python tools/bench_step.py --method clip    # the same

``dino``: ViT-S/14 with SwiGLU and LayerScale, 2 crops of 112 and 4 of 56 pixels, 16 images, 8192
prototypes in each of two heads (hidden 2048, bottlenecks 384 and 256), stochastic depth 0.4,
float32. ``mae``: ViT-S/16 with a decoder of 8 x 512, 224 pixels, 16 images, float32. ``clip``: the
tiny towers of ``configs/clip.py:size=tiny``, 48 pixels, texts of 77 tokens, 128 pairs, float32.
Sizes can be changed (``--config.model.depth=4``), and both workers follow.

    ours    webssl_jax.train_step, as training runs it on one device: copy of the uint8 batch,
            normalisation, masks, losses, gradients, clipping, guard, AdamW, teacher, all metrics;
            memory as training keeps it (cpu_memory.py)
    torch   dino: the original's modules (ViT, heads, DINO, iBOT and KoLeo losses, parameter groups)
            put together as in its ssl_meta_arch.py and train.py: teacher, student, losses,
            backward, clipping by module, AdamW and the teacher's average, these two ``foreach`` as
            there. Without xFormers, which is not for CPUs, its attention is torch's
            scaled_dot_product_attention, and each size of crop goes through the network by itself.
            mae: ViTMAEForPreTraining of transformers, backward, AdamW (``foreach``)
            clip: CLIPModel of transformers with its loss, backward, AdamW (``foreach``), the scale
            clamped

What the torch side has for free: its batch is normalised float32 and its masks are drawn, once,
before the clock starts. ``--fused-adamw`` gives it torch's fused AdamW instead of the original's.

Both start from the same weights. Before the clock starts, their loss terms on the same batch and
masks, without stochastic depth, must agree, and their numbers of trained parameters must be equal.
Each side has a process of its own with all cores, and is idle while the other runs. Compilation and
two steps of warm-up are not counted. Printed are medians over the steps with the lowest and the
highest; the ratio is that of the medians of each round.

On a machine that is busy with other work, threads that share a step wait for each other, torch's by
spinning, which its CPU seconds count. One core has nobody to wait for, so that the CPU seconds of

    taskset -c 0 python tools/bench_step.py --dinov2 /tmp/d2

tell there how much work each side does.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from webssl_jax import cli, cpu_memory
from webssl_jax.config import UserError
from webssl_jax.telemetry.bench_worker import BenchWorker, format_range, median_range

_VIT_S = ("global_batch=16", "model.width=384", "model.depth=12", "model.heads=6")
SHAPES = {
    "dino": (
        "web_dino:size=tiny",
        *_VIT_S,
        "model.patch_size=14",
        "model.drop_path=0.4",
        # At 1e-5 fresh CLS tokens differ from image to image by little more than float32's
        # rounding, and so would the two workers' KoLeo terms.
        "model.layer_scale=0.1",
        "method.group_images=16",
        "method.view.global_size=112",
        "method.view.local_size=56",
        "method.view.local_count=4",
        "method.dino_head.prototypes=8192",
        "method.dino_head.hidden=2048",
        "method.dino_head.bottleneck=384",
        "method.ibot_head.prototypes=8192",
        "method.ibot_head.hidden=2048",
        "method.ibot_head.bottleneck=256",
    ),
    "mae": (
        "web_mae:size=tiny",
        *_VIT_S,
        "model.patch_size=16",
        "method.view.image_size=224",
        "method.decoder.width=512",
        "method.decoder.depth=8",
        "method.decoder.heads=16",
    ),
    "clip": ("clip:size=tiny",),
}
_FAMILIES = {"dino": "dinov2-teacher", "mae": "hf-vit-mae", "clip": "hf-clip"}
_WARMUP = 2
_TOLERANCE = 1e-4  # of loss terms, relative


def main(argv: list[str] | None = None) -> int:
    """The entry point. Returns an exit code of cli.py."""
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("--method", choices=SHAPES, default="dino")
    parser.add_argument("--dinov2", metavar="DIR", help="checkout of facebookresearch/dinov2")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of both workers (default: 5)")
    parser.add_argument("--steps", type=int, default=3, help="steps a round (default: 3)")
    parser.add_argument("--fused-adamw", action="store_true", help="torch's fused AdamW")
    parser.add_argument("--json", action="store_true", help="print one JSON object, not a table")
    args, overrides = parser.parse_with_overrides(argv)
    if args.rounds < 1 or args.steps < 1:
        raise UserError("need --rounds and --steps of at least 1")
    _check_torch_side(args)
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XFORMERS_DISABLED"] = "1"
    with tempfile.TemporaryDirectory(prefix="bench_step.") as folder:
        result = _compare(args, overrides, os.path.join(folder, "start.npz"))
    print(json.dumps(result) if args.json else _table(result))
    return 0


def _check_torch_side(args) -> None:
    packages = {"torch": "2.13.0"} | ({"transformers": "5.23.0"} if args.method != "dino" else {})
    for package, version in packages.items():
        if importlib.util.find_spec(package) is None:
            raise UserError(f"the torch side needs {package}: pip install {package}=={version}")
    how = (
        "git clone https://github.com/facebookresearch/dinov2 /tmp/d2 && "
        "git -C /tmp/d2 checkout b8931f7, then --dinov2 /tmp/d2"
    )
    if args.method == "dino" and args.dinov2 is None:
        raise UserError(f"the torch side is the original's own code: {how}")
    if args.method == "dino" and not Path(args.dinov2, "dinov2", "loss").is_dir():
        raise UserError(f"--dinov2 {args.dinov2}: is no checkout of facebookresearch/dinov2: {how}")


def _compare(args, overrides: list[str], start: str) -> dict[str, Any]:
    """Runs the workers in turns."""
    make = {
        "ours": functools.partial(_ours, args.method, overrides, start),
        "torch": functools.partial(_torch, args.method, start, args.dinov2, args.fused_adamw),
    }
    workers: dict[str, BenchWorker] = {}
    facts: dict[str, dict[str, Any]] = {}
    seconds: dict[str, list[list[float]]] = {side: [] for side in make}
    cpu_seconds: dict[str, list[list[float]]] = {side: [] for side in make}
    load = os.getloadavg()[0]
    try:
        for side in make:  # one after the other: the second needs what the first writes
            workers[side] = BenchWorker(_serve, make[side])
            facts[side] = workers[side].receive()
            print(f"{side}: ready", file=sys.stderr)
        ours, torch = facts["ours"], facts["torch"]
        _same_work(ours, torch)
        for number in range(args.rounds):
            for name, side in workers.items():
                wall, cpu = side.ask(args.steps)
                seconds[name].append(wall)
                cpu_seconds[name].append(cpu)
            latest = ", ".join(
                f"{name} {statistics.median(t[-1]):.3f}" for name, t in seconds.items()
            )
            print(f"round {number + 1} of {args.rounds}: {latest} s a step", file=sys.stderr)
    finally:
        for side in workers.values():
            side.stop()
    return {
        "method": args.method,
        "overrides": overrides,
        "images": ours["images"],
        "parameters": ours["parameters"],
        "loss_terms": {"ours": ours["terms"], "torch": torch["terms"]},
        "compile_seconds": ours["compile_seconds"],
        "threads": torch["threads"],
        "load": [round(load, 1), round(os.getloadavg()[0], 1)],
        "seconds": {name: median_range(sum(rounds, [])) for name, rounds in seconds.items()},
        "cpu_seconds": {
            name: median_range(sum(rounds, [])) for name, rounds in cpu_seconds.items()
        },
        "ratio": _ratio(seconds),
        "cpu_ratio": _ratio(cpu_seconds),
    }


def _same_work(ours: dict[str, Any], torch: dict[str, Any]) -> None:
    if ours["parameters"] != torch["parameters"]:
        raise RuntimeError(f"parameters: {ours['parameters']:,} and {torch['parameters']:,}")
    for name, value in ours["terms"].items():
        other = torch["terms"][name]
        if not abs(value - other) <= _TOLERANCE * max(abs(value), abs(other)):  # NaN too
            raise RuntimeError(f"the workers disagree about {name}: {value} and {other}")


def _ratio(seconds: dict[str, list[list[float]]]) -> dict[str, float]:
    """How many times as fast ours is, round by round."""
    rounds = zip(seconds["ours"], seconds["torch"], strict=True)
    return median_range([statistics.median(t) / statistics.median(o) for o, t in rounds])


def _table(result: dict[str, Any]) -> str:
    terms = result["loss_terms"]
    changed = " ".join(result["overrides"]) or "as it is"
    lines = [
        f"{result['method']} ({changed}), {result['images']} images a step, "
        f"{result['parameters']:,} parameters, float32; {result['threads']} threads; machine load "
        f"{result['load'][0]:g} before, {result['load'][1]:g} after; ours compiled in "
        f"{result['compile_seconds']:g} s",
        "",
        "loss terms at the start       ours        torch",
        *(
            f"  {name:24s}  {terms['ours'][name]:10.6f}  {terms['torch'][name]:10.6f}"
            for name in terms["ours"]
        ),
        "",
        "side   seconds a step           CPU seconds a step       images/s",
    ]
    for side in ("ours", "torch"):
        wall, cpu = result["seconds"][side], result["cpu_seconds"][side]
        rate = result["images"] / wall["median"]
        lines.append(f"{side:5s}  {format_range(wall):23s}  {format_range(cpu):23s}  {rate:.4g}")
    lines.append(
        f"ours is {format_range(result['ratio'])} times as fast as torch; by CPU time "
        f"{format_range(result['cpu_ratio'])} times"
    )
    return "\n".join(lines)


def _ours(method: str, overrides: list[str], start: str) -> Ours:
    cpu_memory.keep()
    return Ours(method, overrides, start)


def _serve(pipe, make: Callable[[], Any]) -> None:
    """The process of one side: so many steps for every number received, until 0."""
    side = make()
    for _ in range(_WARMUP):
        side.step()
    pipe.send(side.facts)
    while steps := pipe.recv():
        wall, cpu = [], []
        for _ in range(steps):
            began, cpu_began = time.perf_counter(), time.process_time()
            side.step()
            wall.append(time.perf_counter() - began)
            cpu.append(time.process_time() - cpu_began)
        pipe.send((wall, cpu))


# ----------------------------------------------------------------------------------------- ours


class Ours:
    """Our step. Writes to ``start`` what the other side starts from: its weights by their names
    (``weight.NAME``), its batch, and its ``shape`` in JSON."""

    def __init__(self, name: str, overrides: list[str], start: str):
        import jax

        from webssl_jax import config as configs
        from webssl_jax import methods, params, train_state
        from webssl_jax.optim.guard import Guard
        from webssl_jax.optim.optimizer import Optimizer
        from webssl_jax.sharding import mesh as meshes
        from webssl_jax.train_step import jit_train_step, make_train_step, run_schedules, verdict
        from webssl_jax.weights.families import table_of
        from webssl_jax.weights.tables import export

        spec, *shape = SHAPES[name]
        config = configs.load(spec, [*shape, *overrides])
        self.method = methods.create(config)
        optimizer = Optimizer.from_config(config.optim, self.method.tables())
        mesh = meshes.create(config.sharding, jax.devices()[:1])
        size = config.global_batch
        template = train_state.abstract(self.method, optimizer, config.seed, size, mesh)
        state = train_state.create(self.method, optimizer, config.seed, size, mesh)

        rng, spec = np.random.default_rng(0), self.method.batch_spec(size)
        batch = {
            key: rng.integers(0, 256, x.shape, np.uint8)
            for key, x in spec.items()
            if x.dtype == np.uint8
        }
        # Of distortions on the device (method.view.distort_on) 0 is: leave the crop as it is.
        batch |= {
            key: np.zeros(x.shape, x.dtype) for key, x in spec.items() if x.dtype == np.float32
        }
        if "tokens" in spec:
            batch["tokens"] = _texts(rng, self.method.text, size)
        given, theirs = _GIVEN[name](self.method, batch)
        terms = self._terms(state, given)
        self.facts = {
            "images": size,
            "parameters": params.count(state.params),
            "terms": {key: float(value) for key, value in terms.items()},
        }
        table = table_of(_FAMILIES[name], self.method)
        weights = {f"weight.{key}": value for key, value in export(state.params, table)}
        np.savez(start, **weights, **theirs)

        began = time.perf_counter()
        step = make_train_step(
            self.method,
            optimizer,
            Guard.from_config(config.guard),
            run_schedules(config, self.method),
            mesh,
            config.accumulation_steps,
        )
        sharding = meshes.batch_sharding(mesh)
        shapes = {
            key: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
            for key, x in spec.items()
        }
        step = jit_train_step(step, template, mesh).lower(template, shapes, verdict(0, mesh))
        step = step.compile()
        self.facts["compile_seconds"] = round(time.perf_counter() - began, 1)

        def one() -> dict[str, jax.Array]:
            nonlocal state
            state, metrics, _ = step(state, meshes.to_global(batch, mesh), verdict(0, mesh))
            return jax.block_until_ready((state, metrics))[1]

        self.step = one

    def _terms(self, state, batch) -> dict[str, Any]:
        """The loss terms of a fresh state, every image through every block."""
        import jax

        values = {"teacher_temperature": getattr(self.method, "teacher_temperature", None)}
        encoder = dataclasses.replace(self.method.encoder, drop_path=0.0)
        whole = dataclasses.replace(self.method, encoder=encoder)

        def terms(variables):
            rng = jax.random.key(0)
            return whole.loss(*variables, batch, rng, values).terms

        return jax.jit(terms)(state.variables)


def _given_dino(method, batch) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The batch with masks, as our loss takes it and as the original's collate function makes it:
    crop by crop, not image by image."""
    import jax

    images, crops = batch["global_crops"].shape[:2]
    grid = method.encoder.grid_of(*batch["global_crops"].shape[2:4])
    if method.group_images != images:
        raise UserError(
            "the original's group is the batch of one device: give --config.method.group_images "
            f"the value of --config.global_batch, {images}"
        )
    draw = jax.jit(method.masks.draw, static_argnums=(1, 2, 3))
    masks = np.asarray(draw(jax.random.key(0), 1, crops * images, grid))
    masks = masks.reshape(images, crops, -1)

    def by_crop(x: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(x.swapaxes(0, 1)).reshape(-1, *x.shape[2:])

    shape = {
        "encoder": dataclasses.asdict(method.encoder),
        "dino_head": dataclasses.asdict(method.dino_head),
        "ibot_head": dataclasses.asdict(method.ibot_head),
        "local_crops": method.view.local_count,
        "koleo_weight": method.koleo_weight,
        "teacher_temperature": method.teacher_temperature,
        "hidden_rows": method.masks.most(crops * images, masks.shape[-1]),
    }
    theirs = {
        key: by_crop(_normalised(batch[key], method)) for key in ("global_crops", "local_crops")
    }
    theirs |= {"masks": by_crop(masks), "shape": np.array(json.dumps(shape))}
    return batch | {"masks": masks}, theirs


def _given_mae(method, batch) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    from webssl_jax.weights.hf import vit_mae_config

    h, w = method.encoder.grid_of(*batch["image"].shape[1:3])
    noise = np.random.default_rng(1).random((len(batch["image"]), h * w), np.float32)
    theirs = {
        "images": _normalised(batch["image"], method),
        "noise": noise,
        "shape": np.array(json.dumps(vit_mae_config(method))),
    }
    return batch | {"noise": noise}, theirs


def _given_clip(method, batch) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    from webssl_jax.weights.clip import hf_config

    theirs = {
        "images": _normalised(batch["image"], method),
        "tokens": batch["tokens"].astype(np.int64),
        "shape": np.array(json.dumps(hf_config(method))),
    }
    return batch, theirs


def _texts(rng: np.random.Generator, text, count: int) -> np.ndarray:
    """``count`` texts of random length, int32 (count, context): start, ids, end, zeros."""
    start, end = text.vocabulary - 2, text.vocabulary - 1
    tokens = rng.integers(1, start, (count, text.context), np.int32)
    tokens[:, 0] = start
    ends = rng.integers(1, text.context, (count, 1))
    place = np.arange(text.context)
    tokens[place == ends] = end
    tokens[place > ends] = 0
    return tokens


def _torch(method: str, start: str, checkout: str | None, fused: bool) -> Any:
    from webssl_jax.tools import bench_step_torch  # imports torch

    sides = {
        "dino": bench_step_torch.Dino,
        "mae": bench_step_torch.Mae,
        "clip": bench_step_torch.Clip,
    }
    return sides[method](start, checkout, fused)


_GIVEN = {"dino": _given_dino, "mae": _given_mae, "clip": _given_clip}


def _normalised(images: np.ndarray, method) -> np.ndarray:
    """uint8 (..., H, W, 3) to float32 (..., 3, H, W), as the originals' loaders do."""
    mean, std = np.float32(method.mean), np.float32(method.std)
    return np.ascontiguousarray(np.moveaxis((images / np.float32(255) - mean) / std, -1, -3))


if __name__ == "__main__":
    cli.run(main)
