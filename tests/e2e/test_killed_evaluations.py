"""A whole suite of rows on two encoders, killed at random moments, goes on and finds the same."""

import os
import random
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.e2e import runner
from tests.evaluators.scenes import scene_shard
from tests.evaluators.small_models import labelled_shard, small_mae
from webssl_jax.evaluators import outcome

MODELS = ("one", "other")
ROWS = ("knn", "linear", "attentive", "ade20k_lin", "ade20k_knn")
KEYS = ["linear.iterations=40", "linear.batch=8", "attentive.iterations=20", "attentive.batch=8"]
KEYS += ["ade20k_lin.size=32", "ade20k_lin.steps=30", "ade20k_lin.batch=8", "ade20k_ms=none"]
KEYS += ["ade20k_knn.size=40", "ade20k_knn.memory=500", "ade20k_knn.batch=8"]


@pytest.mark.slow
def test_a_suite_of_two_encoders_killed_at_random_moments_ends_with_the_same_figures(tmp_path):
    for seed, name in enumerate(MODELS):
        small_mae(1, seed=seed).save(tmp_path / name, "hf-vit")
    labelled = [labelled_shard(tmp_path, name, 40, seed) for seed, name in enumerate(("a", "b"))]
    for part, seeds in (("train", range(16)), ("val", range(100, 106))):
        (tmp_path / "scenes" / part).mkdir(parents=True)
        scene_shard(tmp_path / "scenes" / part, part, seeds)
    rows = f"train={labelled[0]},test={labelled[1]},rows=knn+linear+attentive"
    command = [sys.executable, "-m", "webssl_jax.evaluate", "--batch", "8"]
    command += ["--evals", f"web_ssl_classic:{rows},ade20k={tmp_path / 'scenes'}"]
    command += [f"--model={tmp_path / name}" for name in MODELS]
    command += [f"--evals.{key}" for key in KEYS]
    # what is compiled once is not compiled by each process again
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled")}
    cache["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

    def evaluate(output, seconds):
        """0, or None of a process that was killed after so many seconds."""
        process = subprocess.Popen(
            [*command, f"--output={output}"],
            env=os.environ | runner.environment() | cache,
            cwd=runner.ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        try:
            printed, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            return None
        assert process.returncode == 0, printed.decode()
        return 0

    evaluate(tmp_path / "whole", 3000)
    began = time.monotonic()
    evaluate(tmp_path / "timed", 3000)  # with everything compiled
    whole = time.monotonic() - began
    rng, killed, kills = random.Random(0), tmp_path / "killed", 0
    for _ in range(4):
        kills += evaluate(killed, rng.uniform(0.3, 0.9) * whole) is None
    assert kills  # else the machine has become faster by far
    assert evaluate(killed, 3000) == 0
    for name in MODELS:
        found, wanted = (
            outcome.read_rows(folder / name / "eval") for folder in (killed, tmp_path / "whole")
        )
        assert set(found) == set(wanted) == set(ROWS)
        for row, one in wanted.items():
            assert found[row].metrics == one.metrics
            assert found[row].chosen == one.chosen
            for metric, values in one.items.items():
                np.testing.assert_array_equal(found[row].items[metric], values)
