"""Real processes under jax.distributed give the single-process losses, and take over from each
other."""

import json
import re
import signal

import pytest

from tests.e2e import runner

EVALUATION = {
    "eval.train": "corpus:train",
    "eval.test": "corpus:test",
    "eval.max_images": 96,
    "eval.batch": 32,
    "pictures.kinds": "all",
    "pictures.candidates": 20,
}


@pytest.mark.parametrize(
    "processes, devices, mesh",
    [
        (2, 1, EVALUATION),
        (2, 2, {"sharding.replica": 2, "sharding.fsdp": 2}),
        (2, 2, {"sharding.fsdp": 2, "sharding.tensor": 2}),
    ],
)
def test_several_processes_give_the_single_process_losses(
    tmp_path, cache, unbroken, processes, devices, mesh
):
    """float32, only the order of sums differs: 2e-6 relative."""
    results = runner.train_together(tmp_path, processes, devices, mesh, cache)
    assert all(result.code == 0 for result in results), [r.output for r in results]
    ours = runner.losses(tmp_path)
    assert sorted(ours) == sorted(unbroken)
    for step, loss in unbroken.items():
        assert ours[step] == pytest.approx(loss, rel=2e-6)
    rows = [json.loads(line) for line in open(tmp_path / "metrics.jsonl")]
    evaluated = [row["step"] for row in rows if "eval/knn/top1" in row]
    assert evaluated == ([0, 12] if mesh is EVALUATION else [])
    for name in ("pca", "neighbours", "reconstruction") if mesh is EVALUATION else ():
        assert (tmp_path / "pictures" / f"{name}_00000012.png").exists()


def test_one_process_continues_what_two_began_and_the_other_way_round(tmp_path, cache, unbroken):
    for kill_after_step, processes in ((4, 2), (8, 1), (None, 2)):
        runner.train_together(tmp_path, processes, 1, {}, cache, kill_after_step)
    ours = runner.losses(tmp_path)
    assert sorted(ours) == sorted(unbroken)
    for step, loss in unbroken.items():
        assert ours[step] == pytest.approx(loss, rel=2e-6)


def test_a_part_that_only_one_process_cannot_read_sends_all_to_the_checkpoint_before(
    tmp_path, cache, unbroken
):
    runner.train_together(tmp_path, 2, 1, {}, cache, kill_after_step=10)
    checkpoints = tmp_path / "checkpoints"
    newest = max(int(p.name) for p in checkpoints.iterdir() if p.name.isdigit())
    parts = list((checkpoints / str(newest) / "state" / "ocdbt.process_1" / "d").iterdir())
    largest = max(parts, key=lambda part: part.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:100])
    results = runner.train_together(tmp_path, 2, 1, {}, cache)
    assert all(result.code == 0 for result in results), [r.output for r in results]
    assert f"passing over the checkpoint of step {newest}" in results[0].output
    assert sorted(runner.losses(tmp_path)) == sorted(unbroken)


@pytest.mark.parametrize(
    "sent, process", [(signal.SIGTERM, 1), pytest.param(signal.SIGINT, 0, marks=pytest.mark.slow)]
)
def test_a_stop_signal_to_one_of_two_processes_saves_and_ends_both_with_75(
    tmp_path, cache, sent, process
):
    """jax's preemption service looks once a second and then agrees on a step, so the run is
    long."""
    settings = {"total_steps": 100_000, "checkpoint.every_steps": 100_000, "log.every_steps": 10}
    results = runner.train_together(
        tmp_path, 2, 1, settings, cache, 20, sent, slice(process, process + 1)
    )
    assert [result.code for result in results] == [75, 75], [r.output for r in results]
    assert not any("Traceback" in result.output for result in results)
    (saved,) = re.findall(r"stopped by SIGTERM at step (\d+) of", results[0].output)
    assert (tmp_path / "checkpoints" / saved / "meta").is_dir()
