"""Claims about exact duplicates across a conversion."""

import contextlib
import tracemalloc

import numpy as np

from tests.data.conversions import counts, read_shards, run_engine
from tests.data.test_converter import picture
from webssl_jax.data.converter import duplicates, items, plan, runners, work
from webssl_jax.data.converter.folder_reader import FolderReader, list_folder


def write(tmp_path, shards):
    paths = []
    for i, values in enumerate(shards):
        paths.append(tmp_path / f"{i}.images")
        duplicates.write_digests(paths[-1], [duplicates.digest(str(v).encode()) for v in values])
    return paths


def test_the_first_in_the_order_of_the_plan_stays_whatever_the_memory(tmp_path):
    rng = np.random.default_rng(0)
    shards = [list(rng.integers(0, 300, 100)) for _ in range(5)] + [[]]
    seen, wanted = set(), []
    for values in shards:
        wanted.append([i for i, v in enumerate(values) if v in seen or v in values[:i]])
        seen |= set(values)
    paths = write(tmp_path, shards)
    for budget in (1 << 22, 100, 7):
        assert [list(places) for places in duplicates.find(paths, budget)] == wanted
    assert [list(places) for places in duplicates.find(paths, 100, workers=2)] == wanted


def test_digests_come_back_in_the_order_of_the_records(tmp_path):
    digests = [duplicates.digest(bytes([i])) for i in range(20)]
    duplicates.write_digests(tmp_path / "d", digests)
    assert duplicates.read_digests(tmp_path / "d") == digests
    duplicates.write_digests(tmp_path / "none", [])
    assert duplicates.read_digests(tmp_path / "none") == []


def test_a_million_records_are_merged_in_bounded_memory(tmp_path):
    rng = np.random.default_rng(0)
    paths = []
    for i in range(100):
        rows = np.zeros(10_000, duplicates.ROW)
        rows["high"] = np.sort(rng.integers(0, 2**64, 10_000, dtype=np.uint64))
        rows["place"] = np.arange(10_000)
        rows[5] = rows[4]  # one duplicate in each shard
        rows["place"][5] = 5
        rows.tofile(tmp_path / f"{i}.images")
        paths.append(tmp_path / f"{i}.images")
    tracemalloc.start()
    found = duplicates.find(paths, budget=1 << 16)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert all(list(places) == [5] for places in found)
    assert peak < 16_000_000  # the digests alone are 20 MB


def test_duplicates_are_dropped_across_shards_before_reencoding_and_counts_follow(tmp_path):
    root = tmp_path / "in"
    root.mkdir()
    for i in range(6):
        (root / f"{i}.png").write_bytes(picture(200, 100, seed=i % 4))
    units, reader = list_folder(root), FolderReader(str(root), "x", captions="filename")
    rules = items.Rules(max_side=64)
    stats = run_engine(tmp_path / "out", reader, units, rules, shards=3)
    assert list(read_shards(tmp_path / "out")) == ["0.png", "1.png", "2.png", "3.png"]
    assert stats["dropped"]["duplicate"] == {"count": 2, "examples": ["4.png", "5.png"]}
    assert (stats["inputs"], stats["kept"], stats["reencoded"], stats["captioned"]) == (6, 4, 4, 4)
    assert stats["shorter_side"] == {"<= 32": 4} and stats["caption_words"] == {"<= 2": 4}
    kept = read_shards(tmp_path / "out")
    assert stats["bytes"] == sum(len(record.image) for record in kept.values())
    rules = items.Rules(max_side=64, keep_duplicates=True)
    stats = run_engine(tmp_path / "all", reader, units, rules, shards=3)
    assert stats["kept"] == 6 and counts(stats["dropped"]) == {}


def test_the_first_shards_are_final_before_the_last_input_is_staged(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    for i in range(12):  # every second one has come before
        (tmp_path / "in" / f"{i:02d}.png").write_bytes(picture(40, 40, i // 4))
    reader = FolderReader(str(tmp_path / "in"), "x")
    dealt = {"train": plan.deal(list_folder(tmp_path / "in"), 12)}
    done = []

    @contextlib.contextmanager
    def here():
        def do(function, shards, progress):
            for shard in shards:
                function(shard, progress)
                done.append((function, shard.index))

        yield do

    for name, workers in (("waves", 1), ("whole", 12)):
        plan.prepare(tmp_path / name, {}, lambda: ({}, dealt))
        found = runners.convert(tmp_path / name, reader, items.Rules(), here, wave=workers)
        assert counts(found["train"]["dropped"]) == {"duplicate": 9}
    assert done.index((work.finish_shard, 0)) < done.index((work.stage_shard, 1))
    assert list(read_shards(tmp_path / "waves")) == list(read_shards(tmp_path / "whole"))
    assert runners.waves(100, 3) == [(0, 3), (3, 15), (15, 75), (75, 100)]
