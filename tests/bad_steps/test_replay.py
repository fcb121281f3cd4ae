"""A saved step that was not copied whole, or was spoilt: one line that names the file."""

import json
import types

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from webssl_jax.bad_steps import replay
from webssl_jax.config import UserError
from webssl_jax.sharding import distributed
from webssl_jax.sharding import mesh as meshes

METHOD = types.SimpleNamespace(
    batch_spec=lambda size: {"image": jax.ShapeDtypeStruct((size, 8, 8, 3), np.uint8)}
)
CONFIG = ConfigDict({"global_batch": 4})


@pytest.fixture
def mesh():
    return meshes.create(ConfigDict(dict.fromkeys(meshes.AXES, 1)), jax.devices()[:1])


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "bad_steps" / "step-00000003"
    folder.mkdir(parents=True)
    report = {"step": 3, "cause": "spike", "figures": {}, "global_batch": 4}
    (folder / "report.json").write_text(json.dumps(report))
    (folder / "config.json").write_text("{}")
    for part, rows in enumerate(([0, 2], [1, 3])):
        (folder / f"images-{part}.json").write_text(json.dumps([{"row": row} for row in rows]))
        views = np.broadcast_to(np.uint8(rows)[:, None, None, None], (2, 8, 8, 3))
        np.savez(folder / f"batch-{part}.npz", rows=rows, image=views)
    return folder


def test_what_was_saved_by_several_processes_is_read_in_the_order_of_rows(tmp_path, folder, mesh):
    saved = replay.read(CONFIG, METHOD, mesh, tmp_path, 3)
    assert saved.views["image"][:, 0, 0, 0].tolist() == [0, 1, 2, 3]
    assert [image["row"] for image in saved.images] == [0, 1, 2, 3]


@pytest.mark.parametrize("name", ["report.json", "config.json", "images-0.json", "batch-1.npz"])
@pytest.mark.parametrize("length", [0, 1, 300])
def test_a_file_that_was_cut_off_is_named(tmp_path, folder, mesh, name, length):
    path = folder / name
    path.write_bytes(path.read_bytes()[: min(length, path.stat().st_size - 1)])
    with pytest.raises(UserError, match=f"{name}: cannot be read .*; was it copied whole"):
        replay.read(CONFIG, METHOD, mesh, tmp_path, 3)


@pytest.mark.parametrize(
    "name, says",
    [
        ("report.json", "has no such step; none was saved"),
        ("config.json", "config.json: cannot be read .No such file"),
        ("images-0.json", "holds 2 of 4 images"),
        ("batch-1.npz", "lacks views of some images"),
    ],
)
def test_a_file_that_is_missing_is_said(tmp_path, folder, mesh, name, says):
    (folder / name).unlink()
    with pytest.raises(UserError, match=says):
        replay.read(CONFIG, METHOD, mesh, tmp_path, 3)


def test_bytes_that_changed_in_a_batch_are_noticed(tmp_path, folder, mesh):
    path = folder / "batch-0.npz"
    data = bytearray(path.read_bytes())
    data[data.index(np.zeros(150, np.uint8).tobytes())] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="batch-0.npz: cannot be read"):
        replay.read(CONFIG, METHOD, mesh, tmp_path, 3)


def test_folders_of_other_names_are_not_listed(tmp_path, folder, mesh):
    folder.with_name("step-foo").mkdir()
    folder.with_name("step-foo").joinpath("report.json").touch()
    with pytest.raises(UserError, match="--replay 4: .*has no such step; saved are 3$"):
        replay.read(CONFIG, METHOD, mesh, tmp_path, 4)


def test_a_step_that_one_process_cannot_read_ends_all(tmp_path, folder, mesh, monkeypatch):
    """Here the other one cannot."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(distributed, "gather", lambda flag: np.array([True, flag]))
    with pytest.raises(UserError, match="process 0 stopped"):
        replay.run(CONFIG, METHOD, mesh, tmp_path, 3)
