import collections
import errno
import json
import math
import os
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from ml_collections import ConfigDict

from webssl_jax import config as configs
from webssl_jax import methods, runs, train, train_state, workdirs
from webssl_jax.checkpoints import Checkpointer, CheckpointError, StorageError, checksums, directory
from webssl_jax.checkpoints.saver import Saver
from webssl_jax.config import ConfigError, TransientError, UserError
from webssl_jax.methods.base import Variables
from webssl_jax.optim.optimizer import Optimizer
from webssl_jax.optim.tables import Tables
from webssl_jax.sharding import distributed
from webssl_jax.sharding import mesh as meshes


class Linear:
    """The smallest method: one matrix and a teacher."""

    def tables(self):
        return Tables()

    def batch_spec(self, batch):
        return {}

    def init(self, rng, spec):
        params = {
            "encoder": {
                "patch_embed": {
                    "kernel": jax.random.normal(rng, (2, 2, 3, 16)),
                    "bias": jnp.zeros(16, jnp.bfloat16),
                }
            }
        }
        return Variables(params, params, {"centre": jnp.ones(8)})


OPTIM = ConfigDict(
    {
        "b1": 0.9,
        "b2": 0.95,
        "eps": 1e-8,
        "clip": "none",
        "clip_norm": 1.0,
        "moment_dtype": "float32",
        "frozen": (),
        "lr_multipliers": (),
    }
)


def make(shape):
    mesh = meshes.create(
        ConfigDict(dict(zip(meshes.AXES, shape))), jax.devices()[: int(np.prod(shape))]
    )
    optimizer = Optimizer.from_config(OPTIM, Tables())
    arguments = (Linear(), optimizer, 0, 8, mesh)
    return train_state.create(*arguments), train_state.abstract(*arguments)._asdict()


def saved(tmp_path, steps, **options):
    state, template = make((1, 1, 1))
    checkpointer = Checkpointer(tmp_path, **options)
    for step in steps:
        checkpointer.save(state._replace(step=jnp.asarray(step, jnp.int32)))
    checkpointer.wait()
    return checkpointer, state, template


def assert_same(restored, state, step):
    """Bit for bit but for the step, which ``saved`` has chosen."""
    assert int(restored.pop("step")) == step
    for a, b in zip(jax.tree.leaves(state._asdict() | {"step": None}), jax.tree.leaves(restored)):
        assert a.dtype == b.dtype and np.array_equal(a, b)


def test_reading_a_run_says_nothing(tmp_path, caplog):
    (tmp_path / "checkpoints").mkdir()
    Checkpointer(tmp_path, read_only=True).close()
    assert not caplog.messages


def test_a_state_comes_back_bit_for_bit_on_another_mesh(tmp_path):
    checkpointer, state, _ = saved(tmp_path, [5])
    _, template = make((2, 2, 2))
    restored = checkpointer.restore_newest(template)
    assert_same(dict(restored), state, 5)
    kernel = restored["params"]["encoder"]["patch_embed"]["kernel"]
    assert kernel.sharding.spec[-1] == "fsdp"


def test_one_replica_reads_and_the_others_get_the_same_bits(tmp_path, monkeypatch):
    """Negative zero, NaN and infinity too, which a sum of floats would change or spread."""
    state, _ = make((1, 1, 1))
    bias = jnp.asarray([-0.0, jnp.nan, -jnp.inf, 1e-38] * 4, jnp.bfloat16)
    state.params["encoder"]["patch_embed"]["bias"] = bias
    Checkpointer(tmp_path).save(state._replace(step=jnp.asarray(5, jnp.int32)))
    _, template = make((2, 2, 2))
    _, whole = make((1, 4, 2))
    read = []
    handler = ocp.PyTreeCheckpointHandler.restore
    monkeypatch.setattr(
        ocp.PyTreeCheckpointHandler,
        "restore",
        lambda *a, **k: read.append(handler(*a, **k)) or read[-1],
    )
    checkpointer = Checkpointer(tmp_path, restore_once=True)
    restored = checkpointer.restore_newest(template)
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(read)} == {4}
    assert int(restored.pop("step")) == 5
    for a, b in zip(jax.tree.leaves(state._asdict() | {"step": None}), jax.tree.leaves(restored)):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()
    wanted = jax.tree.leaves(template | {"step": None})
    for leaf, made in zip(jax.tree.leaves(restored), wanted, strict=True):
        assert leaf.sharding == made.sharding
    checkpointer.restore_newest(whole)  # one replica: the ordinary way
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(read[-1])} == {8}


def test_parts_of_a_state_can_be_read_alone(tmp_path):
    checkpointer, state, template = saved(tmp_path, [5])
    part = Checkpointer(tmp_path, read_only=True).restore_newest({"params": template["params"]})
    assert set(part) == {"params"}


def test_a_relative_workdir_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpointer, state, template = saved("run", [5])
    found = Checkpointer("run", read_only=True).restore_newest(template)
    np.testing.assert_array_equal(
        found["params"]["encoder"]["patch_embed"]["kernel"],
        state.params["encoder"]["patch_embed"]["kernel"],
    )
    checkpointer.close()


def test_the_last_n_and_every_m_are_kept(tmp_path):
    checkpointer, *_ = saved(tmp_path, range(1, 12), keep_last=2, keep_every_steps=4)
    checkpointer.close()
    assert Checkpointer(tmp_path).steps() == [4, 8, 10, 11]


def test_checkpoints_from_before_a_blow_up_stay_until_the_run_is_sound_again(tmp_path, caplog):
    """Steps are refused from 3 to 6; the run is started again at 5."""
    state, template = make((1, 1, 1))

    def save(checkpointer, *steps, trouble=0):
        for step in steps:
            guard = state.guard | {"trouble": jnp.asarray(trouble, jnp.int32)}
            one = state._replace(step=jnp.asarray(step, jnp.int32), guard=guard)
            checkpointer.save(one)
        checkpointer.wait()
        return checkpointer.steps()

    checkpointer = Checkpointer(tmp_path, keep_last=2)
    assert save(checkpointer, 0, 1, 2) == [1, 2]
    assert save(checkpointer, 3, 4, 5, trouble=7) == [1, 2, 5]
    assert caplog.text.count("steps were refused lately; the checkpoints of before (1, 2)") == 1
    checkpointer.close()
    checkpointer = Checkpointer(tmp_path, keep_last=2)
    assert int(checkpointer.restore_newest(template)["step"]) == 5
    assert "step 5 was saved while steps were refused; to go back to one from before (1, 2)" in (
        caplog.text
    )
    assert save(checkpointer, 6, trouble=1) == [1, 2, 6]
    assert save(checkpointer, 7) == [2, 7]
    assert save(checkpointer, 8) == [7, 8]


@pytest.mark.parametrize("name", ["a[b]", "a*", "a?"])
def test_a_name_in_which_orbax_finds_nothing_again_is_refused_at_the_start(
    tmp_path, name, monkeypatch
):
    with pytest.raises(UserError, match="in its name, which orbax takes for a pattern"):
        directory(tmp_path, f"gs://bucket/{name}")
    flags = ["train", "--config=configs/web_mae.py:size=tiny", f"--workdir={tmp_path / name}"]
    monkeypatch.setattr("sys.argv", [*flags, f"--config.checkpoint.folder={tmp_path / 'other'}"])
    with pytest.raises(UserError, match="in its name, which orbax takes for a pattern"):
        train.main()
    assert not (tmp_path / name).exists()


def test_checksums_are_the_same_on_every_mesh_and_see_every_word():
    one, eight = make((1, 1, 1))[0], make((2, 2, 2))[0]
    sums = jax.device_get(checksums(one))
    assert sums == jax.device_get(checksums(eight))
    array = np.zeros(1000, np.float32)
    clean = checksums({"x": array})["x"]
    rng = np.random.default_rng(0)
    for _ in range(50):
        changed = array.copy()
        changed.view(np.uint32)[rng.integers(1000)] ^= np.uint32(1 << int(rng.integers(32)))
        assert checksums({"x": changed})["x"] != clean
    swapped = np.array([2, 1, 3], np.float32)
    assert checksums({"x": swapped})["x"] != checksums({"x": np.sort(swapped)})["x"]


def test_a_checkpoint_of_another_shape_is_refused_by_name(tmp_path):
    checkpointer, _, template = saved(tmp_path, [5])
    leaf = template["aux"]["centre"]
    wrong = template | {
        "aux": {"centre": jax.ShapeDtypeStruct((9,), leaf.dtype, sharding=leaf.sharding)}
    }
    with pytest.raises(
        CheckpointError, match=r"aux/centre has shape \(8,\), this config makes \(9,\)"
    ):
        checkpointer.restore_newest(wrong)
    with pytest.raises(CheckpointError, match="aux/other"):
        checkpointer.restore_newest(template | {"aux": {"centre": leaf, "other": leaf}})


def test_when_every_checkpoint_is_damaged_the_run_does_not_start_over(tmp_path):
    checkpointer, _, template = saved(tmp_path, [5, 6])
    for step in (5, 6):
        shutil.rmtree(tmp_path / "checkpoints" / str(step) / "state")
    with pytest.raises(
        CheckpointError, match=r"none of 2 checkpoint\(s\) can be used; that of step 6"
    ):
        checkpointer.restore_newest(template)
    assert checkpointer.steps() == [5, 6]  # and nothing was moved


def test_too_little_space_is_said_before_anything_is_written(tmp_path, monkeypatch):
    checkpointer, state, _ = saved(tmp_path, [5])
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 100))
    with pytest.raises(
        CheckpointError, match=r"no space left .* 0.0 MiB free\); the last good one is of step 5"
    ):
        checkpointer.save(state._replace(step=jnp.asarray(6, jnp.int32)))
    assert checkpointer.steps() == [5]


@pytest.mark.parametrize(
    "error, kind",
    [
        (OSError(errno.EROFS, os.strerror(errno.EROFS)), StorageError),
        (ValueError("Error writing local file [os_error_code='5']"), StorageError),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), CheckpointError),
        (TypeError("a bug"), TypeError),
    ],
)
def test_a_save_that_the_storage_refuses_is_one_line_and_may_be_tried_again(
    tmp_path, monkeypatch, error, kind
):
    checkpointer, state, _ = saved(tmp_path, [5])

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(checkpointer._manager, "save", fail)
    words = (
        r"written \((Read-only file system|Input/output error)\); the last good one is of step 5"
    )
    with pytest.raises(kind, match=f"{words}|no space left .* is of step 5|a bug") as caught:
        checkpointer.save(state._replace(step=jnp.asarray(6, jnp.int32)))
    assert isinstance(caught.value, TransientError) == (kind is StorageError)  # exit code 75


def test_a_checkpoint_that_is_not_there_is_named(tmp_path):
    with pytest.raises(Exception, match="is not a run"):
        runs.load_run(tmp_path)


@pytest.mark.parametrize(
    "text, says",
    [
        ("{", "its JSON cannot be read"),
        ("[]", "another program's"),
        ('{"method": {}, "model": null, "optim": {}, "checkpoint": {}}', "another program's"),
        (
            '{"method": {}, "model": {}, "optim": {"a.b": 1}, "checkpoint": {}}',
            "is not the config of a run",
        ),
    ],
)
def test_a_config_that_is_not_of_a_run_is_one_line(tmp_path, text, says):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=f"{tmp_path}.*{says}"):
        runs.read_config(tmp_path)


def test_a_workdir_whose_config_was_edited_by_hand_is_refused_by_its_key(tmp_path):
    config = configs.load("configs/web_mae.py:size=tiny")
    values = configs.resolved(config)
    (tmp_path / "checkpoints" / "5").mkdir(parents=True)

    def refuse(**changes):
        (tmp_path / "config.json").write_text(json.dumps(values | changes))
        runs.refuse_another(tmp_path, config, "--workdir")

    refuse(total_steps=4, model={k: v for k, v in values["model"].items() if k != "remat"})
    with pytest.raises(ConfigError, match=r"\(--workdir\) was .* config.seed: None -> 0; put"):
        refuse(seed=None)
    method = {**values["method"], "decoder": {**values["method"]["decoder"], "width": 32}}
    both = "config.global_batch: 32 -> 64, config.method.decoder.width: 32 -> 96; put"
    with pytest.raises(ConfigError, match=both):
        refuse(global_batch=32, method=method)
    with pytest.raises(UserError, match="another program's"):
        refuse(model="micro")


@pytest.mark.parametrize("name", ["checkpoints", "pictures", "eval", "tensorboard", "bad_steps"])
def test_a_file_in_the_place_of_a_folder_is_refused_at_the_start(tmp_path, name):
    (tmp_path / name).write_text("")
    with pytest.raises(UserError, match=f"{name}: is no folder, and a run needs one; move it"):
        workdirs.check_places(tmp_path)


def test_a_folder_in_the_place_of_a_file_is_refused_at_the_start(tmp_path):
    workdirs.check_places(tmp_path)
    for name in ("metrics.jsonl", "goodput.json", "environment.json", "config.json"):
        (tmp_path / name).mkdir()
        with pytest.raises(UserError, match=f"{name}: is a folder, and a run needs a file; move"):
            workdirs.check_places(tmp_path)
        (tmp_path / name).rmdir()


def test_checkpoints_without_the_config_of_their_run_are_refused(tmp_path):
    config = configs.load("web_mae:size=tiny")
    runs.refuse_another(tmp_path, config, "--workdir")  # an empty workdir is a new run
    (tmp_path / "checkpoints" / "5").mkdir(parents=True)
    with pytest.raises(UserError, match="holds checkpoints, but .* has no config.json, so whose"):
        runs.refuse_another(tmp_path, config, "--workdir")


def test_a_checkpoint_that_was_copied_from_another_run_is_refused_and_an_old_one_is_not(tmp_path):
    """Also while reading, and whatever lies beside it."""
    checkpointer, state, template = saved(tmp_path / "b", [7], run="bbbb")
    checkpointer.close()
    for run in ("aaaa", ""):
        ours = Checkpointer(tmp_path / "a", run=run, keep_last=9)
        ours.save(state._replace(step=jnp.asarray(5 if run else 6, jnp.int32)))
        ours.wait()
    copied = shutil.copytree(tmp_path / "b" / "checkpoints" / "7", tmp_path / "a/checkpoints/7")
    reader = Checkpointer(tmp_path / "a", run="aaaa", read_only=True)
    with pytest.raises(CheckpointError, match="points/7: was saved by another run .bbbb; this"):
        reader.restore_newest(template)
    shutil.rmtree(copied)
    for step in (6, 5):  # without an id, and ours
        assert_same(reader.restore(step, template), state, step)


def test_a_run_goes_on_with_another_attention_and_another_rematerialisation(tmp_path):
    config = configs.load("configs/clip.py:size=tiny")
    (tmp_path / "checkpoints" / "5").mkdir(parents=True)
    runs.write_config(tmp_path, config)
    config.model.attention, config.model.remat = "pallas", "named"
    runs.refuse_another(tmp_path, config, "--workdir")


def _warned(caplog, tmp_path, before, now, step, spec="web_mae:size=tiny"):
    """What a run says that was started with the overrides ``before`` and goes on with ``now``."""
    runs.write_config(tmp_path, configs.load(spec, before))
    caplog.clear()
    config = configs.load(spec, now)
    runs.log_changes(tmp_path, config, methods.create(config), step)
    return [record.getMessage() for record in caplog.records]


def test_a_run_made_longer_says_both_rates_at_the_seam(tmp_path, caplog):
    """A cosine of 100 steps, of 200; and a constant rate, which knows no end."""
    peak = ["optim.warmup_steps=0", "optim.lr=1.0", "optim.lr_scaling=none"]
    short, long = ["total_steps=100", *peak], ["total_steps=200", *peak]
    (says,) = _warned(caplog, tmp_path, short, long, 100)
    last, first = (0.5 + 0.5 * math.cos(math.pi * at) for at in (99 / 100, 100 / 200))
    assert f"learning_rate jumps from {last:.3g} at step 100 to {first:.3g} at step 101" in says
    assert "lr_schedule = constant" in says
    assert _warned(caplog, tmp_path, short, short, 50) == []
    assert _warned(caplog, tmp_path, short, long, 0) == []  # nothing was trained
    constant = ["optim.lr_schedule=constant"]
    assert _warned(caplog, tmp_path, short + constant, long + constant, 100) == []
    cooled = [*long, *constant, "optim.cooldown_steps=50"]
    assert _warned(caplog, tmp_path, short + constant, cooled, 100) == []
    spec = "web_dino:size=tiny"  # its momentum and weight decay have an end too
    (says,) = _warned(caplog, tmp_path, short + constant, long + constant, 100, spec)
    assert "momentum jumps" in says and "weight_decay jumps" in says and "rate jumps" not in says
    other = tmp_path / "other"
    other.mkdir()
    config = configs.load("web_mae:size=tiny", [*long, f"resume_from={tmp_path}"])
    runs.write_config(tmp_path, configs.load("web_mae:size=tiny", short))
    caplog.clear()
    runs.log_changes(other, config, methods.create(config), 100)
    assert "learning_rate jumps" in caplog.text


def test_a_start_under_other_packages_than_the_last_one_says_so(tmp_path, caplog):
    assert _warned(caplog, tmp_path, [], [], 5) == []
    file = tmp_path / "environment.json"
    found = json.loads(file.read_text())
    jax_now, found["packages"]["jax"] = found["packages"]["jax"], "0.1.2"
    file.write_text(json.dumps(found))
    config = configs.load("web_mae:size=tiny")
    runs.log_changes(tmp_path, config, methods.create(config), 5)
    assert f"last start: jax 0.1.2 -> {jax_now}; losses may differ" in caplog.text
    file.write_bytes(b"\xff")
    runs.log_changes(tmp_path, config, methods.create(config), 5)
    assert "environment.json: cannot be read" in caplog.text


def test_what_fails_on_one_process_alone_ends_all(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(distributed, "gather", lambda flag: np.array([True, flag]))
    with pytest.raises(UserError, match="process 0 stopped"):
        with distributed.error_barrier():
            pass
    with pytest.raises(FileNotFoundError):  # its own, whatever it is
        with distributed.error_barrier():
            open(tmp_path / "none")
    # What may pass ends all with 75: so a process says of a disk that fails, as the first here.
    sent = []
    monkeypatch.setattr(distributed, "gather", lambda code: sent.append(code) or np.array([code]))
    failing = OSError(errno.EROFS, os.strerror(errno.EROFS))
    with pytest.raises(OSError) as caught, distributed.error_barrier():
        raise failing
    assert sent == [75] and caught.value is failing
    assert distributed.is_raised_on_all(failing) and not distributed.is_raised_on_all(OSError())
    monkeypatch.setattr(distributed, "gather", lambda flag: np.array([True, flag]))
    checkpointer, state = Checkpointer.__new__(Checkpointer), make((1, 1, 1))[0]
    checkpointer.directory = tmp_path
    checkpointer._manager = types.SimpleNamespace(all_steps=list)
    with pytest.raises(UserError, match="process 0 stopped"):  # it has no room, we have
        checkpointer.save(state)


def test_a_storage_that_fails_now_sets_nothing_aside(tmp_path, monkeypatch):
    checkpointer, _, template = saved(tmp_path, [5, 6])

    def fail(*args, **kwargs):
        raise ValueError("UNAVAILABLE: Error reading [os_error_code='5']")

    monkeypatch.setattr("orbax.checkpoint.PyTreeCheckpointHandler.restore", fail)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(CheckpointError, match="cannot be read now .* nothing was changed"):
        checkpointer.restore_newest(template)
    monkeypatch.undo()
    assert checkpointer.steps() == [5, 6]
    assert int(checkpointer.restore_newest(template)["step"]) == 6


def test_another_dtype_is_refused_and_not_called_damage(tmp_path):
    checkpointer, _, template = saved(tmp_path, [5])
    leaf = template["aux"]["centre"]
    wrong = jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16, sharding=leaf.sharding)
    with pytest.raises(CheckpointError, match="aux/centre is float32, this config makes bfloat16"):
        checkpointer.restore_newest(template | {"aux": {"centre": wrong}})


def test_a_cut_off_array_file_is_damage(tmp_path):
    checkpointer, _, template = saved(tmp_path, [5, 6])
    for file in (tmp_path / "checkpoints" / "6").rglob("d/*"):
        file.write_bytes(file.read_bytes()[:100])
    assert int(checkpointer.restore_newest(template)["step"]) == 5
    assert (tmp_path / "checkpoints" / "damaged-6").exists()


def test_what_is_trained_is_saved_when_an_evaluation_fails(tmp_path):
    state, template = make((1, 1, 1))
    config = configs.load("configs/web_mae.py:size=tiny")
    saver = Saver(config, tmp_path, train_state.TrainState(**template))
    with pytest.raises(ZeroDivisionError), saver.saved_on_error(state):
        raise ZeroDivisionError
    assert Checkpointer(tmp_path, read_only=True).steps() == [0]


def test_what_is_trained_is_saved_when_a_machines_own_disk_fails(tmp_path, monkeypatch):
    state, template = make((1, 1, 1))
    config = configs.load("configs/web_mae.py:size=tiny")
    config.checkpoint.local_folder = str(tmp_path / "local")
    saver = Saver(config, tmp_path, train_state.TrainState(**template))
    usage = collections.namedtuple("usage", "total used free")
    full = lambda path: usage(9, 9, 0 if "local" in str(path) else 10**9)  # noqa: E731
    monkeypatch.setattr(shutil, "disk_usage", full)
    with pytest.raises(CheckpointError, match="config.checkpoint.local_folder: .* 0.0 MiB free"):
        saver.save(state, durable=False)
    assert Checkpointer(tmp_path, read_only=True).steps() == [0]


def test_a_save_in_the_background_is_completed_when_the_run_fails(tmp_path):
    state, template = make((1, 1, 1))
    config = configs.load("configs/web_mae.py:size=tiny")
    with pytest.raises(ZeroDivisionError):
        with Saver(config, tmp_path, train_state.TrainState(**template)) as saver:
            saver.save(state)
            raise ZeroDivisionError
    assert Checkpointer(tmp_path, read_only=True).steps() == [0]
