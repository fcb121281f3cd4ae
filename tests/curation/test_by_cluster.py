"""Clusters that were planted, found on any number of devices, and a sample that is even in them."""

import jax
import numpy as np
import pyarrow as pa
import pytest
from jax.sharding import Mesh

from tests.curation import feature_folders
from tests.curation.test_near_duplicates import keys
from webssl_jax.config import UserError
from webssl_jax.curation import by_cluster, clusters, scores, selecting
from webssl_jax.curation.expressions import Condition
from webssl_jax.evaluators.sharded import AXIS
from webssl_jax.tools import curate

SIZES = np.array([150, 60, 30, 20, 9, 4])  # two kinds, three clusters each


@pytest.fixture(scope="module")
def planted():
    """(n, D) rows and the cluster of each. Of clusters the first three are near each other, and the
    last three."""
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat(np.arange(6), SIZES))
    places = rng.normal(size=(2, 12))[np.arange(6) // 3] * 3 + rng.normal(size=(6, 12)) * 0.7
    rows = places[labels] + 0.02 * rng.normal(size=(len(labels), 12))
    return rows.astype(np.float32), labels


def same(a, b):
    """Whether two labellings are one, under other names."""
    return len(set(zip(a, b, strict=True))) == len(set(a)) == len(set(b))


def test_planted_clusters_are_found_and_devices_do_not_matter(planted):
    rows, labels = planted
    found = clusters.kmeans(rows, 6, seed=0)
    nearest, distance = clusters.closest(np.array_split(rows, 3), found.centroids, 2)
    assert same(nearest[:, 0], labels) and sorted(found.sizes) == sorted(SIZES)
    assert found.inertia == pytest.approx(float(distance[:, 0].mean()), rel=1e-3)
    assert (distance[:, 1] > distance[:, 0]).all()
    one = clusters.kmeans(rows, 6, 0, Mesh(np.array(jax.devices()[:1]), (AXIS,)))
    np.testing.assert_allclose(one.centroids, found.centroids, atol=1e-5)
    with pytest.raises(ValueError, match="3 rows cannot be 6 clusters"):
        clusters.kmeans(rows[:3], 6, 0)


def test_shares_fill_the_small_ones_first_and_are_exact():
    rng = np.random.default_rng(0)
    taken = clusters.shares(SIZES, 100, rng)
    assert taken.sum() == 100 and taken[-2:].tolist() == [9, 4]
    assert set(taken[:3]) <= {22, 23} and taken[3] == 20
    assert clusters.shares(SIZES, 1000, rng).tolist() == SIZES.tolist()
    assert clusters.shares(SIZES, 4, rng).sum() == 4 and clusters.shares(SIZES, 0, rng).sum() == 0


def test_a_sample_is_shared_among_kinds_then_among_their_clusters(planted, tmp_path, capsys):
    rows, labels = planted
    pool = feature_folders.make(tmp_path, rows, gaps=(5,))
    labels = np.delete(labels, 5)
    figures = by_cluster.cluster(pool, tmp_path / "out", (6, 2), 60)
    assert (figures["kept"], figures["without_features"]) == (60, 1)
    chosen = keys(tmp_path / "out" / "selection.parquet")
    assert chosen == sorted(chosen) and 5 not in chosen
    kept = np.bincount(labels[[i - (i > 5) for i in chosen]], minlength=6)
    assert kept[:3].tolist() == [10, 10, 10] and kept[3:].tolist() == [17, 9, 4]

    table = pa.concat_tables(scores.tables([tmp_path / "out"], ["level1", "level2", "problem"]))
    assert table["problem"][5].as_py() == "no features: gone" and table["level1"][5].as_py() is None
    level1, level2 = (np.delete(table[name].to_numpy(), 5) for name in ("level1", "level2"))
    assert same(level1, labels) and same(level2, labels // 3)
    where = Condition(f"level2 == {level2[0]:g}")
    chosen = selecting.select([tmp_path / "out"], tmp_path / "kind", where)
    assert chosen["kept"] == (labels // 3 == labels[0] // 3).sum()

    first = (tmp_path / "out" / "selection.parquet").read_bytes()
    (tmp_path / "out" / ".plan" / "level-2.npy").unlink()  # killed before it
    place = [
        "--features",
        pool.folder,
        "--input",
        tmp_path / "shards",
        "--output",
        tmp_path / "out",
    ]
    assert curate.main(["cluster", *map(str, place), "--levels", "6,2", "--number", "60"]) == 0
    said = capsys.readouterr().out
    assert "60 of 273 records kept (21.98%), 212 dropped, 1 without features" in said
    assert "level 2: 2 clusters, 0 empty; largest 240, 30 kept" in said
    page = (tmp_path / "out" / "index.html").read_text()
    assert "<tr><td>2</td><td>2</td><td>0</td>" in page and "<td>240</td><td>30</td>" in page
    assert 'src="clusters.png"' in page and (tmp_path / "out" / "clusters.png").exists()
    assert (tmp_path / "out" / "selection.parquet").read_bytes() == first
    with pytest.raises(UserError, match="--levels 2,6: must fall"):
        by_cluster.cluster(pool, tmp_path / "new", (2, 6), 60)
