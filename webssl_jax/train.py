"""Trains any method from a config. Read it from top to bottom: that is what happens in a run.

    python -m webssl_jax.train --config configs/web_mae.py:size=300m --workdir DIR
        [--config.key.path=value ...]

The same command started again continues where the run stopped, with bit-identical losses on the
same hardware. Exit codes are in cli.py. The method's name does not occur here: see methods/base.py
for what a method is.
"""

from __future__ import annotations

import json
import logging
import os
import pathlib
import signal
import time

import jax
import numpy as np
from jax.experimental import multihost_utils

from webssl_jax import checkpoints, cli, methods, params, train_state
from webssl_jax import config as configs
from webssl_jax.config import ConfigError, UserError
from webssl_jax.data import records
from webssl_jax.data.pipeline import TrainLoader
from webssl_jax.data.sources import ArrayRecordSource
from webssl_jax.evaluators.runs import RunEvaluation
from webssl_jax.optim import schedules
from webssl_jax.optim.optimizer import Optimizer
from webssl_jax.sharding import distributed, rules
from webssl_jax.sharding import mesh as meshes
from webssl_jax.telemetry.progress import Progress, format_seconds
from webssl_jax.telemetry.throughput import Throughput
from webssl_jax.telemetry.writer import MetricWriter, read_rows
from webssl_jax.train_step import jit_train_step, make_train_step
from webssl_jax.visuals import crop_sheet, loss_curves

log = logging.getLogger("webssl_jax")


def main() -> int:
    """The entry point. Returns an exit code of cli.py."""
    # ------------------------------------------------ flags and config: errors before anything else
    parser = cli.ArgumentParser(prog="python -m webssl_jax.train", description=__doc__)
    parser.add_argument("--config", required=True, help="configs/NAME.py[:key=value,...]")
    parser.add_argument("--workdir", required=True, help="folder of the run; seen by all hosts")
    distributed.add_flags(parser)
    args, overrides = parser.parse_with_overrides()
    if "://" in args.workdir:
        raise UserError(f"--workdir {args.workdir}: give a path; mount buckets with gcsfuse")
    config = configs.load(args.config, overrides)
    method = methods.create(config)
    if config.accumulation_steps > 1 and method.couples_batch:
        raise ConfigError(
            f"config.accumulation_steps = {config.accumulation_steps}: the loss of "
            f"{config.method.name} couples the images of a batch, so accumulation would change it; "
            "use 1"
        )
    total_steps = configs.total_steps(config)

    # ------------------------------------------------------------------------ processes and devices
    distributed.initialize(args)
    is_first = jax.process_index() == 0
    cli.log_to_stderr(logging.INFO if is_first else logging.ERROR)
    mesh = meshes.create(config.sharding)
    meshes.check_batch(config, mesh)
    workdir = pathlib.Path(args.workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    lock = checkpoints.WorkdirLock(workdir) if is_first else None
    log.info(
        "%s: %d step(s) of %d images on %d %s device(s) in %d process(es), mesh %s",
        config.name,
        total_steps,
        config.global_batch,
        jax.device_count(),
        jax.devices()[0].device_kind,
        jax.process_count(),
        dict(mesh.shape),
    )

    source = ArrayRecordSource(config.data.train)
    log.info("training on %s", source)

    # ---------------------------------------------------------------------------- state, or restore
    optimizer = Optimizer.from_config(config.optim, method.tables())
    template = train_state.abstract(method, optimizer, config.seed, config.global_batch, mesh)
    optimizer.check(template.params)
    rules.check(template.params, mesh, config.sharding.max_unsharded_fraction)
    _refuse_another_run(workdir, config)
    checkpointer = checkpoints.Checkpointer(
        workdir,
        keep_last=config.checkpoint.keep_last,
        keep_every_steps=config.checkpoint.keep_every_steps,
    )
    state = _restore_or_init(config, checkpointer, template, method, optimizer, mesh)
    start = int(state.step)
    if start >= total_steps:
        log.info(
            "finished: step %d of %d is saved in %s; nothing to do",
            start,
            total_steps,
            checkpointer.directory,
        )
        return 0
    if is_first:
        _write_json(workdir / "config.json", configs.resolved(config))
        _write_json(workdir / "environment.json", configs.environment())

    # -------------------------------------------------------------------------- data and evaluation
    loader = TrainLoader(
        source,
        method.train_view(),
        global_batch=config.global_batch,
        seed=config.seed,
        row_range=meshes.local_rows(mesh, config.global_batch),
        start_step=start,
        workers=config.data.workers,
        threads=config.data.threads,
        read_ahead=config.data.read_ahead,
    )
    evaluation = None
    if config.eval.train:
        evaluation = RunEvaluation(config.eval, method, mesh, workdir, threads=config.data.threads)
    # A fresh run starts before step 0, so that the rows of an earlier one that left no checkpoint
    # go too.
    writer = MetricWriter(
        workdir, step=start if start else -1, enabled=is_first, tensorboard=config.log.tensorboard
    )

    # ------------------------------------------------------------- the step, compiled before step 0
    method_schedules = method.schedules(total_steps, config.global_batch)
    warmup = configs.steps(config.optim, "warmup", config)
    step_fn = make_train_step(
        method,
        optimizer,
        {
            "learning_rate": schedules.warmup_cosine(
                config.optim.lr, config.optim.final_lr, total_steps, warmup
            ),
            "weight_decay": schedules.warmup_cosine(
                config.optim.weight_decay, config.optim.final_weight_decay, total_steps
            ),
            **method_schedules,
        },
        mesh,
        config.accumulation_steps,
    )
    began = time.perf_counter()
    spec = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=meshes.batch_sharding(mesh))
        for name, x in method.batch_spec(config.global_batch).items()
    }
    step_fn = jit_train_step(step_fn, template, mesh).lower(template, spec).compile()
    log.info("%s", _memory_report(template, mesh, step_fn, time.perf_counter() - began))

    # ------------------------------------------------------------------------------------- the loop
    stop = _StopRequest()
    meter = Throughput(
        config.global_batch, method.train_flops(), jax.devices()[0].device_kind, jax.device_count()
    )
    picture_rng = jax.random.key(config.seed)

    def look(
        state: train_state.TrainState, step: int, figures: bool, pictures: bool
    ) -> dict[str, float]:
        """Evaluates and draws at this step; returns the figures for its row in metrics.jsonl."""
        out = {}
        if evaluation and figures:
            result = evaluation.run(state.variables, step)
            out = result.metrics()
            log.info(
                "step %d: k-NN top-1 %.3f, linear probe top-1 %.3f (± %.3f)",
                step,
                result.knn.top1,
                result.linear.top1,
                result.linear.se,
            )
        if pictures:
            images = evaluation.test_images if evaluation else loader.batch_at(0)["image"]
            images = images[: config.pictures.images]
            batch = {"image": images, "position": np.arange(len(images), dtype=np.int32)}
            writer.pictures(step, method.pictures(state.variables, batch, picture_rng))
        return out

    def due(every: int, step: int) -> bool:
        return step == total_steps or bool(every) and step % every == 0

    if start == 0:
        if is_first:
            writer.pictures(0, {"crops": _crop_sheet(source, loader.batch_at(0), method)})
        figures = look(state, 0, figures=True, pictures=True)
        if figures:
            writer.scalars(0, figures)
    else:
        log.info("resuming at step %d of %d", start, total_steps)

    progress = Progress(total_steps, "train", "steps", done=start)
    pending: tuple[int, dict[str, jax.Array]] | None = (
        None  # the last step's metrics, still on the device
    )
    logged_at, skipped_before, skipped_rows, exit_code = start, int(state.skipped), 0, 0
    meter.restart(loader.wait_seconds)
    note = ""

    def fetch(step: int, metrics: dict[str, jax.Array]) -> dict[str, float]:
        """A step's figures, from the device and from the clock."""
        nonlocal logged_at
        row = {name: float(value) for name, value in jax.device_get(metrics).items()}
        row |= meter.report(step - logged_at, loader.wait_seconds)
        row["data/substituted_images"] = float(loader.damage.substituted)
        logged_at = step
        return row

    def write(step: int, row: dict[str, float]) -> str:
        """Writes a row and returns the note for the progress line; ends a run that has diverged."""
        nonlocal skipped_before, skipped_rows
        writer.scalars(step, row)
        skipped_rows = skipped_rows + 1 if row["train/skipped_steps"] > skipped_before else 0
        skipped_before = row["train/skipped_steps"]
        if skipped_rows >= config.optim.abort_after_skipped:
            raise UserError(
                f"step {step}: the loss or its gradient was not finite at {skipped_rows} "
                "logged steps in a row; lower config.optim.lr, lengthen the warm-up or "
                "clip gradients"
            )
        parts = [
            f"loss {row['train/loss']:.4f}",
            f"{row['perf/images_per_s']:,.0f} images/s",
            f"waiting for data {100 * row['data/wait_fraction']:.0f}%",
        ]
        if "perf/mfu" in row:
            parts.append(f"MFU {100 * row['perf/mfu']:.1f}%")
        if row["train/skipped_steps"]:
            parts.append(f"{row['train/skipped_steps']:.0f} steps skipped")
        return ", ".join(parts)

    try:
        for step in range(start + 1, total_steps + 1):
            local = next(loader)
            batch = meshes.to_global({name: local[name] for name in spec}, mesh)
            state, metrics = step_fn(state, batch)

            # One step late, so that the device already works on this step while the host reads the
            # last one.
            if pending:
                jax.block_until_ready(pending[1])
                if pending[0] % config.log.every_steps == 0 and pending[0] != logged_at:
                    note = write(pending[0], fetch(*pending))
            pending = (step, metrics)
            progress.update(1, note)

            requested = stop.requested(step)
            figures, pictures = (
                due(config.eval.every_steps, step),
                due(config.pictures.every_steps, step),
            )
            if figures or pictures or requested or step == total_steps:
                row = fetch(*pending)
                note = write(step, row | look(state, step, figures, pictures))
                progress.resume()
                meter.restart(loader.wait_seconds)
            if due(config.checkpoint.every_steps, step) or requested:
                writer.flush()
                checkpointer.save(state)
            checkpointer.check()
            if requested:
                checkpointer.wait()
                log.info(
                    "\nstopped by %s at step %d of %d: saved; the same command continues",
                    requested,
                    step,
                    total_steps,
                )
                exit_code = cli.EXIT_INTERRUPTED if requested == "SIGINT" else cli.EXIT_RESTART
                break
        progress.close(note)
        checkpointer.close()
    finally:
        loader.close()
        writer.close()

    # -------------------------------------------------------------------------------- what came out
    if is_first:
        rows = read_rows(workdir / "metrics.jsonl")
        baselines = evaluation.baselines() if evaluation else None
        loss_curves(rows, workdir / "pictures" / "curves.png", baselines)
        if exit_code == 0:
            log.info(
                "finished %d steps in %s; figures in %s, pictures in %s",
                total_steps,
                format_seconds(time.perf_counter() - began),
                workdir / "metrics.jsonl",
                workdir / "pictures",
            )
        lock.release()
    return exit_code


def _restore_or_init(
    config, checkpointer, template, method, optimizer, mesh
) -> train_state.TrainState:
    """The precedence of checkpoints.py: own workdir, resume_from, init_from, scratch."""
    wanted = template._asdict()
    found = checkpointer.restore_newest(wanted)
    if found is None and config.resume_from:
        found = checkpoints.Checkpointer(config.resume_from, read_only=True).restore_newest(wanted)
        if found is None:
            raise UserError(f"config.resume_from = {config.resume_from}: has no checkpoint")
        log.info("continuing the run of %s at step %d", config.resume_from, int(found["step"]))
    if found is not None:
        return train_state.TrainState(**found)
    state = train_state.create(method, optimizer, config.seed, config.global_batch, mesh)
    if config.init_from:
        weights = checkpoints.Checkpointer(config.init_from, read_only=True).restore_newest(
            {"params": wanted["params"], "teacher": wanted["teacher"]}
        )
        if weights is None:
            raise UserError(f"config.init_from = {config.init_from}: has no checkpoint")
        log.info("starting from the weights of %s", config.init_from)
        state = state._replace(**weights)
    return state


def _refuse_another_run(workdir: pathlib.Path, config) -> None:
    """A workdir belongs to one experiment: what defines its batches and arrays must stay; the rest
    is told."""
    path = workdir / "config.json"
    if not path.exists():
        return
    before, now = json.loads(path.read_text()), configs.resolved(config)
    if not any((workdir / "checkpoints").glob("[0-9]*")):
        return  # nothing was saved yet, so nothing can be mixed up
    for key in ("seed", "global_batch", "method", "model"):
        if before[key] != now[key]:
            raise ConfigError(
                f"config.{key} differs from what {workdir} was started with; use another "
                "--workdir, or --config.init_from to take its weights"
            )
    for key in sorted(now):
        if before.get(key) != now[key] and key != "derived":
            log.info(
                "config.%s has changed since the run began: %s -> %s",
                key,
                before.get(key),
                now[key],
            )


def _memory_report(template, mesh, compiled, seconds: float) -> str:
    """Parameters, their sharding and the compiled step's memory, before the first step is paid
    for."""
    ways = mesh.shape["fsdp"] * mesh.shape["tensor"]
    spread = "whole on every device"
    if ways > 1:
        sharded, _ = rules.sharded_fraction(template.params, mesh)
        spread = f"{100 * sharded:.1f}% of their bytes cut over {ways} devices"
    state_bytes = sum(
        int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize
        for x in jax.tree.leaves(template)
    )
    lines = [
        params.describe(template.params, "sharding" if mesh.size > 1 else None),
        f"{params.count(template.params):,} parameters, {spread}; state "
        f"{state_bytes / 2**20:,.1f} MiB a device",
    ]
    memory = compiled.memory_analysis()
    if memory is not None:
        lines.append(
            f"step compiled in {seconds:.1f}s: arguments "
            f"{memory.argument_size_in_bytes / 2**20:,.1f} MiB, temporary "
            f"{memory.temp_size_in_bytes / 2**20:,.1f} MiB a device"
        )
    return "\n".join(lines)


def _crop_sheet(source, batch: dict[str, np.ndarray], method, images: int = 12) -> np.ndarray:
    """What the network is fed at step 0, beside the images it was cut from."""
    view = method.eval_view()
    rows = np.flatnonzero(~batch["substituted"])[:images]
    originals = [view(records.decode(source[int(index)]).image) for index in batch["record"][rows]]
    return crop_sheet(np.stack(originals), batch["image"][rows])


def _write_json(path: pathlib.Path, value: dict) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(partial, path)


class _StopRequest:
    """Turns SIGTERM and Ctrl-C into a save at the end of the step. A second Ctrl-C ends at once.

    With several processes the signal may reach only some: jax's preemption service agrees on the
    step.
    """

    def __init__(self):
        self._name = ""
        if jax.process_count() == 1:
            signal.signal(signal.SIGTERM, self._note)
            signal.signal(signal.SIGINT, self._note)

    def _note(self, number, frame) -> None:
        if self._name and number == signal.SIGINT:
            signal.default_int_handler(number, frame)
        self._name = signal.Signals(number).name

    def requested(self, step: int) -> str:
        """The signal's name once all processes should stop after ``step``; else empty."""
        if jax.process_count() > 1:
            return "SIGTERM" if multihost_utils.reached_preemption_sync_point(step) else ""
        return self._name


if __name__ == "__main__":
    cli.run(main)
