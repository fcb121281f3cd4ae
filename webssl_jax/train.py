"""Trains any method from a config. Read it from top to bottom: that is what happens in a run.

    python -m webssl_jax.train --config configs/web_mae.py:size=300m --workdir DIR
        [--replay STEP] [--compiled FILE] [--config.key.path=value ...]

The same command started again continues where the run stopped, with bit-identical losses on the
same hardware. ``--replay`` runs a saved bad step again and nothing else: docs/debugging.md.
``--compiled`` takes the step from a file of ``plan --save``. Exit codes are in cli.py. The method's
name does not occur here: see methods/base.py for what a method is.
"""

from __future__ import annotations

import logging
import math
import os
import pathlib
import signal
import sys
import time

import jax
import numpy as np
from jax.experimental import multihost_utils

from webssl_jax import checkpoints, cli, methods, params, runs, train_state
from webssl_jax import config as configs
from webssl_jax.bad_steps import replay
from webssl_jax.bad_steps.saving import BadSteps, WatchedStep
from webssl_jax.config import ConfigError, UserError
from webssl_jax.data import records
from webssl_jax.data.pipeline import TrainLoader
from webssl_jax.data.sources import ArrayRecordSource
from webssl_jax.evaluators.pictures import MethodPictures, available, choose
from webssl_jax.evaluators.runs import RunEvaluation, check_texts
from webssl_jax.files import write_json
from webssl_jax.local_checkpoints import LocalCheckpoints
from webssl_jax.optim.optimizer import Optimizer
from webssl_jax.plan import compiled
from webssl_jax.sharding import distributed, rules
from webssl_jax.sharding import mesh as meshes
from webssl_jax.telemetry import health_page
from webssl_jax.telemetry.alarms import Watch
from webssl_jax.telemetry.goodput import Goodput
from webssl_jax.telemetry.host import Watchdog, use_compilation_cache
from webssl_jax.telemetry.profiler import Profiler
from webssl_jax.telemetry.progress import Progress, format_seconds
from webssl_jax.telemetry.throughput import Throughput
from webssl_jax.telemetry.writer import MetricWriter, read_rows
from webssl_jax.train_step import lower_train_step
from webssl_jax.visuals import crop_sheet, loss_curves, save_png
from webssl_jax.weights.init_from import from_weights

log = logging.getLogger("webssl_jax")


def main() -> int:
    """The entry point. Returns an exit code of cli.py."""
    entered = time.time()
    # ------------------------------------------------ flags and config: errors before anything else
    parser = cli.ArgumentParser(prog="python -m webssl_jax.train", description=__doc__)
    parser.add_argument("--config", required=True, help="configs/NAME.py[:key=value,...]")
    parser.add_argument("--workdir", required=True, help="folder of the run; seen by all hosts")
    parser.add_argument("--replay", type=int, metavar="STEP", help="a step of WORKDIR/bad_steps")
    parser.add_argument("--compiled", metavar="FILE", help="the step as plan --save wrote it")
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
    names = choose(config.pictures.kinds, available(method), "config.pictures.kinds")
    check_texts(config.eval, method)
    total_steps = configs.total_steps(config)

    # ------------------------------------------------------------------- processes and devices
    distributed.initialize(args)
    watchdog = Watchdog(config.host)
    is_first = jax.process_index() == 0
    # Every host names its own damaged records; the rest is told by the first.
    cli.log_to_stderr(logging.INFO if is_first else logging.WARNING)
    use_compilation_cache(config.host.compilation_cache)
    mesh = meshes.create(config.sharding)
    meshes.check_batch(config, mesh)
    workdir = pathlib.Path(args.workdir)
    if args.replay is not None:
        report = replay.run(config, method, mesh, workdir, args.replay)
        if is_first:
            print(report)
        return 0
    with distributed.error_barrier():
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            lock = runs.WorkdirLock(workdir) if is_first else None
        except OSError as error:
            raise UserError(f"--workdir {workdir}: cannot be made ({error.strerror})") from error
        source = ArrayRecordSource(config.data.train)
    distributed.check_shared(workdir)
    stop = _StopRequest()
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
    log.info("training on %s", source)

    # ------------------------------------------------------------------------ state, or restore
    optimizer = Optimizer.from_config(config.optim, method.tables())
    template = train_state.abstract(method, optimizer, config.seed, config.global_batch, mesh)
    optimizer.check(template.params)
    rules.check(template.params, mesh, config.sharding.max_unsharded_fraction)
    local_checkpoints = LocalCheckpoints.from_config(config, workdir, template._asdict())
    with distributed.error_barrier():
        saved_here = bool(local_checkpoints and local_checkpoints.steps())
        runs.refuse_another(workdir, config, "--workdir", saved_here)
        if config.checkpoint.folder and is_first:
            runs.claim_folder(workdir, config.checkpoint.folder)
    checkpointer = checkpoints.Checkpointer(
        workdir,
        folder=config.checkpoint.folder,
        keep_last=config.checkpoint.keep_last,
        keep_every_steps=config.checkpoint.keep_every_steps,
        restore_once=config.checkpoint.restore_once,
    )
    state = _restore_or_init(
        config, local_checkpoints, checkpointer, template, method, optimizer, mesh
    )
    start = int(state.step)
    if start >= total_steps:
        log.info(
            "finished: step %d of %d is saved in %s; nothing to do",
            start,
            total_steps,
            checkpointer.directory,
        )
        return 0
    with distributed.error_barrier():
        if is_first:
            write_json(workdir / "config.json", configs.resolved(config))
            write_json(workdir / "environment.json", configs.environment())
    goodput = Goodput(workdir, start, entered, enabled=is_first)

    # ---------------------------------------------------------------------- data and evaluation
    loader = TrainLoader(
        source,
        method.train_view(),
        global_batch=config.global_batch,
        seed=config.seed,
        rows=meshes.local_rows(mesh, config.global_batch),
        start_step=start,
        workers=config.data.workers,
        threads=config.data.threads,
        read_ahead=config.data.read_ahead,
    )
    with distributed.error_barrier():
        evaluation = RunEvaluation.from_config(config, method, mesh, workdir)
        pictured = ArrayRecordSource(config.eval.test) if config.eval.test else source
        drawing = MethodPictures.from_config(config, method, mesh, pictured, names)
        # A fresh run starts before step 0, so that the rows of an earlier one that left no
        # checkpoint go too.
        writer = MetricWriter(
            workdir, step=start or -1, enabled=is_first, tensorboard=config.log.tensorboard
        )

    # --------------------------------------------------------- the step, compiled before step 0
    began = time.perf_counter()
    fed = method.batch_spec(config.global_batch)  # of what the loader delivers
    with goodput.of("compile"):
        step_fn = lower_train_step(config, method, optimizer, template, mesh)
        if args.compiled:
            with distributed.error_barrier():  # a host may have another file, or none
                step_fn = compiled.load(args.compiled, step_fn, mesh)
        else:
            step_fn = step_fn.compile()
    log.info("%s", _memory_report(template, mesh, step_fn, time.perf_counter() - began))

    # ----------------------------------------------------------------- what happens beside steps
    bad_steps = BadSteps(workdir, config, mesh, source, loader, config.guard.save_bad_steps)
    take_step = WatchedStep(step_fn, mesh, bad_steps)
    profiler = Profiler(workdir, config.profile)
    watch = Watch(method.vitals(config.global_batch), configs.steps(config.optim, "warmup", config))
    if is_first:  # what was said before the run stopped is not said again
        watch.look_at_all(read_rows(workdir / "metrics.jsonl"))
    reference = health_page.stored_reference(config.method.name)
    meter = Throughput(
        config.global_batch, method.train_flops(), jax.devices()[0].device_kind, jax.device_count()
    )

    def look(step: int, state: train_state.TrainState, figures: bool, pictures: bool) -> dict:
        """Evaluates and draws; returns the figures for the step's row in metrics.jsonl."""
        out = {}
        if evaluation and figures:
            result = evaluation.run(state.variables, step)
            out = result.metrics()
            log.info("step %d: %s", step, result.line())
        if pictures:
            drawn = drawing.draw(state.variables, step)
            with distributed.error_barrier():
                writer.pictures(step, drawn)
        return out

    def draw_curves() -> None:
        with distributed.error_barrier():
            if is_first:
                rows = read_rows(workdir / "metrics.jsonl")
                baselines = evaluation.baselines() if evaluation else None
                loss_curves(rows, workdir / "pictures" / "curves.png", baselines)
                picture = health_page.page(rows, watch, total_steps, config.name, reference)
                save_png(workdir / "pictures" / "health.png", picture)

    logged_at, not_finite = start, 0

    def fetch(step: int, metrics: dict[str, jax.Array]) -> dict[str, float]:
        """A step's figures, from the device and from the clock."""
        nonlocal logged_at
        row = {name: float(value) for name, value in jax.device_get(metrics).items()}
        row |= meter.report(step - logged_at, loader.wait_seconds)
        goodput.after(step, loader.wait_seconds)
        row["perf/goodput"] = goodput.fraction()
        substituted = meshes.to_global({"rows": loader.damage.by_row}, mesh)["rows"]
        row["data/substituted_images"] = float(jax.numpy.sum(substituted))  # of all hosts
        logged_at = step
        return row

    def write(step: int, row: dict[str, float]) -> str:
        """Writes a row and returns the note for the progress line; ends a run that diverged."""
        nonlocal not_finite
        begun = watch.look({"step": step, **row}) if is_first else []
        for episode in begun:
            log.warning("%s", episode.words)
        for episode in watch.episodes:
            if episode.end == step:
                log.info("step %s: over: %s", f"{step:,}", episode.alarm.name)
        row["health/alarms"] = float(len(watch.on))
        with distributed.error_barrier():
            writer.scalars(step, row)
            for episode in begun:
                writer.text(step, "health/alarm", episode.words)
        finite = math.isfinite(row["train/loss"]) and math.isfinite(row["optim/grad_norm"])
        not_finite = 0 if finite else not_finite + 1
        if not_finite >= config.optim.abort_after_skipped:
            raise UserError(
                f"step {step}: the loss or its gradient was not finite at {not_finite} logged "
                "steps in a row; lower config.optim.lr, lengthen the warm-up or clip gradients"
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
        parts += [f"ALARM since step {e.start:,}: {e.alarm.name}" for e in watch.on]
        return ", ".join(parts)

    def due(every: int, step: int) -> bool:
        return step == total_steps or bool(every) and step % every == 0

    # ---------------------------------------------------------------------------------- the loop
    if start == 0:
        with distributed.error_barrier():
            if is_first:
                writer.pictures(0, {"crops": _crop_sheet(source, loader.batch_at(0), method)})
        with goodput.of("evaluation"):
            if figures := look(0, state, figures=True, pictures=True):
                with distributed.error_barrier():
                    writer.scalars(0, figures)
    else:
        log.info("resuming at step %d of %d", start, total_steps)

    shown = sys.stderr if is_first else open(os.devnull, "w")
    progress = Progress(total_steps, "train", "steps", shown, done=start)
    pending = None  # (step, its metrics), still on the device
    note, exit_code = "", 0
    meter.restart(loader.wait_seconds)
    goodput.enter("step")
    watchdog.begin()
    try:
        for step in range(start + 1, total_steps + 1):
            local = next(loader)
            batch = meshes.to_global({name: local[name] for name in fed}, mesh)
            # Started; the step before is complete and was looked at. So all that the host reads is
            # one step late, and the device already works on this one.
            state, metrics = take_step(step, state, batch)
            watchdog.after(step)
            profiler.after(step, metrics, due(config.log.every_steps, step))
            if pending:
                if due(config.log.every_steps, pending[0]) and pending[0] != logged_at:
                    note = write(pending[0], fetch(*pending))
                progress.update(1, note)
            pending = (step, metrics)

            # At the last step there is nothing to stop, and its evaluation must not be lost.
            requested = stop.requested(step) if step < total_steps else ""
            saves = due(config.checkpoint.every_steps, step) or bool(requested)
            saves_locally = bool(local_checkpoints and not saves) and due(
                config.checkpoint.local_every_steps, step
            )
            figures = due(config.eval.every_steps, step) and not requested
            pictures = due(config.pictures.every_steps, step) and not requested
            # What a checkpoint is to continue from must be on disk before it.
            logged = (saves or saves_locally) and due(config.log.every_steps, step)
            if figures or pictures or logged:
                take_step.look(state)
                row = fetch(*pending)
                try:
                    with goodput.of("evaluation"), watchdog.pause():
                        row |= look(step, state, figures, pictures)
                except Exception:  # whatever is wrong with it, an evaluation costs no training
                    if jax.process_count() == 1:  # others, who are fine, would not join the save
                        checkpointer.save(state)
                        checkpointer.wait()
                    raise
                note = write(step, row)
                if pictures:
                    with goodput.of("evaluation"):
                        draw_curves()
                meter.restart(loader.wait_seconds)
            if saves or saves_locally:
                with distributed.error_barrier():
                    writer.flush()
                with goodput.of("checkpoint"), watchdog.pause():
                    if saves:
                        checkpointer.save(state)
                    else:
                        local_checkpoints.save(state, after=checkpointer.newest())
            checkpointer.check()
            if figures or pictures:
                progress.resume()
            if requested:
                with goodput.of("checkpoint"), watchdog.pause():
                    checkpointer.wait()
                message = "stopped by %s at step %d of %d: saved; the same command continues"
                progress.close(note)
                log.info(message, requested, step, total_steps)
                exit_code = cli.EXIT_INTERRUPTED if requested == "SIGINT" else cli.EXIT_RESTART
                break
        else:
            progress.done = total_steps
            progress.close(note)
        take_step.look(state)
        with goodput.of("checkpoint"), watchdog.pause():
            checkpointer.close()
            if local_checkpoints:
                local_checkpoints.discard()
        goodput.after(int(state.step), loader.wait_seconds)
        goodput.save()
        log.info("%s", goodput.report())
    except BaseException:
        checkpointer.drain()
        raise
    finally:
        watchdog.end()
        profiler.stop()
        loader.close()
        writer.close()
    if is_first:
        lock.release()
    if exit_code == 0:
        log.info(
            "finished %d steps in %s; figures in %s, pictures in %s",
            total_steps,
            format_seconds(time.perf_counter() - began),
            workdir / "metrics.jsonl",
            workdir / "pictures",
        )
    return exit_code


def _restore_or_init(
    config, local_checkpoints, checkpointer, template, method, optimizer, mesh
) -> train_state.TrainState:
    """The precedence of checkpoints.py: own workdir, resume_from, init_from, scratch."""
    wanted = template._asdict()
    found = None
    if local_checkpoints:
        found = local_checkpoints.restore_newest(checkpointer.newest())
    if found is None:
        found = checkpointer.restore_newest(wanted)
    if found is None and config.resume_from:
        with distributed.error_barrier():
            runs.refuse_another(pathlib.Path(config.resume_from), config, "config.resume_from")
        other = runs.checkpointer(config.resume_from, restore_once=config.checkpoint.restore_once)
        found = other.restore_newest(wanted)
        if found is None:
            raise UserError(f"config.resume_from = {config.resume_from}: has no checkpoint")
        log.info("continuing the run of %s at step %d", config.resume_from, int(found["step"]))
    if found is not None:
        return train_state.restored(found, mesh)
    state = train_state.create(method, optimizer, config.seed, config.global_batch, mesh)
    if config.init_from and not runs.is_run(config.init_from):
        trees = {"params": state.params, "teacher": state.teacher}
        return state._replace(**from_weights(config.init_from, method, trees))
    if config.init_from:
        wanted = {"params": wanted["params"], "teacher": wanted["teacher"]}
        weights = runs.weights_of_run(config.init_from, wanted, method.encoder)
        state = state._replace(**weights)
    return state


def _memory_report(template, mesh, step_fn, seconds: float) -> str:
    """Parameters, their sharding and the compiled step's memory, before the first step is paid
    for."""
    ways = mesh.shape["fsdp"] * mesh.shape["tensor"]
    spread = "whole on every device"
    if ways > 1:
        sharded, _ = rules.sharded_fraction(template.params, mesh)
        spread = f"{100 * sharded:.1f}% of their bytes cut over {ways} devices"
    lines = [
        params.describe(template.params, "sharding" if mesh.size > 1 else None),
        f"{params.count(template.params):,} parameters, {spread}; state "
        f"{train_state.device_bytes(template) / 2**20:,.1f} MiB a device",
    ]
    memory = step_fn.memory_analysis()
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
    views = {}
    for name, spec in method.batch_spec(1).items():
        if spec.dtype != np.uint8:
            continue  # tokens
        crops = batch[name][rows]
        if crops.ndim == 4:
            views["crop"] = crops
            continue
        for i in range(crops.shape[1]):
            views[f"{name.removesuffix('_crops')} {i + 1}"] = crops[:, i]
    return crop_sheet(np.stack(originals), views)


class _StopRequest:
    """Turns SIGTERM and Ctrl-C into a save at the end of the step. A second Ctrl-C ends at once.

    With several processes the signal may reach only some of them: there jax's preemption service
    listens for SIGTERM and agrees on the step, and Ctrl-C is passed on to it as SIGTERM.
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
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def requested(self, step: int) -> str:
        """The signal's name once all processes should stop after ``step``; else empty."""
        if jax.process_count() > 1:
            return "SIGTERM" if multihost_utils.reached_preemption_sync_point(step) else ""
        return self._name


if __name__ == "__main__":
    cli.run(main)
