"""A whole training under the babysitter, with everything that may pass going wrong."""

import shlex
import sys

import pytest

from tests.data.image_shards import write_shard
from tests.e2e import runner
from tests.launch.conftest import bring_machines
from webssl_jax.data.sources import ArrayRecordSource
from webssl_jax.launch.babysitter import Clock
from webssl_jax.launch.job import train_command

SHARDS = 200
LIMIT_HOURS = 0.5  # for whoever hangs: the babysitter ends with 3 then


@pytest.mark.slow
def test_a_run_whose_worker_shards_opens_and_disk_fail_ends_with_the_losses_of_one_undisturbed(
    world, tmp_path, unbroken
):
    shards, run = tmp_path / "set", tmp_path / "run"
    shards.mkdir()
    source = ArrayRecordSource("corpus:train")  # in more shards, so that many are opened
    for i in range(SHARDS):
        span = range(i * len(source) // SHARDS, (i + 1) * len(source) // SHARDS)
        name = f"train-{i:05d}-of-{SHARDS:05d}.arrayrecord"
        write_shard(shards / name, [source[index] for index in span])
    (tmp_path / "attempts").write_text("0")

    told = {"FAULTS_SET": shards, "FAULTS_WORKDIR": run, "FAULTS_ATTEMPTS": tmp_path / "attempts"}
    told |= {name: runner.environment()[name] for name in ("PYTHONPATH", "XLA_FLAGS")}
    words = [f"{name}={value}" for name, value in told.items()]
    env = shlex.join(["env", *words, sys.executable, "-m", "tests.launch.faults"])
    # "python -m webssl_jax.train FLAGS" becomes the training that is in trouble.
    script = f'#!/bin/bash\ncd {runner.ROOT} && shift 2 && exec {env} "$@"\n'
    machines = bring_machines(world, tmp_path, script, count=1)

    settings = runner.MICRO | {"data.train": shards, "data.workers": 1}
    overrides = [f"{key}={value}" for key, value in settings.items()]
    command = train_command(str(runner.ROOT / runner.SPEC), str(run), overrides)
    sitter = world.babysitter(
        command=command, clock=Clock(), poll_seconds=1, grace_seconds=60, max_hours=LIMIT_HOURS
    )
    code = sitter.run()
    log = (machines / "run-w-0" / "webssl_job" / "log").read_text()
    assert code == 0, world.text + log
    assert runner.losses(run) == unbroken
    assert "Traceback" not in log
    assert (tmp_path / "attempts").read_text() == "3"
    assert sitter.counts["restarts asked for by the training"] == 2
    assert "a loader process died at step" in log  # and all else went wrong, too
    assert "Input/output error" in log and "No such file or directory" in log
    assert "a checkpoint could not be written (Read-only file system)" in log
    assert "nothing can be written in" in log
    assert world.read()["resources"] == {}
