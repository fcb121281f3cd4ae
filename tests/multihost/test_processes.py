"""Real processes under jax.distributed give the single-process losses, and take over from each
other."""

import json
import re
import shutil
import signal

import pytest

from tests.e2e import runner
from tests.methods import small_vqa
from webssl_jax.telemetry.goodput import totals

EVALUATION = {
    "evals.knn.kind": "knn",
    "evals.knn.train": "corpus:train",
    "evals.knn.test": "corpus:test",
    "evals.knn.max_images": 160,
    "eval_batch": 32,
    "pictures.kinds": "all",
    "pictures.candidates": 20,
}
TWO_REPLICAS = {"sharding.replica": -1, "sharding.fsdp": 1}
CLIP = {
    "method.decoder.width": None,
    "method.decoder.heads": None,
    "method.block": 4,
    "total_steps": 4,
}


@pytest.mark.parametrize(
    "mesh", [{"tensor": 2}, pytest.param({"replica": 2}, marks=pytest.mark.slow)]
)
def test_two_processes_of_two_devices_give_the_losses_evaluations_and_pictures_of_one(
    tmp_path, unbroken, mesh
):
    """float32, only the order of sums differs: 2e-6 relative."""
    settings = EVALUATION | {f"sharding.{axis}": n for axis, n in (mesh | {"fsdp": 2}).items()}
    results = runner.train_together(tmp_path, 2, 2, settings)
    assert all(result.code == 0 for result in results), [r.output for r in results]
    _assert_same(runner.losses(tmp_path), unbroken)
    rows = [json.loads(line) for line in open(tmp_path / "metrics.jsonl")]
    assert [row["step"] for row in rows if "eval/knn/top1" in row] == [0, 12]
    for name in ("pca", "neighbours", "reconstruction"):
        assert (tmp_path / "pictures" / f"{name}_00000012.png").exists()


def _assert_same(ours, unbroken):
    assert sorted(ours) == sorted(unbroken)
    for step, loss in unbroken.items():
        assert ours[step] == pytest.approx(loss, rel=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("contrast", ["softmax", "sigmoid"])
def test_clips_losses_and_gradients_on_two_processes_are_those_of_one(tmp_path, contrast):
    """Each process holds half of the pairs; a loss sees all of them. float32, and the gradients'
    norms and what they do to the next losses differ by the order of sums only: 2e-6 and 2e-5
    relative."""
    spec = f"configs/clip.py:size=tiny,loss={contrast}"
    one, two = tmp_path / "one", tmp_path / "two"
    alone = runner.train(one, CLIP, spec=spec)
    assert alone.code == 0, alone.output
    results = runner.train_together(two, 2, 1, CLIP, spec=spec)
    assert all(result.code == 0 for result in results), [r.output for r in results]
    rows = [
        [json.loads(line) for line in open(run / "metrics.jsonl")][-CLIP["total_steps"] :]
        for run in (one, two)
    ]
    assert [row["step"] for row in rows[0]] == [1, 2, 3, 4]
    for expected, row in zip(*rows, strict=True):
        assert row["train/loss"] == pytest.approx(expected["train/loss"], rel=2e-6)
        norms = [name for name in expected if name.startswith("optim/grad_norm")]
        assert len(norms) > 1
        for name in norms:
            assert row[name] == pytest.approx(expected[name], rel=2e-5), name


@pytest.mark.slow
def test_a_model_learns_to_answer_alike_on_one_device_and_on_eight_that_were_killed(tmp_path):
    """Two processes of four devices, killed and started again: the losses of one device. float32,
    only the order of sums differs."""
    tokenizer, records = small_vqa.tokenizer_folder(tmp_path), tmp_path / "talks.arrayrecord"
    small_vqa.write_talks(records, 24)
    settings = {
        **dict.fromkeys(("model.size", "method.view.image_size"), None),
        **dict.fromkeys(("method.decoder.width", "method.decoder.heads"), None),
        **small_vqa.settings(tokenizer),
        **{"data.train": records, "global_batch": 8, "total_steps": 8},
    }
    one, two = tmp_path / "one", tmp_path / "two"
    alone = runner.train(one, settings, spec=small_vqa.SPEC)
    assert alone.code == 0, alone.output
    sharded = settings | {"sharding.replica": 2, "sharding.fsdp": 2, "sharding.tensor": 2}
    runner.train_together(two, 2, 4, sharded, kill_after_step=5, spec=small_vqa.SPEC)
    results = runner.train_together(two, 2, 4, sharded, spec=small_vqa.SPEC)
    assert all(result.code == 0 for result in results), [r.output for r in results]
    assert "resuming at step" in results[0].output
    wanted, found = runner.losses(one), runner.losses(two)
    assert found == pytest.approx(wanted, rel=1e-5) and wanted[8] < wanted[1]


def test_one_and_two_processes_continue_each_other_whatever_ended_them(tmp_path, unbroken):
    """One run in four starts."""
    # A process that is killed reports nothing: the other one notices, within the time that
    # train_together waits. Of the first, which holds the coordination service, jax itself notices.
    first, second = slice(0, 1), slice(1, 2)
    (left,) = runner.train_together(tmp_path, 2, 1, {}, 4, to=second, wait_for=first)
    assert left.code in (75, -6) and "Traceback" not in left.output, left.output
    assert max(runner.losses(tmp_path)) < 12

    # One process goes on, then two; then a part cannot be read, by one of them alone.
    runner.train_together(tmp_path, 1, 1, {}, 7)
    (left,) = runner.train_together(tmp_path, 2, 1, {}, 10, to=first, wait_for=second)
    assert left.code == 75 and "Traceback" not in left.output, left.output
    assert re.search("^error: .* was killed, or its machine is gone", left.output, re.MULTILINE)
    checkpoints = tmp_path / "checkpoints"
    newest = max(int(p.name) for p in checkpoints.iterdir() if p.name.isdigit())
    parts = list((checkpoints / str(newest) / "state" / "ocdbt.process_1" / "d").iterdir())
    largest = max(parts, key=lambda part: part.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:100])

    # All go to the checkpoint before it, and to the end.
    results = runner.train_together(tmp_path, 2, 1, {})
    assert all(result.code == 0 for result in results), [r.output for r in results]
    assert f"passing over the checkpoint of step {newest}" in results[0].output
    assert results[1].output.count("in the background") <= 2  # of the arrays it could not read
    _assert_same(runner.losses(tmp_path), unbroken)

    # What was done after the checkpoint that a start went on from counts as lost time.
    starts = json.loads((tmp_path / "goodput.json").read_text())
    assert len(starts) == 4 and starts[-1]["step"] == 12
    assert any(a["step"] > b["start_step"] for a, b in zip(starts, starts[1:]))
    seconds = totals(starts)
    kinds = ("step", "compile", "checkpoint", "evaluation", "init", "lost")
    assert all(seconds[kind] > 0 for kind in kinds)
    assert "in 4 start(s): step " in results[0].output


@pytest.mark.parametrize("failing", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_an_error_of_one_process_ends_all_within_seconds_with_its_message(tmp_path, failing):
    """Within a step no process asks for the others: they wait in a collective."""
    settings = {"total_steps": 100_000, "data.workers": 1, "data.retry_minutes": 0}
    results = runner.train_together(
        tmp_path, 2, 1, settings, 3, runner.kill_loader_worker, slice(failing, failing + 1)
    )
    assert [result.code for result in results] == [75, 75], [r.output for r in results]
    own, other = results[failing].output, results[1 - failing].output
    assert "\nerror: a loader process died at step" in own
    assert f"\nerror: process {failing} failed, so all end: a loader process died at step" in other
    assert "Traceback" not in own + other


@pytest.mark.slow
def test_a_process_that_is_alive_and_hangs_ends_the_run_with_the_stacks_of_all(tmp_path):
    """Stopped, not dead: its connections stay open."""
    settings = {
        "total_steps": 100_000,
        "checkpoint.every_steps": 100_000,
        "log.every_steps": 10,
        "host.stuck_minutes": 0.2,
        "data.retry_minutes": 0,
    }
    first, second = slice(0, 1), slice(1, 2)
    (left,) = runner.train_together(
        tmp_path, 2, 1, settings, 20, signal.SIGSTOP, second, wait_for=first
    )
    assert left.code == 1, left.output
    assert "Timeout (0:00:12)!" in left.output and "webssl_jax/train.py" in left.output


@pytest.mark.slow
def test_the_first_of_two_replicas_reads_and_the_other_gets_it_from_there(tmp_path, unbroken):
    mesh = TWO_REPLICAS | {"checkpoint.restore_once": True}
    for kill_after_step, processes in ((4, 2), (8, 1), (None, 2)):
        results = runner.train_together(tmp_path, processes, 1, mesh, kill_after_step)
    assert all(result.code == 0 for result in results), [r.output for r in results]
    _assert_same(runner.losses(tmp_path), unbroken)


@pytest.mark.parametrize(
    "mesh, lost, goes_on",
    [
        (TWO_REPLICAS, True, True),
        pytest.param({}, False, True, marks=pytest.mark.slow),
        pytest.param({}, True, False, marks=pytest.mark.slow),
    ],
)
def test_killed_processes_go_on_from_their_own_disks(tmp_path, unbroken, mesh, lost, goes_on):
    """Also when one has lost its part, if it is a replica; else from the beginning, for nothing
    else was saved."""
    settings = {
        **mesh,
        "checkpoint.every_steps": 100_000,
        "checkpoint.local_folder": str(tmp_path / "local"),
        "checkpoint.local_every_steps": 2,
    }
    run = tmp_path / "run"
    runner.train_together(run, 2, 1, settings, kill_after_step=8)
    held = [list((tmp_path / "local").glob(f"*/process_{i}")) for i in (0, 1)]
    assert all(len(folders) == 1 and any(folders[0].iterdir()) for folders in held)
    if lost:
        shutil.rmtree(held[1][0])
    results = runner.train_together(run, 2, 1, settings)
    assert all(result.code == 0 for result in results), [r.output for r in results]
    said = re.search(r"going on from the local checkpoint of step (\d+)", results[0].output)
    assert bool(said) == goes_on and (not goes_on or int(said[1]) in (6, 8, 10))
    assert goes_on or "only process 0 of 2 still holds it" in results[0].output
    _assert_same(runner.losses(run), unbroken)
    assert not list((tmp_path / "local").rglob("*.npz"))


@pytest.mark.parametrize(
    "sent, process", [(signal.SIGTERM, 1), pytest.param(signal.SIGINT, 0, marks=pytest.mark.slow)]
)
def test_a_stop_signal_to_one_of_two_processes_saves_and_ends_both_with_75(tmp_path, sent, process):
    """jax's preemption service looks once a second and then agrees on a step, so the run is
    long."""
    settings = {"total_steps": 100_000, "checkpoint.every_steps": 100_000, "log.every_steps": 10}
    results = runner.train_together(tmp_path, 2, 1, settings, 20, sent, slice(process, process + 1))
    assert [result.code for result in results] == [75, 75], [r.output for r in results]
    assert not any("Traceback" in result.output for result in results)
    (saved,) = re.findall(r"stopped by SIGTERM at step (\d+) of", results[0].output)
    assert (tmp_path / "checkpoints" / saved / "meta").is_dir()
