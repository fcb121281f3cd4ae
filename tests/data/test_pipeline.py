"""The loader: batch k is a pure function of (source, view, seed, k), and damage never shifts it."""

import dataclasses
import errno
import logging
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import textwrap
import time

import grain
import numpy as np
import pytest

from tests.data.image_shards import ListSource, encode_image, make_record, write_shard
from webssl_jax.config import TransientError, UserError
from webssl_jax.data import pipeline, records, sources
from webssl_jax.data.pipeline import TrainLoader, read_some
from webssl_jax.data.sources import ArrayRecordSource
from webssl_jax.data.views import Preprocess, RandomResizedCropView

VIEW = RandomResizedCropView(16)


@dataclasses.dataclass(frozen=True)
class WorkerReport:
    """A view that tells of its process instead of showing the image."""

    def __call__(self, data, rng):
        xla_bridge = sys.modules.get("jax._src.xla_bridge")
        started = xla_bridge is not None and xla_bridge.backends_are_initialized()
        return {"pid": np.int64(os.getpid()), "jax_started": np.bool_(started)}


@pytest.fixture(scope="module")
def source(shards):
    return ArrayRecordSource(str(shards))


@pytest.fixture(scope="module")
def reference(source):
    """Ten batches of 24 from 64 records: nearly four epochs, which end within batches."""
    with TrainLoader(source, VIEW, global_batch=24, seed=3) as loader:
        return [next(loader) for _ in range(10)]


def assert_same(batch, expected):
    assert batch.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(batch[name], expected[name], err_msg=name)


def test_a_batch_has_the_promised_arrays(reference):
    batch = reference[0]
    assert batch["image"].shape == (24, 16, 16, 3) and batch["image"].dtype == np.uint8
    assert batch["record"].shape == (24,) and batch["record"].dtype == np.int64
    assert batch["substituted"].shape == (24,) and batch["substituted"].dtype == np.bool_
    assert not batch["substituted"].any()


def test_an_epoch_shows_each_record_once_and_the_next_in_another_order(reference):
    stream = np.concatenate([batch["record"] for batch in reference])
    epochs = [stream[64 * e : 64 * (e + 1)] for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(64))
    assert (epochs[0] != epochs[1]).any() and (epochs[1] != epochs[2]).any()


def test_a_record_is_seen_differently_in_every_epoch(reference):
    stream = np.concatenate([batch["record"] for batch in reference])
    images = np.concatenate([batch["image"] for batch in reference])
    seen = images[stream == 5]
    assert len(seen) >= 3
    assert all((seen[0] != other).any() for other in seen[1:])


@pytest.mark.parametrize(
    "shares",
    [
        [range(0, 12), range(12, 24)],
        [range(host, 24, 4) for host in range(4)],
        [[0, 1, 2, 3, 20, 21], [*range(4, 20), 22, 23]],  # a torus; hosts of unlike size
        [range(0, 24), range(0, 24)],  # a tensor axis that spans two hosts
    ],
)
def test_hosts_with_any_rows_together_deliver_the_batches_of_one_host(source, reference, shares):
    loaders = [
        TrainLoader(source, VIEW, global_batch=24, seed=3, rows=np.array(rows)) for rows in shares
    ]
    for expected in reference:
        for loader, rows in zip(loaders, shares, strict=True):
            assert_same(next(loader), {k: v[list(rows)] for k, v in expected.items()})
    for loader in loaders:
        loader.close()


@pytest.mark.parametrize("start", [1, 4, 9])
def test_a_restart_at_any_step_goes_on_with_the_same_batches(source, reference, start):
    with TrainLoader(source, VIEW, global_batch=24, seed=3, start_step=start) as loader:
        for expected in reference[start:]:
            assert_same(next(loader), expected)
        assert loader.step == 10


@pytest.mark.parametrize("threads, read_ahead", [(1, 1), (3, 1), (2, 7)])
def test_threads_and_read_ahead_change_nothing(source, reference, threads, read_ahead):
    options = {"threads": threads, "read_ahead": read_ahead}
    with TrainLoader(source, VIEW, global_batch=24, seed=3, **options) as loader:
        for expected in reference:
            assert_same(next(loader), expected)


@pytest.mark.parametrize("workers, start", [(1, 0), (2, 3)])
def test_workers_change_nothing(source, reference, workers, start):
    rows = np.array([0, 1, 2, *range(5, 24)])  # more than a chunk
    options = {"workers": workers, "start_step": start, "rows": rows, "threads": 2}
    with TrainLoader(source, VIEW, global_batch=24, seed=3, **options) as loader:
        for expected in reference[start:]:
            assert_same(next(loader), {k: v[rows] for k, v in expected.items()})


def test_batch_at_is_the_batch_of_the_iterator(source, reference):
    with TrainLoader(source, VIEW, global_batch=24, seed=3, start_step=2) as loader:
        for step in (7, 0, 2):
            assert_same(loader.batch_at(step), reference[step])
        assert_same(next(loader), reference[2])


def test_the_millionth_batch_is_reached_at_once(source):
    with TrainLoader(source, VIEW, global_batch=24, seed=3, start_step=10**6) as loader:
        assert_same(next(loader), loader.batch_at(10**6))
        assert loader.wait_seconds < 5


def test_another_seed_is_another_order_and_other_crops(source, reference):
    with TrainLoader(source, VIEW, global_batch=24, seed=4) as loader:
        batch = next(loader)
    assert (batch["record"] != reference[0]["record"]).any()


def test_a_batch_larger_than_the_data_wraps_into_next_epochs_and_says_so(image_records, caplog):
    tiny = ListSource(tuple(records.encode(r) for r in image_records[:3]))
    with TrainLoader(tiny, VIEW, global_batch=10, seed=0) as loader:
        assert "3 images are fewer than a batch of 10" in caplog.text
        stream = np.concatenate([next(loader)["record"] for _ in range(3)])
    assert [sorted(stream[i : i + 3]) for i in range(0, 30, 3)] == [[0, 1, 2]] * 10


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rows": np.array([], int)}, "one or more integers"),
        ({"rows": np.array([3, 2])}, "ascending"),
        ({"rows": np.array([2, 2])}, "each once"),
        ({"rows": np.array([-1, 2])}, "in 0..23"),
        ({"rows": np.arange(20, 25)}, "in 0..23"),
        ({"rows": np.ones(24, bool)}, "integers"),
        ({"rows": np.arange(24).reshape(2, 12)}, "integers"),
        ({"global_batch": 0}, "at least 1"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**32}, "seed"),
        ({"threads": 0}, "threads >= 1"),
        ({"source": ListSource(())}, "no record"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(source, change, message):
    options = {"source": source, "view": VIEW, "global_batch": 24, "seed": 0} | change
    with pytest.raises(UserError, match=message):
        TrainLoader(**options)


# Damage ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def damaged_source(tmp_path_factory, image_records):
    """40 records; 7 is no record, 12 no image, 21 a truncated image, 30 has a flipped byte."""
    path = tmp_path_factory.mktemp("damaged") / "d.arrayrecord"
    items = [records.encode(r) for r in image_records[:40]]
    items[7] = b"\xff\xfe"
    items[12] = records.encode(dataclasses.replace(image_records[12], image=b"<html>"))
    image = image_records[21].image
    items[21] = records.encode(dataclasses.replace(image_records[21], image=image[:200]))
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    items[30] = records.encode(make_record(encode_image(noise), 30))
    write_shard(path, items)
    contents = bytearray(path.read_bytes())
    contents[contents.index(items[30][2000:2020])] ^= 0xFF
    path.write_bytes(contents)
    return ArrayRecordSource(str(path))


def test_damaged_records_are_replaced_counted_and_named_once(damaged_source, caplog):
    with (
        caplog.at_level(logging.WARNING, "webssl_jax"),
        TrainLoader(damaged_source, VIEW, global_batch=20, seed=1) as loader,
    ):
        batches = [next(loader) for _ in range(4)]
    stream = np.concatenate([b["record"] for b in batches])
    flags = np.concatenate([b["substituted"] for b in batches])
    assert sorted(stream[:40]) == list(range(40))  # the order does not shift
    assert sorted(stream[flags]) == [7, 7, 12, 12, 21, 21, 30, 30]
    assert loader.damage.substituted == 8
    np.testing.assert_array_equal(loader.damage.by_row[:, 0], flags.reshape(4, 20).sum(0))
    assert set(loader.damage.records) == {7, 12, 21, 30}
    lines = sorted(r.getMessage() for r in caplog.records)
    assert len(lines) == 4
    assert {(r.name, r.levelname) for r in caplog.records} == {
        ("webssl_jax.data.pipeline", "WARNING")
    }
    for index, reason in ((7, "not a record"), (12, "not an image"), (30, "hash mismatch")):
        assert sum(f"d.arrayrecord record {index}: " in x and reason in x for x in lines) == 1


def test_the_rows_beside_damage_are_those_of_the_whole_data(damaged_source, image_records):
    whole = ListSource(tuple(records.encode(r) for r in image_records[:40]))
    with (
        TrainLoader(whole, VIEW, global_batch=40, seed=1) as first,
        TrainLoader(damaged_source, VIEW, global_batch=40, seed=1) as second,
    ):
        expected, batch = next(first), next(second)
    np.testing.assert_array_equal(batch["record"], expected["record"])
    good = ~batch["substituted"]
    assert good.sum() == 36
    np.testing.assert_array_equal(batch["image"][good], expected["image"][good])
    assert (batch["image"][~good].max(axis=(1, 2, 3)) > 0).all()


def test_substitutes_are_the_same_on_any_host_and_after_any_restart(damaged_source):
    with TrainLoader(damaged_source, VIEW, global_batch=20, seed=1) as loader:
        expected = [next(loader) for _ in range(4)]
    options = {"global_batch": 20, "seed": 1, "start_step": 2}
    with TrainLoader(damaged_source, VIEW, rows=np.arange(10, 20), **options) as loader:
        for batch in expected[2:]:
            assert_same(next(loader), {k: v[10:] for k, v in batch.items()})


def test_storage_that_fails_now_and_then_changes_no_batch(shards, reference, monkeypatch):
    """A third of all looks at a shard fail; between batches all shards are closed."""
    look, dice = sources._size, random.Random(0)

    def fail(file):
        if dice.random() < 1 / 3:
            raise OSError(errno.EIO, "Input/output error")
        return look(file)

    monkeypatch.setattr(sources, "_size", fail)
    source = ArrayRecordSource(str(shards))
    with TrainLoader(source, VIEW, global_batch=24, seed=3) as loader:
        for expected in reference:
            source._readers.clear()
            assert_same(next(loader), expected)


def test_a_source_of_nothing_but_damage_ends_in_one_line():
    rotten = ListSource((b"junk",) * 30)
    with TrainLoader(rotten, VIEW, global_batch=4, seed=0) as loader:
        with pytest.raises(UserError, match="20 substitutes for it are all damaged") as error:
            next(loader)
    assert "\n" not in str(error.value) and "not a record" in str(error.value)


@pytest.mark.parametrize("limit, batches", [(0.0, 1), (0.10001, 12), (0.09, 10)])
def test_more_damaged_records_than_may_be_end_the_run(damaged_source, monkeypatch, limit, batches):
    """Four of 40 are damaged, and judged from 400 images on: the tenth batch."""
    monkeypatch.setattr(pipeline, "_JUDGED_FROM", 400)
    found = []
    options = {"max_damaged": limit, "on_damage": lambda index, reason: found.append(index)}
    with TrainLoader(damaged_source, VIEW, global_batch=40, seed=1, **options) as loader:
        if limit > 0.1:
            assert [next(loader) for _ in range(batches)]
        else:
            with pytest.raises(UserError, match="d.arrayrecord record .*max_damaged_records"):
                [next(loader) for _ in range(batches)]
    assert sorted(found) == [7, 12, 21, 30]


def test_a_bug_in_a_view_is_not_taken_for_damage(source):
    def broken(data, rng):
        raise KeyError("a bug")

    with TrainLoader(source, broken, global_batch=4, seed=0) as loader:
        with pytest.raises(KeyError, match="a bug"):
            next(loader)


# Processes ------------------------------------------------------------------------------------


def kill_worker(batch):
    """Kills the process that made a batch, which is no other process than a worker."""
    workers = {p.pid for p in multiprocessing.active_children()}
    assert set(batch["pid"]) <= workers and os.getpid() not in batch["pid"]
    assert not batch["jax_started"].any()
    os.kill(int(batch["pid"][0]), signal.SIGKILL)


def test_a_killed_worker_is_started_again_as_often_as_may_be_and_changes_no_batch(source, caplog):
    with TrainLoader(source, WorkerReport(), global_batch=24, seed=3, workers=1) as loader:
        kill_worker(next(loader))
        while not loader.restarts:  # what it had made is used first
            batch, expected = next(loader), loader.batch_at(loader.step - 1)
            np.testing.assert_array_equal(batch["record"], expected["record"])
        assert "a loader process died at step" in caplog.text
        loader._worker_starts = 1
        kill_worker(batch)
        with pytest.raises(TransientError, match="a loader process died at step") as error:
            for _ in range(1000):
                next(loader)
        assert loader.restarts == 1 and "\n" not in str(error.value)


def test_a_killed_run_leaves_no_worker_and_needs_no_parsed_flags(shards, tmp_path):
    script = tmp_path / "run.py"
    script.write_text(
        textwrap.dedent(f"""
        import multiprocessing, time
        from webssl_jax.data.pipeline import TrainLoader
        from webssl_jax.data.sources import ArrayRecordSource
        from webssl_jax.data.views import RandomResizedCropView

        if __name__ == "__main__":
            source = ArrayRecordSource({str(shards)!r})
            view = RandomResizedCropView(16)
            loader = TrainLoader(source, view, global_batch=8, seed=0, workers=1)
            next(loader)
            print(*[p.pid for p in multiprocessing.active_children()], flush=True)
            time.sleep(60)
        """)
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, text=True, env=environment
    )
    pids = [int(pid) for pid in run.stdout.readline().split()]
    run.kill()
    run.wait()
    run.stdout.close()
    assert pids
    deadline = time.monotonic() + 10
    while any(os.path.exists(f"/proc/{pid}") for pid in pids):
        assert time.monotonic() < deadline, "a worker outlived its killed run"
        time.sleep(0.05)


# Evaluation -----------------------------------------------------------------------------------


def test_records_of_interest_are_read_in_order_a_limited_number_from_everywhere(
    source, image_records
):
    def see(record):
        return record.key if record.label else None

    everything = read_some(source, see, threads=3)
    assert [key for _, key in everything] == [r.key for r in image_records if r.label is not None]
    some = read_some(source, see, limit=20, threads=2)
    assert len(some) == 20 and some == sorted(some) and set(some) <= set(everything)
    assert some[-1][0] > 40
    assert read_some(source, see, limit=20, threads=5) == some


def test_damaged_records_are_left_out_and_named(damaged_source, caplog):
    view = Preprocess(16, 18)
    with caplog.at_level(logging.WARNING, "webssl_jax"):
        found = read_some(damaged_source, lambda record: record.label and view(record.image))
    # Of 40 records 5 have no label, and 3 of the others are damaged.
    assert len(found) == 32
    assert sum("record skipped" in r.getMessage() for r in caplog.records) >= 3


# Grain ----------------------------------------------------------------------------------------


def test_grain_shuffles_two_and_a_half_billion_records_without_collision():
    size = 2_500_000_000
    order = grain.MapDataset.range(size).seed(1).shuffle().repeat(None)
    some = [int(order[i]) for i in range(50_000)]
    some += [int(order[size - 1 - i]) for i in range(50_000)]
    assert len(set(some)) == 100_000
    assert 0 <= min(some) and max(some) < size
    # Spread over the whole range, beyond what 31 bits hold.
    assert abs(np.mean(some) / size - 0.5) < 0.01 and max(some) > 2**31
    assert int(order[size]) != some[0]
