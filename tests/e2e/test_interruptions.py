"""Runs that are killed, stopped, damaged or out of disk. Every one is a real process."""

import json
import pathlib
import random
import shutil
import signal
import subprocess
import time

import pytest

from tests.e2e import runner


def test_an_undisturbed_run_writes_every_step_and_says_when_it_is_finished(tmp_path, unbroken):
    assert sorted(unbroken) == list(range(1, 13))
    first = runner.train(tmp_path, {"pictures.kinds": "reconstruction"})
    assert first.code == 0 and "finished 12 steps" in first.output
    assert "at the pace of the first 10 steps the other 2 take " in first.output
    assert runner.losses(tmp_path) == unbroken  # the same command, the same digits
    again = runner.train(tmp_path)
    assert again.code == 0 and "finished: step 12 of 12 is saved" in again.output
    assert runner.losses(tmp_path) == unbroken
    for picture in (
        "crops_00000000",
        "reconstruction_00000000",
        "reconstruction_00000012",
        "curves",
    ):
        assert (tmp_path / "pictures" / f"{picture}.png").stat().st_size > 1000


def test_kill_9_costs_no_digit_no_lock_and_no_damaged_checkpoint(tmp_path, unbroken):
    """One run in three starts: killed early, when a second one has been refused; killed late, and
    its newest checkpoint damaged; continued to its end."""
    path = tmp_path / "metrics.jsonl"
    process = runner.start(tmp_path)
    runner.wait_for_step(process, path, 2)
    process.send_signal(signal.SIGSTOP)
    second = runner.train(tmp_path)
    assert second.code == 2
    assert f"another run (process {process.pid}) is using this workdir" in second.output
    process.kill()
    process.communicate()

    runner.kill_at(runner.start(tmp_path), path, 10)
    checkpoints = tmp_path / "checkpoints"
    newest = max(int(p.name) for p in checkpoints.iterdir() if p.name.isdigit())
    largest = max(
        (p for p in (checkpoints / str(newest)).rglob("*") if p.is_file()),
        key=lambda p: p.stat().st_size,
    )
    damaged = bytearray(largest.read_bytes())
    damaged[len(damaged) // 2] ^= 1  # one bit, in the middle of the arrays
    largest.write_bytes(damaged)
    half = checkpoints / f"{newest + 3}.orbax-checkpoint-tmp"
    half.mkdir(exist_ok=True)
    (half / "rest").write_text("half")

    result = runner.train(tmp_path)
    assert result.code == 0, result.output
    assert result.output.count(f"passing over the checkpoint of step {newest}") == 1
    assert "Traceback" not in result.output
    assert runner.losses(tmp_path) == unbroken


@pytest.mark.slow
def test_kill_9_at_20_random_moments_continues_with_the_same_digits(tmp_path, unbroken):
    """From start-up to the last save: most of these fall into imports, compilation and checkpoint
    writing."""
    began = time.monotonic()
    runner.train(tmp_path / "timed")
    whole = time.monotonic() - began
    rng = random.Random(0)
    moments = [rng.uniform(0.3, 1.0) * whole for _ in range(20)]
    workdir = tmp_path / "killed"
    for moment in moments:
        process = runner.start(workdir)
        try:
            process.communicate(timeout=moment)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
        if process.returncode == 0:  # it got through: begin again, so that all 20 kills are kills
            assert runner.losses(workdir) == unbroken
            shutil.rmtree(workdir)
    result = runner.train(workdir)
    assert result.code == 0, result.output
    assert runner.losses(workdir) == unbroken


def test_a_stop_signal_saves_and_exits_with_its_code(tmp_path, unbroken):
    settings = {"checkpoint.every_steps": 1000}
    for sent, code, at in ((signal.SIGTERM, 75, 4), (signal.SIGINT, 130, 8)):
        process = runner.start(tmp_path, settings)
        output = runner.kill_at(process, tmp_path / "metrics.jsonl", at, sent)
        assert process.returncode == code, output
        assert f"stopped by {sent.name}" in output and "Traceback" not in output
        stopped_at = runner.last_step(tmp_path / "metrics.jsonl")
    result = runner.train(tmp_path, settings)
    assert f"resuming at step {stopped_at} of 12" in result.output
    assert runner.losses(tmp_path) == unbroken


def test_a_log_that_nobody_reads_any_more_ends_the_run_with_its_state_saved(tmp_path):
    """As behind ``| head``. Its first line after the reader has gone comes when it compiles."""
    process = runner.start(tmp_path, {"checkpoint.every_steps": 1000})
    while "training on" not in process.stdout.readline():
        assert process.poll() is None
    process.stdout.close()
    assert process.wait(timeout=240) == 75
    saved = [path.name for path in (tmp_path / "checkpoints").iterdir()]
    assert saved == [str(runner.last_step(tmp_path / "metrics.jsonl"))] and int(saved[0]) < 12


def test_a_stop_signal_in_the_last_step_does_not_cost_its_evaluation(tmp_path):
    settings = {"total_steps": 1, "optim.warmup_steps": 0, "pictures.kinds": "reconstruction"}
    process = runner.start(tmp_path, settings)
    while not (tmp_path / "config.json").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)  # before the only step is compiled
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0 and "finished 1 steps" in output, output
    assert (tmp_path / "pictures" / "reconstruction_00000001.png").exists()


def test_a_full_disk_ends_the_run_with_the_last_good_checkpoint_intact(tmp_path):
    """A limit on the size of one file stands in for the disk: the kernel refuses the write in the
    same place.

    The check of free space cannot see this limit, so this is the worse case, where the save fails
    halfway.
    """
    runner.train(tmp_path, {"total_steps": 3, "optim.warmup_steps": 2})
    result = runner.train(tmp_path, largest_file_kib=20)
    assert result.code == 2, result.output
    # A hundred writes fail at once, in tasks of asyncio and threads of tensorstore.
    assert "Traceback" not in result.output and "never retrieved" not in result.output
    (line,) = [line for line in result.output.splitlines() if line.startswith("error: ")]
    assert "no space left for a checkpoint" in line and "last good one is of step 3" in line
    result = runner.train(tmp_path)
    assert result.code == 0 and "resuming at step 3 of 12" in result.output


def test_another_device_count_gives_the_same_losses(tmp_path, unbroken):
    """Stopped on 1 device, continued on 8: fsdp 8, then replica 2 x fsdp 2 x tensor 2. float32:
    2e-6 relative."""
    for step, devices, mesh in (
        (4, 1, {}),
        (8, 8, {}),
        (None, 8, {"sharding.replica": 2, "sharding.fsdp": 2, "sharding.tensor": 2}),
    ):
        process = runner.start(tmp_path, mesh, devices)
        if step:
            runner.kill_at(process, tmp_path / "metrics.jsonl", step)
        else:
            output, _ = process.communicate(timeout=300)
            assert process.returncode == 0, output
    ours = runner.losses(tmp_path)
    assert sorted(ours) == sorted(unbroken)
    for step, loss in unbroken.items():
        assert ours[step] == pytest.approx(loss, rel=2e-6)


def test_the_loss_curve_of_the_tiny_twin_is_the_committed_one(unbroken):
    """Says that nothing in a step has changed by accident. Other processors sum in another order:
    1e-3 relative. After a wanted change, write the new losses and say why in the commit."""
    committed = json.loads((pathlib.Path(__file__).parent / "losses.json").read_text())
    assert sorted(map(int, committed)) == sorted(unbroken)
    for step, loss in committed.items():
        assert unbroken[int(step)] == pytest.approx(loss, rel=1e-3)
