"""Conversion and curation from a bucket into a bucket, against a stand-in for its storage
(tests/gcs.py): what local runs write, to the byte."""

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests import gcs
from tests.curation import feature_folders
from tests.data.test_tar_reader import pack, samples
from webssl_jax.config import TransientError
from webssl_jax.data.converter import runners
from webssl_jax.tools import curate, make_records


@pytest.fixture
def storage(monkeypatch):
    """With a bucket of nothing, that refuses nothing; commands work in this process."""
    monkeypatch.setattr(runners, "pool", lambda workers: runners.here())
    found = gcs.of_this_process()
    found.objects.clear()
    yield found
    found.refuse = lambda method, path: None


def upload(storage, folder, name):
    for path in folder.rglob("*"):
        if path.is_file():
            storage._write("bucket", f"{name}/{path.relative_to(folder)}", path.read_bytes())


def seen(storage, name):
    """{name: bytes} of what a user sees in a folder of the bucket."""
    inside = {
        key.removeprefix(f"{name}/"): o.data
        for (_, key), o in storage.objects.items()
        if key.startswith(f"{name}/")
    }
    return {key: data for key, data in inside.items() if not key.startswith(".plan/")}


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_tars_of_a_bucket_become_the_shards_of_a_local_run_also_after_a_kill(
    storage, tmp_path, capsys
):
    tars = tmp_path / "tars"
    tars.mkdir()
    for i in range(4):  # with duplicates across tars, and one damage
        data = pack(*samples(10, first=8 * i))
        (tars / f"{i}.tar").write_bytes(data[: len(data) // 2] if i == 3 else data)
    upload(storage, tars, "tars")
    run = make_records.main
    assert run(["tar", "--input", f"{tars}/*.tar", "--output", str(tmp_path / "out")]) == 0
    local = capsys.readouterr().out
    given = ["tar", "--input", "gs://bucket/tars/*.tar", "--output", "gs://bucket/out"]
    assert run(given) == 0
    assert capsys.readouterr().out == local and "duplicate" in local
    expected = files(tmp_path / "out")
    assert seen(storage, "out") == expected and len(expected) == 5
    # as after a kill: one shard was not finished, one not begun
    first, third = (f"out/train-0000{i}-of-00004.arrayrecord" for i in (0, 2))
    data = storage.objects.pop(("bucket", first)).data
    storage._write("bucket", "out/.plan/train-00000.staged", data)
    del storage.objects["bucket", third]
    kept = storage.objects["bucket", "out/train-00001-of-00004.arrayrecord"].generation
    assert run(given) == 0
    assert seen(storage, "out") == expected
    assert storage.objects["bucket", "out/train-00001-of-00004.arrayrecord"].generation == kept
    storage.refuse = lambda method, path: 403 if "tars" in path else None
    with pytest.raises(TransientError, match="gs://bucket/tars/.*cannot be used"):
        run([*given[:-1], "gs://bucket/new"])


def test_scores_selections_and_duplicates_are_made_in_a_bucket(storage, tmp_path):
    features = np.random.default_rng(0).normal(size=(24, 8)).astype(np.float32)
    features[20:] = features[:4]
    feature_folders.make(tmp_path / "pool", features, gaps=(5,))
    upload(storage, tmp_path / "pool", "pool")
    for root in (tmp_path, "gs://bucket"):

        def run(name, *args, root=root):
            given = [f"{root}/{a[1:]}" if a[0] == "@" else a for a in args]
            assert curate.main([*given, "--output", f"{root}/{name}"]) == 0

        pool = "--input", "@pool/shards"
        run("scores", "score", *pool, "--scorer", "statistics")
        run("once", "dedup", *pool, "--features", "@pool/features", "--threshold", "0.99")
        where = "kept == 1 and width >= 1"
        run("both", "select", "--scores", "@scores", "@once", "--where", where)
    for name in ("scores", "once", "both"):
        local, there = files(tmp_path / name), seen(storage, name)
        assert there.keys() == local.keys() and len(local) > 2, name
        for found in (local, there):
            if "selection.json" in found:  # it and its page name its scores
                del found["selection.json"], found["index.html"]
        assert there == local, name
    chosen = pq.read_table(tmp_path / "both" / "selection.parquet")["key"].to_pylist()
    assert chosen == [f"{i:04d}" for i in range(20) if i != 5]
