"""Evaluates a run's checkpoint, or every new one that appears.

    python -m webssl_jax.evaluate --workdir DIR [--step N | --watch] [--train SHARDS --test SHARDS]

Prints k-NN and linear-probe accuracy of the frozen features beside those of chance, raw pixels, a
colour histogram and the run's own step 0, and keeps them in DIR/eval. ``--watch`` follows a run
that is still training until its last step is evaluated.
"""

from __future__ import annotations

import logging
import time

from webssl_jax import checkpoints, cli
from webssl_jax import config as configs
from webssl_jax.config import UserError
from webssl_jax.evaluators.runs import RunEvaluation
from webssl_jax.sharding import mesh as meshes

POLL_SECONDS = 20.0
log = logging.getLogger(__name__)


def main() -> int:
    """The entry point. Returns an exit code of cli.py."""
    parser = cli.ArgumentParser(prog="python -m webssl_jax.evaluate", description=__doc__)
    parser.add_argument("--workdir", required=True, help="folder of the run")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--step", type=int, help="a checkpoint's step; by default the newest")
    which.add_argument(
        "--watch",
        action="store_true",
        help="evaluate every new checkpoint until the run's last step",
    )
    parser.add_argument("--train", help="labelled shards, instead of the config's eval.train")
    parser.add_argument("--test", help="labelled shards, instead of the config's eval.test")
    args = parser.parse_args()

    config = checkpoints.read_config(args.workdir)
    with config.unlocked():
        config.eval.train = args.train or config.eval.train
        config.eval.test = args.test or config.eval.test
        # Evaluation is its own, plain data-parallel program: it need not have the training run's
        # devices.
        config.sharding.update({"replica": 1, "fsdp": -1, "tensor": 1})
    if not (config.eval.train and config.eval.test):
        raise UserError(
            f"{args.workdir}: its config names no labelled shards; give --train and --test"
        )
    mesh = meshes.create(config.sharding)
    last = configs.total_steps(config)
    evaluation, done = None, -1
    while True:
        for step in _new_steps(args, done):
            done = step if step is not None else last
            try:
                run = checkpoints.load_run(args.workdir, step, mesh)
            except checkpoints.DamagedCheckpoint as damage:
                if not args.watch:
                    raise
                log.warning("step %d is passed over: %s", step, damage)
                continue
            if evaluation is None:
                threads = config.data.threads
                evaluation = RunEvaluation(config.eval, run.method, mesh, args.workdir, threads)
            result = evaluation.run(run.variables, run.step)
            print(f"\n{evaluation.report(result)}\n", flush=True)
        if not args.watch or done >= last:
            return 0
        time.sleep(POLL_SECONDS)


def _new_steps(args, done: int) -> list[int | None]:
    """What to evaluate now: with --watch every checkpoint after ``done``, else the one asked for
    (None: the newest)."""
    if not args.watch:
        return [args.step]
    checkpointer = checkpoints.Checkpointer(args.workdir, read_only=True)
    steps = [step for step in checkpointer.steps() if step > done]
    checkpointer.close()
    return steps


if __name__ == "__main__":
    cli.run(main)
