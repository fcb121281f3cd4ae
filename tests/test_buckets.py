"""Checkpoints in a bucket, against a stand-in for Google Cloud Storage (tests/gcs.py)."""

import sys

import pytest

from tests import gcs
from tests import test_checkpoints as checkpoints_of
from tests.e2e import runner
from tests.test_checkpoints import make
from webssl_jax import runs, workdirs
from webssl_jax.checkpoints import Checkpointer, CheckpointError, DamagedCheckpoint, directory
from webssl_jax.config import UserError


@pytest.fixture
def storage():
    """With a bucket of nothing, that refuses nothing."""
    found = gcs.of_this_process()
    found.objects.clear()
    yield found
    found.refuse = lambda method, path: None


FOLDER = "gs://bucket/deep/run"


def saved(tmp_path, steps, **options):
    return checkpoints_of.saved(tmp_path, steps, folder=FOLDER, **options)


def test_a_state_comes_back_bit_for_bit_on_another_mesh(storage, tmp_path):
    checkpointer, state, _ = saved(tmp_path, [5])
    _, template = make((2, 2, 2))
    checkpoints_of.assert_same(checkpointer.restore_newest(template), state, 5)
    assert not list(tmp_path.iterdir())


def test_the_last_n_and_every_m_are_kept(storage, tmp_path):
    saved(tmp_path, range(1, 7), keep_last=2, keep_every_steps=4)[0].close()
    assert Checkpointer(tmp_path, folder=FOLDER, read_only=True).steps() == [4, 5, 6]
    assert {name.split("/")[2] for _, name in storage.objects} == {"4", "5", "6"}


def test_who_watches_a_run_sees_what_another_process_has_saved(storage, tmp_path):
    saved(tmp_path, [5])[0].close()
    assert Checkpointer(tmp_path, folder=FOLDER, read_only=True).steps() == [5]
    for bucket, name in list(storage.objects):
        storage.objects[bucket, name.replace("/5/", "/6/")] = storage.objects[bucket, name]
    assert Checkpointer(tmp_path, folder=FOLDER, read_only=True).steps() == [5, 6]


def test_what_was_not_saved_to_its_end_is_no_checkpoint(storage, tmp_path):
    saved(tmp_path, [5, 6])[0].close()
    del storage.objects["bucket", "deep/run/6/commit_success.txt"]
    _, template = make((1, 1, 1))
    checkpointer = Checkpointer(tmp_path, folder=FOLDER)
    assert checkpointer.steps() == [5]
    assert int(checkpointer.restore_newest(template)["step"]) == 5


@pytest.mark.parametrize(
    "what",
    ["another word", *(pytest.param(x, marks=pytest.mark.slow) for x in ("cut off", "gone"))],
)
def test_a_damaged_one_is_set_aside_and_the_one_before_is_used(storage, tmp_path, what):
    checkpointer, _, template = saved(tmp_path, [5, 6])
    for place in [p for p in storage.objects if "/6/state/" in p[1] and "/d/" in p[1]]:
        found = storage.objects[place]
        if what == "gone":
            del storage.objects[place]
        else:
            found.data = found.data[:100] if what == "cut off" else found.data[:-9] + b"123456789"
    assert int(checkpointer.restore_newest(template)["step"]) == 5
    assert ("bucket", "deep/run/damaged-6/meta/metadata") in storage.objects
    assert checkpointer.steps() == [5]


@pytest.mark.parametrize("status", [403, pytest.param(401, marks=pytest.mark.slow)])
def test_a_bucket_that_refuses_is_not_called_damage(storage, tmp_path, status):
    checkpointer, _, template = saved(tmp_path, [5, 6])
    before = set(storage.objects)
    storage.refuse = lambda method, path: status if "state" in path else None
    with pytest.raises(CheckpointError, match="cannot be read now.*nothing was changed") as caught:
        checkpointer.restore_newest(template)
    assert not isinstance(caught.value, DamagedCheckpoint)
    assert set(storage.objects) == before


def test_a_save_that_the_bucket_refuses_is_one_line(storage, tmp_path):
    saved(tmp_path, [5])[0].close()
    storage.refuse = lambda method, path: 403 if method == "POST" and "state" in path else None
    with pytest.raises(CheckpointError, match=f"{FOLDER}: a checkpoint could not be written"):
        saved(tmp_path, [6])


def test_a_folder_belongs_to_one_run_and_stays_its_own(storage, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    workdirs.claim_folder(tmp_path / "a", FOLDER)
    workdirs.claim_folder(tmp_path / "a", FOLDER)
    with pytest.raises(UserError, match=f"folder = {FOLDER}: holds the checkpoints of another run"):
        workdirs.claim_folder(tmp_path / "b", FOLDER)
    workdirs.claim_folder(tmp_path / "b", str(tmp_path / "elsewhere"))
    assert not (tmp_path / "b" / "checkpoints").exists()


def test_a_bucket_that_is_not_there_or_not_ours_is_named_at_the_start(storage, tmp_path):
    with pytest.raises(UserError, match="config.checkpoint.folder = gs://buckte/a: cannot be used"):
        workdirs.claim_folder(tmp_path, "gs://buckte/a")
    storage.refuse = lambda method, path: 403 if method == "POST" else None
    with pytest.raises(UserError, match=f"config.checkpoint.folder = {FOLDER}: cannot be used"):
        workdirs.claim_folder(tmp_path, FOLDER)


def test_without_gcsfs_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match=r"needs gcsfs; pip install 'webssl_jax\[gcp\]'"):
        directory("workdir", FOLDER)


def test_two_processes_train_into_a_bucket_and_go_on_from_it(storage, tmp_path, unbroken):
    settings = {"checkpoint.folder": FOLDER, "sharding.fsdp": 2}
    broken = runner.train_together(tmp_path, 2, 1, settings, kill_after_step=7)
    assert all(result.code for result in broken)
    assert ("bucket", "deep/run/3/commit_success.txt") in storage.objects
    results = runner.train_together(tmp_path, 2, 1, settings)
    assert all(result.code == 0 for result in results), [r.output for r in results]
    ours = runner.losses(tmp_path)
    for step, loss in unbroken.items():
        assert ours[step] == pytest.approx(loss, rel=2e-6)
    assert not (tmp_path / "checkpoints").exists()
    assert int(runs.load_run(tmp_path).step) == 12
    moved = runner.train(tmp_path, {"total_steps": 13})
    assert moved.code == 2
    assert f"the checkpoints of this run lie in {FOLDER}; leave it as it was" in moved.output
