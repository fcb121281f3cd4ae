"""Evaluates models: checkpoints of runs, or weights of any published family.

    python -m webssl_jax.evaluate --model PATH [--model PATH ...] [--evals configs/evals/NAME.py]
        [--evals.ROW.key=value ...] [--step N | --watch] [--eval-size PX] [--output DIR]
        [--batch N] [--bars PNG] [--heads N] [--image-size HxW] ...

Each row is an evaluation (webssl_jax/evaluators/base.py); without --evals the rows are those of the
first run's config. All models stand in one table, beside chance and trivial features, compared item
by item. Results lie in RUN/eval/ROW/STEP.json, of weights that are no run in
DIR/NAME/eval/ROW/00000000.json; what is there is not done again, and what was interrupted goes on.

A row that fails is named in the table, and the others are done; the exit code is that of its error.
--heads, --image-size and so on say of weight files what they do not say themselves.
--step 0 makes a run's untrained network anew, from its seed. --watch follows a run that is still
training until its last step is evaluated. --eval-size has weights that are no run look at images of
so many pixels. On several hosts run the same command on each.
"""

from __future__ import annotations

import logging
import pathlib
import time
from typing import Any, NamedTuple

from webssl_jax import cli
from webssl_jax import config as configs
from webssl_jax.config import UserError
from webssl_jax.sharding import rendezvous
from webssl_jax.weights import given


def _parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(prog="python -m webssl_jax.evaluate", description=__doc__)
    parser.add_argument(
        "--model",
        action="append",
        required=True,
        metavar="PATH",
        help="a run, or a weight file or folder of any known family; several times for several",
    )
    parser.add_argument("--evals", metavar="FILE", default="", help="rows of evaluations, a config")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--step", type=int, help="a checkpoint's step, or 0; by default the newest")
    which.add_argument(
        "--watch",
        action="store_true",
        help="evaluate every new checkpoint until the run's last step",
    )
    parser.add_argument(
        "--output", metavar="DIR", help="for results of weights that are no run (evaluations)"
    )
    parser.add_argument(
        "--eval-size", type=int, metavar="PX", help="of images, for weights that are no run"
    )
    parser.add_argument("--batch", type=int, default=256, help="images a call")
    parser.add_argument("--bars", metavar="PNG", help="draw the table: a bar a model")
    given.add_flags(parser)
    rendezvous.add_flags(parser)
    return parser


cli.help_early(_parser, __name__)

import jax
from ml_collections import ConfigDict

from webssl_jax import checkpoints, cpu_memory, methods, runs, train_state, workdirs
from webssl_jax import model as models
from webssl_jax.evaluators import outcome, tables
from webssl_jax.evaluators import suite as suites
from webssl_jax.evaluators.outcome import Outcome
from webssl_jax.evaluators.suite import Suite, check_needs
from webssl_jax.model import Model, Origin
from webssl_jax.optim.optimizer import Optimizer
from webssl_jax.sharding import distributed
from webssl_jax.sharding import mesh as meshes
from webssl_jax.telemetry.host import use_compilation_cache
from webssl_jax.visuals import save_png
from webssl_jax.visuals.bars import bar_charts
from webssl_jax.weights import load as weight_files

POLL_SECONDS = 20.0
log = logging.getLogger(__name__)


class Place(NamedTuple):
    """Where a model's results lie, and the step they are filed under."""

    folder: pathlib.Path
    step: int


def main(argv: list[str] | None = None) -> int:
    """The entry point. Returns an exit code of cli.py."""
    args, overrides = _parser().parse_with_overrides(argv, prefix="--evals.")
    options = given.options(args)
    _check(args, options)
    rows = _rows(args, overrides)
    cpu_memory.keep()
    distributed.initialize(args)
    use_compilation_cache("")
    cli.log_to_stderr(logging.INFO if jax.process_index() == 0 else logging.WARNING)
    # A plain data-parallel program: it need not have the devices of the training run.
    mesh = meshes.create(ConfigDict({"replica": 1, "fsdp": -1, "tensor": 1}))
    suite = Suite(rows, _place(args, args.model[0], 0).folder / ".cache", args.batch)
    if args.watch:
        return _watch(args, suite, mesh)
    results = _Results()
    for path in args.model:
        model = _sized(load(path, args.step, mesh, **options), args.eval_size)
        _evaluate(args, suite, path, model, results)
    results.print()
    if args.bars and jax.process_index() == 0:
        save_png(args.bars, bar_charts(tables.panels(results.outcomes)))
    results.raise_failed()
    return 0


class _Results:
    """outcomes: {model: {row: outcome}}. failed: {model: {row: its error}}."""

    def __init__(self) -> None:
        self.outcomes: dict[str, dict[str, Outcome]] = {}
        self.failed: dict[str, dict[str, Exception]] = {}

    def print(self) -> None:
        why = {
            name: {row: suites.words(error) for row, error in rows.items()}
            for name, rows in self.failed.items()
        }
        if jax.process_index() == 0:
            print(f"\n{tables.report(self.outcomes, why)}\n", flush=True)

    def raise_failed(self) -> None:
        """Raises the error of all rows that have failed."""
        failed = {
            f"{name}, {row}": e for name, rows in self.failed.items() for row, e in rows.items()
        }
        if failed:
            raise suites.failure({}, failed)


def load(path: str, step: int | None, mesh: jax.sharding.Mesh, **options: Any) -> Model:
    """``model.load``, and for step 0 of a run the network that it started from. The run keeps no
    checkpoint of that: it is a function of config and seed alone. options: of a weight file.

    Raises:
      UserError: also if the run started from other weights.
    """
    if step != 0 or not workdirs.is_run(path):
        if workdirs.is_run(path):
            return models.load(path, step, mesh)
        return models.load(path, mesh=mesh, **options)
    config = runs.read_config(path)
    if other := config.init_from or config.resume_from or config.continue_from:
        raise UserError(f"--step 0: {path} started from {other}; evaluate those weights instead")
    method = methods.create(config)
    optimizer = Optimizer.from_config(config.optim, method.tables())
    state = train_state.create(method, optimizer, config.seed, config.global_batch, mesh)
    return Model.of(method, state.variables, Origin(path, 0))


def _sized(model: Model, size: int | None) -> Model:
    """The model on images of ``size`` pixels; None: as it is."""
    if size is None:
        return model
    try:
        return model.at(size)
    except ValueError as error:
        raise UserError(
            f"--eval-size {size}: {model.origin.name} cannot take them: {error}"
        ) from None


def _check(args: Any, options: dict[str, Any]) -> None:
    is_run = [workdirs.is_run(path) for path in args.model]
    if options and all(is_run):
        flag = next(iter(options)).replace("_", "-")
        raise UserError(f"--{flag}: {args.model[0]} is a run, which knows that itself")
    if args.output and all(is_run):
        raise UserError(
            f"--output {args.output}: results of a run lie in {args.model[0]}/eval; leave it out"
        )
    if args.step is not None and not all(is_run):
        path = args.model[is_run.index(False)]
        raise UserError(f"--step {args.step}: {path} is no run, so it has no steps")
    if args.watch and (len(args.model) > 1 or not is_run[0]):
        raise UserError("--watch: follows one run; give one --model, its workdir")
    if len(set(args.model)) < len(args.model):
        raise UserError("--model: the same path twice")
    names = [pathlib.Path(path).resolve().name for path in args.model]
    if len(set(names)) < len(names):
        raise UserError(f"--model: two are called {max(names, key=names.count)}; rename one")
    if args.bars and args.watch:
        raise UserError(f"--bars {args.bars}: is of one table, --watch prints many; leave one out")
    if args.eval_size is not None and any(is_run):
        path = args.model[is_run.index(True)]
        raise UserError(
            f"--eval-size {args.eval_size}: {path} is a run, whose figures are of its own images"
        )
    if args.eval_size is not None and args.eval_size < 1:
        raise UserError(f"--eval-size {args.eval_size}: must be at least 1")
    if args.batch < 1:
        raise UserError(f"--batch {args.batch}: must be at least 1")
    for path, run in zip(args.model, is_run, strict=True):
        if not run:
            weight_files.open_files(path)  # headers, so that a wrong path ends it before any work


def _rows(args: Any, overrides: list[str]) -> dict[str, dict[str, Any]]:
    """What is to be measured: of --evals, else of the first run's config."""
    if args.evals:
        rows = configs.load_rows(args.evals, overrides)
    else:
        owner = next((path for path in args.model if workdirs.is_run(path)), None)
        given = runs.read_config(owner).evals if owner else ConfigDict()
        rows = configs.override_rows(given, overrides)
    if not rows:
        raise UserError(
            "nothing to evaluate: give --evals configs/evals/NAME.py, or --evals.ROW.kind=... and "
            "the keys of that kind"
        )
    return rows


def _place(args: Any, path: str, step: int) -> Place:
    if workdirs.is_run(path):
        return Place(pathlib.Path(path) / "eval", step)
    folder = pathlib.Path(args.output or "evaluations")
    return Place(folder / pathlib.Path(path).resolve().name / "eval", 0)


def _evaluate(args: Any, suite: Suite, path: str, model: Model, results: _Results) -> None:
    """Adds what a model gives, and before it the run's step 0, where that was measured."""
    check_needs(suite.rows, model.networks, model.origin.name, "evals")
    place = _place(args, path, model.origin.step or 0)
    if place.step:
        first = outcome.read_rows(place.folder, 0)
        first = {row: one for row, one in first.items() if row in suite.rows}
        if first:
            results.outcomes[f"{model.origin._replace(step=0).name} (untrained)"] = first
    name = model.origin.name
    try:
        results.outcomes[name] = suite.run(model, place.folder, place.step)
    except suites.FailedRows as error:
        results.outcomes[name], results.failed[name] = error.found, error.failed


def _watch(args: Any, suite: Suite, mesh: jax.sharding.Mesh) -> int:
    (path,) = args.model
    last, done = configs.total_steps(runs.read_config(path)), -1
    everything = _Results()
    while True:
        checkpointer = runs.checkpointer(path)
        steps = [step for step in checkpointer.steps() if step > done]
        checkpointer.close()
        for step in steps:
            done = step
            try:
                model = load(path, step, mesh)
            except checkpoints.DamagedCheckpoint as damage:
                log.warning("step %d is passed over: %s", step, damage)
                continue
            results = _Results()
            _evaluate(args, suite, path, model, results)
            results.print()
            everything.failed |= results.failed
        if done >= last:
            everything.raise_failed()
            return 0
        time.sleep(POLL_SECONDS)


if __name__ == "__main__":
    cli.run(main)
