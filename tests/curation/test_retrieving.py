"""Each target takes its nearest records, found by all pairs whatever the blocks are."""

import dataclasses

import numpy as np
import pyarrow as pa
import pytest

from tests.curation import feature_folders
from tests.curation.test_near_duplicates import keys
from webssl_jax.config import UserError
from webssl_jax.curation import feature_pool, retrieving, scores
from webssl_jax.tools import curate


@pytest.fixture(scope="module")
def pools(tmp_path_factory):
    """200 records, of which one is a gap and 9 is like 3; 12 targets, of which one is a gap."""
    rng = np.random.default_rng(0)
    records, targets = (rng.normal(size=(n, 8)).astype(np.float32) for n in (200, 12))
    records[9] = records[3] * 2
    targets[0] = records[3]
    folder = tmp_path_factory.mktemp("retrieval")
    made = feature_folders.make(folder / "pool", records, gaps=(77,))
    return made, feature_folders.make(folder / "targets", targets, gaps=(5,)), records, targets


def test_targets_take_their_nearest_and_records_know_how_often(pools, tmp_path, monkeypatch):
    pool, wanted, records, targets = pools
    monkeypatch.setattr(feature_pool, "ROWS", 16)
    monkeypatch.setattr(retrieving, "_TARGETS", 5)
    figures = retrieving.retrieve(pool, wanted, tmp_path / "out", nearest=3)
    cosine = feature_pool.unit(np.delete(targets, 5, 0)) @ feature_pool.unit(records).T
    cosine[:, 77] = -np.inf
    taken = np.argsort(-cosine, axis=1, kind="stable")[:, :3]
    assert taken[0, :2].tolist() in ([3, 9], [9, 3])
    counts = np.bincount(taken.ravel(), minlength=200)
    assert keys(tmp_path / "out" / "selection.parquet") == np.flatnonzero(counts).tolist()
    assert figures["kept"] + figures["dropped"] + figures["without_features"] == 200
    assert (figures["most_wanted"], figures["target_images"]) == (counts.max(), 11)
    table = pa.concat_tables(scores.tables([tmp_path / "out"], ["wanted", "similarity"]))
    assert table["wanted"].fill_null(0).to_pylist() == counts.tolist()
    assert table["similarity"][77].as_py() is None
    there = np.delete(np.arange(200), 77)
    similarity = table["similarity"].to_numpy()[there]
    np.testing.assert_allclose(similarity, cosine.max(axis=0)[there], rtol=1e-5)


def test_the_command_takes_only_what_is_similar_enough(pools, tmp_path, capsys):
    pool, wanted, _, targets = pools
    given = ["--features", pool.folder, "--input", pool.folder.parent / "shards"]
    given += ["--targets", wanted.folder, "--target-input", wanted.folder.parent / "shards"]
    given += ["--above", 0.999, "--output", tmp_path / "out"]
    assert curate.main(["retrieve", *map(str, given)]) == 0
    assert "2 of 200 records kept (1.00%), 197 dropped, 1 without" in capsys.readouterr().out
    assert keys(tmp_path / "out" / "selection.parquet") == [3, 9]
    page = (tmp_path / "out" / "index.html").read_text()
    assert "<td>kept</td><td>2</td>" in page and 'src="retrieved.png"' in page
    with pytest.raises(UserError, match="--above 1.5: no record is so similar"):
        retrieving.retrieve(pool, wanted, tmp_path / "new", 3, 1.5)
    nothing = feature_folders.make(tmp_path / "nothing", targets[:6], gaps=range(6))
    with pytest.raises(UserError, match="--targets .*: no image has features"):
        retrieving.retrieve(pool, nothing, tmp_path / "none", 3)
    other = dataclasses.replace(wanted, facts={**wanted.facts, "weights": "v"})
    with pytest.raises(UserError, match="are features of another model"):
        retrieving.retrieve(pool, other, tmp_path / "new", 3)
