"""Trains any method from a config. Read it from top to bottom: that is what happens in a run.

    python -m webssl_jax.train --config configs/web_mae.py:size=300m --workdir DIR
        [--replay STEP] [--compiled FILE] [--config.key.path=value ...]

The same command started again continues where the run stopped, with bit-identical losses on the
same hardware. ``--replay`` runs a saved bad step again and nothing else: docs/debugging.md.
``--compiled`` takes the step from a file of ``plan --save``. Exit codes are in cli.py. The method's
name does not occur here: see methods/base.py for what a method is.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from webssl_jax import cli
from webssl_jax import config as configs
from webssl_jax.config import ConfigError, UserError
from webssl_jax.sharding import rendezvous
from webssl_jax.telemetry.progress import format_seconds


def _parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(prog="python -m webssl_jax.train", description=__doc__)
    parser.add_argument(
        "--config", required=True, help="NAME or FILE.py, and [:key=value,...]; or FILE.json"
    )
    parser.add_argument("--workdir", help="folder of the run; seen by all hosts")
    parser.add_argument(
        "--print-config", action="store_true", help="print every key as JSON, and end"
    )
    parser.add_argument("--replay", type=int, metavar="STEP", help="a step of WORKDIR/bad_steps")
    parser.add_argument("--compiled", metavar="FILE", help="the step as plan --save wrote it")
    rendezvous.add_flags(parser)
    return parser


cli.help_early(_parser, __name__)

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from webssl_jax import methods, params, runs, train_state
from webssl_jax.bad_steps import replay
from webssl_jax.bad_steps.saving import BadSteps, GuardedStep
from webssl_jax.checkpoints import directory
from webssl_jax.checkpoints.saver import Saver
from webssl_jax.data.damage_list import DamageList
from webssl_jax.data.identity import Identity
from webssl_jax.data.pipeline import Source, TrainLoader
from webssl_jax.data.sources import ArrayRecordSource
from webssl_jax.evaluators import fed, suite, tables
from webssl_jax.evaluators.outcome import Outcome
from webssl_jax.evaluators.pictures import ModelPictures, available, choose
from webssl_jax.methods.base import Method, Variables, kinds_of
from webssl_jax.model import Model, Origin
from webssl_jax.optim.optimizer import Optimizer
from webssl_jax.plan import compiled
from webssl_jax.session import Session
from webssl_jax.sharding import distributed, rules
from webssl_jax.sharding import mesh as meshes
from webssl_jax.telemetry.host import CompileTimes
from webssl_jax.telemetry.logbook import Logbook
from webssl_jax.telemetry.profiler import Profiler
from webssl_jax.train_state import TrainState
from webssl_jax.train_step import Step, by_shapes, lower_train_step
from webssl_jax.weights.networks import Networks

log = logging.getLogger("webssl_jax")


def main() -> int:
    """The entry point. Returns an exit code of cli.py."""
    began = time.time()
    args, config, method = _read_flags()  # their errors come before all else
    if args.print_config:
        print(json.dumps(configs.resolved(config), indent=2))
        return 0
    workdir = Path(args.workdir)
    with Session(args, config.host) as session:
        distributed.check_same(runs.settings(config, {"replay": args.replay}))
        mesh = meshes.create(config.sharding)
        meshes.check_batch(config, mesh)
        if args.replay is not None:
            replay.run(config, method, mesh, workdir, args.replay)
            return 0
        session.open(workdir, config, began)
        log.info("%s", _summary(config, mesh))
        return train(config, method, mesh, workdir, session, args.compiled)


def train(
    config: ConfigDict,
    method: Method,
    mesh: Mesh,
    workdir: Path,
    session: Session,
    compiled_file: str | None = None,
) -> int:
    """Trains from whatever the run starts from to its last step, or until it is asked to stop.
    Returns an exit code of cli.py."""
    with distributed.error_barrier():
        source = runs.open_records(config, workdir)
        found = Identity.of(source, config.data.threads)
    distributed.check_same({"what config.data.train or config.mixture finds": str(found)})
    log.info("training on %s", source)

    # The state: from a checkpoint, from weights, or fresh.
    optimizer = Optimizer.from_config(config.optim, method.tables())
    template = train_state.abstract(method, optimizer, config.seed, config.global_batch, mesh)
    optimizer.check(template.params)
    rules.check(template.params, mesh, config.sharding.max_unsharded_fraction)
    saver = Saver(config, workdir, template)
    state = saver.restore(method, optimizer, mesh)
    start, total_steps = int(state.step), configs.total_steps(config)
    if start >= total_steps:
        message = "finished: step %d of %d is saved in %s; nothing to do"
        log.info(message, start, total_steps, saver.directory)
        return 0
    runs.check_records(config, workdir, found, start)
    runs.log_changes(workdir, config, method, start)
    runs.write_config(workdir, config)
    session.goodput.begin(start)

    # Batches, evaluations, and where figures go.
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
        max_damaged=config.data.max_damaged_records,
        worker_starts=5 if config.data.retry_minutes else 1,
        on_damage=DamageList(workdir / f"damaged-{jax.process_index():05d}.jsonl", source),
    )
    evaluations = _Evaluations(config, method, workdir, source)
    logbook = Logbook(config, method, mesh, workdir, loader, session.goodput, start)

    # The step, compiled before the first one.
    began = time.perf_counter()
    with session.goodput.of("compile"):
        step_fn = _compile(config, method, optimizer, template, mesh, compiled_file)
    bad_steps = BadSteps(workdir, config, mesh, source, loader, config.guard.save_bad_steps)
    take_step = GuardedStep(step_fn, mesh, bad_steps)

    with logbook, loader, Profiler(workdir, config.profile) as profiler, saver, source:
        if start == 0:
            logbook.draw(0, lambda: {"crops": fed.picture(source, loader.batch_at(0), method)})
            with session.goodput.of("evaluation"):
                figures, failure = evaluations.run(0, state.variables, logbook)
                if figures:
                    logbook.write_figures(0, figures)
                if failure:
                    raise failure
        else:
            log.info("resuming at step %d of %d", start, total_steps)
        logbook.resume()
        session.start_loop()
        batches = _global_batches(loader, method.batch_spec(config.global_batch), mesh)
        state, stop = _loop(
            config, state, batches, take_step, session, saver, logbook, profiler, evaluations
        )
        take_step.finish_last(state)
        with session.pause("checkpoint"):
            saver.close()
        session.goodput.finish(int(state.step), loader.wait_seconds)
    if stop:
        return cli.EXIT_INTERRUPTED if stop == "SIGINT" else cli.EXIT_RESTART
    log.info(
        "finished %d steps in %s; figures in %s, pictures in %s",
        total_steps,
        format_seconds(time.perf_counter() - began),
        workdir / "metrics.jsonl",
        workdir / "pictures",
    )
    return 0


def _loop(
    config: ConfigDict,
    state: TrainState,
    batches: Iterator[dict[str, jax.Array]],
    take_step: GuardedStep,
    session: Session,
    saver: Saver,
    logbook: Logbook,
    profiler: Profiler,
    evaluations: _Evaluations,
) -> tuple[TrainState, str]:
    """All steps after that of ``state``. Returns the last state, and the name of the signal that
    stopped the run; empty at its end."""
    start, total_steps = int(state.step), configs.total_steps(config)

    def due(every_steps: int) -> bool:
        return step == total_steps or every_steps > 0 and step % every_steps == 0

    for step in range(start + 1, total_steps + 1):
        try:
            batch = next(batches)
        except UserError:  # the batch cannot be had: what was trained is not lost with it
            if jax.process_count() == 1 and step > start + 1:
                take_step.finish_last(state)
                logbook.write_last()
                with session.pause("checkpoint"):
                    saver.save(state)
                    saver.wait()
                log.info("saved at step %d of %d", step - 1, total_steps)
            raise
        if step == start + 1:
            distributed.meet("first step")
        # Starts the step, and returns when the one before it is complete. So the host reads all
        # figures one step late, while the device computes this step.
        state, metrics = take_step(step, state, batch)
        session.watchdog.step_started(step)
        profiler.step_started(step, metrics, look=due(config.log.every_steps))
        with saver.saved_on_error(state):
            logbook.step_started(step, metrics)

        stop = session.stop_requested(step)
        if step == total_steps:  # there is nothing to stop, and its evaluation must not be lost
            stop = ""
        durable = due(config.checkpoint.every_steps) or bool(stop)
        saves = durable or saver.has_local and due(config.checkpoint.local_every_steps)
        evaluates = evaluations.due(step) and not stop
        # What precedes a checkpoint must be on disk before it, for no later start writes it again.
        if evaluates or saves and due(config.log.every_steps):
            take_step.finish_last(state)
            row, failure = logbook.fetch(), None
            with saver.saved_on_error(state):
                if evaluates:
                    with session.pause("evaluation"):
                        figures, failure = evaluations.run(step, state.variables, logbook)
                    row |= figures
                logbook.write(step, row)
                if failure:  # of some evaluations: what the others found is not lost with them
                    logbook.flush()
                    raise failure
            if evaluations.draws(step) and not stop:
                with session.pause("evaluation"):
                    logbook.draw_curves(evaluations.levels(), evaluations.headlines())
            if evaluates:
                logbook.resume()
        if saves:
            with saver.saved_on_error(state):
                logbook.flush()
            with session.pause("checkpoint"):
                saver.save(state, durable)
        saver.check()
        if stop:
            with session.pause("checkpoint"):
                saver.wait()
            logbook.close_progress(step)
            message = "stopped by %s at step %d of %d: saved; the same command continues"
            log.info(message, stop, step, total_steps)
            return state, stop
    logbook.close_progress(total_steps)
    return state, ""


class _Evaluations:
    """The evaluations and pictures of a run. All that training knows of them is here."""

    @staticmethod
    def check(config: ConfigDict, method: Method) -> tuple[str, ...]:
        """Refuses rows and pictures that cannot be. Returns the names of the pictures.

        Raises:
          UserError: naming the key.
        """
        networks = Networks.of(method)
        suite.check(config.evals.to_dict())
        suite.check_needs(config.evals.to_dict(), networks, type(method).__name__)
        known = (*method.picture_names, *available(networks))
        return choose(config.pictures.kinds, known, "config.pictures.kinds")

    def __init__(self, config: ConfigDict, method: Method, workdir: Path, source: Source):
        names = self.check(config, method)
        self._method, self._folder, self._seed = method, workdir / "eval", config.seed
        self._own = tuple(name for name in method.picture_names if name in names)
        self._last, self._pictures_every = configs.total_steps(config), config.pictures.every_steps
        with distributed.error_barrier():
            self._suite = suite.Suite(
                config.evals.to_dict(),
                self._folder / ".cache",
                config.eval_batch,
                config.data.threads,
            )
            drawn = ArrayRecordSource(config.pictures.source) if config.pictures.source else source
            self._pictures = ModelPictures.from_config(config, method.preprocess, drawn, names)
        self._outcomes: dict[str, Outcome] = {}

    def due(self, step: int) -> bool:
        """Whether anything is to be measured or drawn at ``step``."""
        return bool(self._suite.due(step, step == self._last)) or self.draws(step)

    def draws(self, step: int) -> bool:
        """Whether pictures are to be drawn at ``step``."""
        every = self._pictures_every
        return step in (0, self._last) or every > 0 and step % every == 0

    def run(
        self, step: int, variables: Variables, logbook: Logbook
    ) -> tuple[dict[str, float], suite.FailedRows | None]:
        """Evaluates and draws what is due. Returns the figures for the row of ``step`` in
        metrics.jsonl, and the failure of those evaluations that have failed."""
        row: dict[str, float] = {}
        failure = None
        model = Model.of(self._method, variables, Origin("", step))
        if names := self._suite.due(step, step == self._last):
            try:
                found = self._suite.run(model, self._folder, step, names)
            except suite.FailedRows as error:
                found, failure = error.found, error
            self._outcomes |= found
            row = suite.metrics(found)
            if found:
                log.info("step %d: %s", step, tables.line(found))
        if self.draws(step):
            drawn = self._pictures.draw(model, f"step {step:,}")
            if self._own:
                made = self._method.pictures(
                    variables, self._pictures.batch, jax.random.key(self._seed)
                )
                drawn |= {name: made[name] for name in self._own}
            logbook.draw(step, lambda: drawn)
        return row, failure

    def levels(self) -> dict[str, dict[str, float]]:
        """{chance or trivial features: figures} that the curves are compared with."""
        levels: dict[str, dict[str, float]] = {}
        for row, one in self._outcomes.items():
            rivals = {name: other.metrics for name, other in one.baselines.items()}
            if not rivals:
                rivals = {"chance": one.chance}
            for name, metrics in rivals.items():
                levels.setdefault(name, {}).update(
                    {f"eval/{row}/{metric}": value for metric, value in metrics.items()}
                )
        return levels

    def headlines(self) -> list[str]:
        """The figures that stand for all, by their keys in metrics.jsonl."""
        return [
            f"eval/{row}/{metric}" for row, one in self._outcomes.items() for metric in one.headline
        ]


def _read_flags() -> tuple[argparse.Namespace, ConfigDict, Method]:
    """Flags, config and method, as far as they can be checked without devices and data."""
    parser = _parser()
    args, overrides = parser.parse_with_overrides()
    if not args.workdir and not args.print_config:
        parser.error("--workdir: give the folder of the run")
    if "://" in (args.workdir or ""):
        raise UserError(f"--workdir {args.workdir}: give a path; mount buckets with gcsfuse")
    config = configs.load(args.config, overrides)
    method = methods.create(config)
    if config.accumulation_steps > 1 and method.couples_batch:
        raise ConfigError(
            f"config.accumulation_steps = {config.accumulation_steps}: the loss of "
            f"{config.method.name} couples the images of a batch, so accumulation would change it; "
            "use 1"
        )
    for folder in ("", config.checkpoint.folder):
        directory(args.workdir, folder)  # refuses names
    _Evaluations.check(config, method)
    return args, config, method


def _summary(config: ConfigDict, mesh: Mesh) -> str:
    return (
        f"{config.name}: {configs.total_steps(config)} step(s) of {config.global_batch} images on "
        f"{jax.device_count()} {jax.devices()[0].device_kind} device(s) in "
        f"{jax.process_count()} process(es), mesh {dict(mesh.shape)}"
    )


def _compile(
    config: ConfigDict,
    method: Method,
    optimizer: Optimizer,
    template: TrainState,
    mesh: Mesh,
    file: str | None,
) -> Step:
    """The train step, compiled here or read from a file of ``plan --save``; of batches of several
    sizes one for each. Logs the memory that it takes."""
    kinds = kinds_of(method)
    if file and len(kinds) > 1:
        raise UserError(
            f"--compiled {file}: this run has batches of {len(kinds)} sizes and a file holds the "
            "step of one; leave it out"
        )
    what = f"reading the step from {file}" if file else "compiling the step"
    what += f" for {len(kinds)} sizes of crops" if len(kinds) > 1 else ""
    times = CompileTimes()
    step_name = f"{config.name} on {mesh.size} {mesh.devices.flat[0].device_kind}"
    last = None if file else times.last(step_name)
    wait = f"took {last:.1f}s last time" if last else "may take minutes for a large network"
    log.info("%s, which %s", what, wait)
    ways = mesh.shape["fsdp"] * mesh.shape["tensor"]
    sharding = "whole on every device"
    if ways > 1:
        sharded, _ = rules.sharded_fraction(template.params, mesh)
        sharding = f"{100 * sharded:.1f}% of their bytes cut over {ways} devices"
    log.info("%s", params.describe(template.params, "sharding" if mesh.size > 1 else None))
    log.info(
        "%s parameters, %s; state %s MiB a device",
        f"{params.count(template.params):,}",
        sharding,
        f"{train_state.device_bytes(template) / 2**20:,.1f}",
    )
    began = time.perf_counter()
    steps = [
        (
            kind.batch_spec(config.global_batch),
            _compile_one(config, kind, optimizer, template, mesh, file),
        )
        for kind in kinds
    ]
    if not file and jax.process_index() == 0:
        times.store(step_name, time.perf_counter() - began)
    return by_shapes(steps) if len(steps) > 1 else steps[0][1]


def _compile_one(
    config: ConfigDict,
    method: Method,
    optimizer: Optimizer,
    template: TrainState,
    mesh: Mesh,
    file: str | None,
) -> jax.stages.Compiled:
    began = time.perf_counter()
    lowered = lower_train_step(config, method, optimizer, template, mesh)
    if file:
        with distributed.error_barrier():  # a host may have another file, or none
            step_fn = compiled.load(file, lowered, mesh)
    else:
        step_fn = lowered.compile()
    seconds = time.perf_counter() - began
    if (memory := step_fn.memory_analysis()) is not None:
        log.info(
            "step compiled in %.1fs: arguments %s MiB, temporary %s MiB a device",
            seconds,
            f"{memory.argument_size_in_bytes / 2**20:,.1f}",
            f"{memory.temp_size_in_bytes / 2**20:,.1f}",
        )
    return step_fn


def _global_batches(
    loader: TrainLoader, spec: Mapping[str, jax.ShapeDtypeStruct], mesh: Mesh
) -> Iterator[dict[str, jax.Array]]:
    """The arrays of ``spec`` of each batch, put together from the rows of all processes."""
    for local in loader:
        yield meshes.to_global({name: local[name] for name in spec}, mesh)


if __name__ == "__main__":
    cli.run(main)
