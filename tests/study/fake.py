"""What a training leaves that ended well, without training: ``python fake.py ARGUMENTS`` of train.
The cell ``bad`` fails, ``tired`` asks twice to be started again, ``slow`` takes its time."""

import json
import pathlib
import sys
import time

import numpy as np

from webssl_jax import config as configs
from webssl_jax.evaluators import outcome
from webssl_jax.evaluators.outcome import Outcome, scored

ITEMS = 400
UNTRAINED = 0.15  # of hits, before the first step


def judged(share, seed):
    """An outcome with this share of hits; the same items are hard for all."""
    hard = np.random.default_rng(0).random(ITEMS)
    noise = np.random.default_rng(seed + 1).normal(0, 0.02, ITEMS)
    metrics, items = scored("top1", hard + noise < share)
    level, hits = scored("top1", hard < 0.5)
    baselines = {"colour histogram": Outcome(("top1",), level, hits, "items")}
    return Outcome(("top1",), metrics, items, "items", baselines=baselines)


def leave(workdir, config, share):
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "config.json").write_text(json.dumps(configs.resolved(config)))
    steps = configs.total_steps(config)
    seconds = {"step": 10.0, "evaluation": 5.0}
    start = {"began": 0.0, "start_step": 0, "step": steps, "seconds": seconds}
    (workdir / "goodput.json").write_text(json.dumps([start]))
    rows = [{"step": step, "train/loss": 1 / step} for step in (1, steps)]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (workdir / "checkpoints" / str(steps)).mkdir(parents=True)
    machine = {"cpu": "EPYC <1>", "devices": {"count": 2, "kind": "cpu"}}
    (workdir / "environment.json").write_text(json.dumps(machine))
    for step, hits in ((0, UNTRAINED), (steps, share)):
        judged(hits, config.seed).write(outcome.step_path(workdir / "eval" / "knn", step))


def main(arguments):
    overrides = [text.removeprefix("--config.") for text in arguments[4:]]
    config, workdir = configs.load(arguments[1], overrides), pathlib.Path(arguments[3])
    with open(workdir / "starts", "a") as file:
        file.write("x")
    cell = workdir.parent.name
    if cell == "bad":
        print("a line\nerror: config.optim.lr: is not good\nanother line")
        sys.exit(2)
    if cell == "tired" and (workdir / "starts").stat().st_size < 3:
        sys.exit(75)
    if cell == "slow":
        time.sleep(600)
    leave(workdir, config, config.model.width / 128)


if __name__ == "__main__":
    main(sys.argv[1:])
