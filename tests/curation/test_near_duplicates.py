"""Groups of near-duplicates that were planted, by all pairs and by an index."""

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.curation import feature_folders
from webssl_jax.config import UserError
from webssl_jax.curation.feature_pool import FeaturePool
from webssl_jax.curation.near_duplicates import Rules, dedup
from webssl_jax.evaluators import feature_files
from webssl_jax.tools import curate

COUNT, COPIES, GAP = 400, 80, 390


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """The last 80 records are like the first 40, two of each; one of them cannot be read."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(COUNT, 16)).astype(np.float32)
    features[-COPIES:] = features[np.arange(COPIES) // 2]
    features[-COPIES:] += 0.03 * rng.normal(size=(COPIES, 16))
    features *= rng.uniform(0.1, 10, (COUNT, 1))  # lengths do not matter
    return feature_folders.make(tmp_path_factory.mktemp("planted"), features, gaps=(GAP,))


def keys(path):
    return [int(key) for key in pq.read_table(path)["key"].to_pylist()]


def test_planted_groups_are_found_and_the_first_or_the_best_stays(planted, tmp_path, capsys):
    figures = dedup(planted, tmp_path / "a", Rules(0.98))
    assert (figures["groups"], figures["kept"], figures["dropped"]) == (40, 320, 79)
    assert (figures["without_features"], figures["recall"]) == (1, 1.0)
    assert keys(tmp_path / "a" / "selection.parquet") == list(range(COUNT - COPIES))
    table = pq.read_table(tmp_path / "a" / "groups.parquet").to_pydict()
    by_key = dict(zip(map(int, table["key"]), table["group"], strict=True))
    assert by_key == {i: i for i in range(40)} | {
        COUNT - COPIES + i: i // 2 for i in range(COPIES) if COUNT - COPIES + i != GAP
    }
    given = ["--features", planted.folder, "--input", planted.folder.parent / "shards"]
    given += ["--threshold", 0.98, "--output", tmp_path / "a"]
    assert curate.main(["dedup", *map(str, given)]) == 0
    said, warned = capsys.readouterr()
    assert "warning" not in warned
    assert "320 of 400 records kept (80.00%), 79 dropped, 1 without features; 40 groups" in said
    assert "the largest of 3; all pairs compared" in said
    page = (tmp_path / "a" / "index.html").read_text()
    assert "<td>groups</td><td>40</td>" in page and 'src="groups.png"' in page
    loose = [*map(str, given[:4]), "--threshold", "0.01", "--output", str(tmp_path / "b")]
    assert curate.main(["dedup", *loose]) == 0
    warned = capsys.readouterr().err
    assert "warning: one group has 100% of the records: --threshold 0.01 is too low" in warned
    better = np.arange(COUNT, dtype=float)
    better[-1] = np.nan  # without a score: not the best
    dedup(planted, tmp_path / "a", Rules(0.98), better)
    stays = [COUNT - COPIES + 2 * i + 1 for i in range(39)] + [COUNT - 2]
    assert keys(tmp_path / "a" / "selection.parquet") == [*range(40, COUNT - COPIES), *stays]


def test_the_index_finds_what_all_pairs_find_and_goes_on_after_a_kill(
    planted, tmp_path, monkeypatch
):
    monkeypatch.setattr("webssl_jax.curation.links.COUNT", 8)
    rules = Rules(0.98, exact=100)

    class Killed(Exception):
        pass

    def kill(records, total=None):
        if total is None:
            raise Killed

    with pytest.raises(Killed):
        dedup(planted, tmp_path / "a", rules, progress=kill)
    done = tmp_path / "a" / ".plan" / "links-00000000.npy"
    before = done.stat().st_mtime_ns
    figures = dedup(planted, tmp_path / "a", rules)
    assert done.stat().st_mtime_ns == before  # what was done stays
    assert (figures["cells"], figures["kept"]) == (20, 320)
    assert figures["recall"] == 1.0 and figures["recall_pairs"] == 39 * 6 + 2
    dedup(planted, tmp_path / "b", rules)
    for name in ("selection.parquet", "groups.parquet", "dedup.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    with pytest.raises(UserError, match="was begun with --threshold 0.98, now 0.9"):
        dedup(planted, tmp_path / "a", Rules(0.9, exact=100))


def test_features_of_other_records_are_refused(planted, tmp_path):
    other = feature_folders.make(tmp_path, np.eye(6, dtype=np.float32))
    shards = [str(tmp_path / "shards")]
    with pytest.raises(UserError, match="are features of 400 other images than the 6 records"):
        FeaturePool.open(planted.folder, shards, "cls")
    with pytest.raises(UserError, match="no column 'patches'; has cls"):
        FeaturePool.open(other.folder, shards, "patches")
    part = next(other.folder.glob("part-*"))
    part.write_bytes(b"PAR1")
    with pytest.raises(UserError, match=f"{part.name}: cannot be read .* remove it"):
        FeaturePool.open(other.folder, shards, "cls")
    part.unlink()
    with pytest.raises(UserError, match="are not complete"):
        FeaturePool.open(other.folder, shards, "cls")
    (other.folder / feature_files.FACTS).write_text("{}")
    with pytest.raises(UserError, match="no features there"):
        FeaturePool.open(other.folder, shards, "cls")
