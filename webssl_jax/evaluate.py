"""Evaluates a run's checkpoint, or every new one that appears.

    python -m webssl_jax.evaluate --workdir DIR [--step N | --watch] [--train SHARDS --test SHARDS]
        [--zero-shot TEMPLATES [--class-names FILE]] [--retrieval SHARDS [--retrieval-images N]]

Prints k-NN and linear-probe accuracy of the frozen features beside those of chance, raw pixels, a
colour histogram and the run's own step 0, and keeps them in DIR/eval. Of methods with texts also
zero-shot classification of the test images and retrieval of captioned ones, beside chance and step
0. Each flag stands for the config's key eval.NAME (configs/common.py). ``--step 0`` makes the
untrained network anew, from the run's seed. ``--watch`` follows a run that is still training until
its last step is evaluated.
"""

from __future__ import annotations

import logging
import time

import jax

from webssl_jax import checkpoints, cli, methods, runs, train_state
from webssl_jax import config as configs
from webssl_jax.config import UserError
from webssl_jax.evaluators.runs import RunEvaluation, check_text_files, check_texts
from webssl_jax.optim.optimizer import Optimizer
from webssl_jax.sharding import mesh as meshes

POLL_SECONDS = 20.0
# of config.eval, and what stands for them where a flag or an older run says nothing
_KEYS = {
    "train": "",
    "test": "",
    "zero_shot": "",
    "class_names": "",
    "retrieval": "",
    "retrieval_images": 0,
}
log = logging.getLogger(__name__)


def main() -> int:
    """The entry point. Returns an exit code of cli.py."""
    parser = cli.ArgumentParser(prog="python -m webssl_jax.evaluate", description=__doc__)
    parser.add_argument("--workdir", required=True, help="folder of the run")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--step", type=int, help="a checkpoint's step, or 0; by default the newest")
    which.add_argument(
        "--watch",
        action="store_true",
        help="evaluate every new checkpoint until the run's last step",
    )
    parser.add_argument("--train", help="labelled shards, instead of the config's eval.train")
    parser.add_argument("--test", help="labelled shards, instead of the config's eval.test")
    parser.add_argument("--zero-shot", help="imagenet, short, or a file of templates")
    parser.add_argument("--class-names", help="a file; by default the labels themselves")
    parser.add_argument("--retrieval", help="captioned shards")
    parser.add_argument("--retrieval-images", type=int, help="at most so many; 0 for all")
    args = parser.parse_args()

    config = runs.read_config(args.workdir)
    with config.unlocked():
        for key, missing in _KEYS.items():  # a run from before a key has none of it
            given = getattr(args, key)
            config.eval[key] = config.eval.get(key, missing) if given is None else given
        # Evaluation is its own, plain data-parallel program: it need not have the training run's
        # devices.
        config.sharding.update({"replica": 1, "fsdp": -1, "tensor": 1})
    entry = config.eval
    if not (entry.train or entry.zero_shot or entry.retrieval):
        raise UserError(
            f"{args.workdir}: its config names no labelled or captioned shards; give --train and "
            "--test, or --retrieval"
        )
    if (entry.train or entry.zero_shot) and not entry.test:
        raise UserError("--train, --zero-shot: give --test, labelled shards, too")
    if entry.class_names and not entry.zero_shot:
        raise UserError("--class-names: goes with --zero-shot")
    if entry.retrieval_images < 0:
        raise UserError(f"--retrieval-images {entry.retrieval_images}: must be zero or positive")
    check_texts(entry, methods.create(config))
    check_text_files(entry)
    mesh = meshes.create(config.sharding)
    last = configs.total_steps(config)
    evaluation, done = None, -1
    while True:
        for step in _new_steps(args, done):
            done = step if step is not None else last
            try:
                run = (
                    _untrained(args.workdir, mesh)
                    if step == 0
                    else runs.load_run(args.workdir, step, mesh)
                )
            except checkpoints.DamagedCheckpoint as damage:
                if not args.watch:
                    raise
                log.warning("step %d is passed over: %s", step, damage)
                continue
            if evaluation is None:
                evaluation = RunEvaluation.from_config(config, run.method, mesh, args.workdir)
            result = evaluation.run(run.variables, run.step)
            print(f"\n{evaluation.report(result)}\n", flush=True)
        if not args.watch or done >= last:
            return 0
        time.sleep(POLL_SECONDS)


def _untrained(workdir: str, mesh: jax.sharding.Mesh) -> runs.Run:
    """The network that a run started from, of which it keeps no checkpoint; a function of config
    and seed alone.

    Raises:
      UserError: if the run started from other weights.
    """
    config = runs.read_config(workdir)
    if config.init_from or config.resume_from:
        raise UserError(
            f"--step 0: {workdir} started from {config.init_from or config.resume_from}; evaluate "
            "those weights instead"
        )
    method = methods.create(config)
    optimizer = Optimizer.from_config(config.optim, method.tables())
    state = train_state.create(method, optimizer, config.seed, config.global_batch, mesh)
    return runs.Run(workdir, config, 0, method, state.variables)


def _new_steps(args, done: int) -> list[int | None]:
    """What to evaluate now: with --watch every checkpoint after ``done``, else the one asked for
    (None: the newest)."""
    if not args.watch:
        return [args.step]
    checkpointer = runs.checkpointer(args.workdir)
    steps = [step for step in checkpointer.steps() if step > done]
    checkpointer.close()
    return steps


if __name__ == "__main__":
    cli.run(main)
