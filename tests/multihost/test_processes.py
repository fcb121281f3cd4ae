"""Real processes under jax.distributed give the single-process losses, and take over from each
other."""

import json

import pytest

from tests.e2e import runner

EVALUATION = {
    "eval.train": "corpus:train",
    "eval.test": "corpus:test",
    "eval.max_images": 96,
    "eval.batch": 32,
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
