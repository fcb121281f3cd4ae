"""Checkpoints on a machine's own disk. Those of several processes: multihost/test_processes.py."""

import errno
import shutil
import threading
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.test_checkpoints import make
from webssl_jax.checkpoints import CheckpointError
from webssl_jax.checkpoints.local import LocalCheckpoints

MESH = (2, 2, 2)


def at(state, step):
    return state._replace(step=jnp.full_like(state.step, step))


def saved(folder, steps, after=-1):
    """A state with bits that arithmetic would lose, saved at those steps, and its template."""
    state, template = make(MESH)
    odd = jnp.asarray([-0.0, jnp.nan, -jnp.inf, 1e-38] * 4, jnp.bfloat16)
    place = state.params["encoder"]["patch_embed"]
    place["bias"] = jax.device_put(odd, place["bias"].sharding)
    local = LocalCheckpoints(folder, "run", template)
    for step in steps:
        local.save(at(state, step), after)
    local.wait()
    return local, state, template


def assert_same(restored, state, step):
    wanted = at(state, step)._asdict()
    for ours, theirs in zip(jax.tree.leaves(restored), jax.tree.leaves(wanted), strict=True):
        assert ours.dtype == theirs.dtype and ours.sharding == theirs.sharding
        assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()


def test_a_state_comes_back_bit_for_bit_and_each_piece_is_written_once(tmp_path):
    local, state, template = saved(tmp_path, [5])
    assert_same(LocalCheckpoints(tmp_path, "run", template).restore_newest(-1), state, 5)
    with np.load(local.directory / "5.npz") as file:
        sizes = [file[name].nbytes for name in file.files if name != "meta"]
    assert sum(sizes) == sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert len(sizes) > len(jax.tree.leaves(state))  # cut over fsdp


def test_the_newest_is_kept_and_the_one_before(tmp_path):
    assert saved(tmp_path, [1, 2, 3, 4])[0].steps() == [4, 3]


def test_what_was_restored_is_kept_until_a_newer_one_is_whole(tmp_path):
    _, state, template = saved(tmp_path, [4])
    local = LocalCheckpoints(tmp_path, "run", template)
    local.restore_newest(-1)
    local.save(at(state, 6), -1)
    local.wait()
    assert local.steps() == [6, 4]
    local.save(at(state, 8), -1)
    local.wait()
    assert local.steps() == [8, 6]


def test_the_state_may_be_donated_while_it_is_written(tmp_path, monkeypatch):
    local, state, template = saved(tmp_path, [])
    kept = jax.tree.map(np.array, state)
    may_write, savez = threading.Event(), np.savez
    monkeypatch.setattr(np, "savez", lambda *a, **k: may_write.wait(60) and savez(*a, **k))
    local.save(state, -1)
    twice = jax.jit(lambda tree: jax.tree.map(lambda x: x + x, tree), donate_argnums=0)
    jax.block_until_ready(twice(state))
    may_write.set()
    local.wait()
    restored = local.restore_newest(-1)
    for ours, theirs in zip(jax.tree.leaves(restored), jax.tree.leaves(kept._asdict())):
        assert np.asarray(ours).tobytes() == theirs.tobytes()


def test_the_one_before_serves_where_the_newest_is_damaged_anywhere(tmp_path, caplog):
    """One byte of the file changed, at forty places from the first to the last. What does not
    matter (a date in the list of members) may be changed; what is restored is right."""
    local, state, template = saved(tmp_path, [4, 6])
    path = local.directory / "6.npz"
    whole = path.read_bytes()
    passed_over = 0
    for place in np.linspace(0, len(whole) - 1, 40).astype(int):
        broken = bytearray(whole)
        broken[place] ^= 0xFF
        path.write_bytes(broken)
        caplog.clear()
        restored = LocalCheckpoints(tmp_path, "run", template).restore_newest(-1)
        if int(restored["step"]) == 4:
            passed_over += 1
            assert len(caplog.records) == 1 and "passing over" in caplog.text
            assert not path.exists()  # the run will write that step again
        assert_same(restored, state, int(restored["step"]))
    assert passed_over > 30
    path.write_bytes(whole[: len(whole) // 2])
    assert_same(LocalCheckpoints(tmp_path, "run", template).restore_newest(-1), state, 4)


def test_other_numbers_in_a_file_that_can_be_read_are_noticed(tmp_path, caplog):
    local, _, template = saved(tmp_path, [6])
    with np.load(local.directory / "6.npz") as file:
        members = dict(file)
    name = next(name for name in members if "kernel" in name)
    members[name] = members[name] ^ 1
    np.savez(local.directory / "6.npz", **members)
    assert LocalCheckpoints(tmp_path, "run", template).restore_newest(-1) is None
    assert "does not have the checksum it had" in caplog.text


def test_it_counts_only_if_it_is_newer_of_this_run_and_of_this_mesh(tmp_path, caplog):
    local, _, template = saved(tmp_path, [6], after=3)
    assert LocalCheckpoints(tmp_path, "another run", template).restore_newest(3) is None
    assert local.restore_newest(6) is None and not caplog.text
    whole = (local.directory / "6.npz").read_bytes()
    _, elsewhere = make((1, 4, 2))
    assert LocalCheckpoints(tmp_path, "run", elsewhere).restore_newest(3) is None
    assert "was made on another mesh or by another config" in caplog.text
    (local.directory / "6.npz").write_bytes(whole)
    assert int(local.restore_newest(3)["step"]) == 6


def test_who_goes_back_by_deleting_a_checkpoint_is_not_carried_forward_again(tmp_path, caplog):
    local, _, template = saved(tmp_path, [11], after=10)
    assert local.restore_newest(5) is None
    assert "the checkpoint of step 10, which was there when it was made, is gone" in caplog.text
    assert local.steps() == []


def test_what_a_killed_process_was_writing_goes_at_the_next_start(tmp_path):
    local, _, template = saved(tmp_path, [6])
    (local.directory / "8.part").write_bytes(b"half")
    again = LocalCheckpoints(tmp_path, "run", template)
    assert [path.name for path in again.directory.iterdir()] == ["6.npz"]


def test_nothing_is_left_when_a_run_has_come_to_its_end(tmp_path):
    saved(tmp_path, [5, 6])[0].discard()
    assert not list(tmp_path.iterdir())


def test_a_full_disk_and_a_folder_that_cannot_be_made_are_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"local_folder: .*cannot be made \(.*directory"):
        LocalCheckpoints(tmp_path / "file", "run", make(MESH)[1])
    local, state, _ = saved(tmp_path, [])

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", full)
        local.save(state, -1)
        with pytest.raises(CheckpointError, match="could not be written .*No space left"):
            local.save(state, -1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=10))
    with pytest.raises(CheckpointError, match="MiB wanted, 0.0 MiB free; free some space"):
        local.save(state, -1)
