"""170 random damages of shards: each is refused or stopped by name, or ends in counted substitutes.

What ArrayRecord does was found out with 4,600 more of them: every byte that matters is under a
checksum, so wrong bytes never come back; only a file that is cut while it is open gives none, which
the source takes for damage.
"""

import functools
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.data.image_shards import encode_image, make_record, write_shard
from tests.e2e import runner
from webssl_jax.config import UserError
from webssl_jax.data import inspection, records
from webssl_jax.data.pipeline import TrainLoader
from webssl_jax.data.sources import ArrayRecordSource
from webssl_jax.data.views import RandomResizedCropView

CASES = 170
PER_SHARD = 16
VIEW = RandomResizedCropView(8)


def flip_bit(data, r):
    data[r.randrange(len(data))] ^= 1 << r.randrange(8)


def flip_in_record(data, r):
    data[r.randrange(len(data) // 4)] ^= 0xFF


def flip_in_head(data, r):
    data[r.randrange(128)] ^= 1 << r.randrange(8)


def flip_in_tail(data, r):
    data[-1 - r.randrange(70_000)] ^= 1 << r.randrange(8)


def overwrite(data, r):
    at, n = r.randrange(len(data)), r.randrange(1, 5000)
    data[at : at + n] = r.randbytes(len(data[at : at + n]))


def blank(data, r):
    at, n = r.randrange(len(data)), r.randrange(1, 70_000)
    data[at : at + n] = bytes(len(data[at : at + n]))


def move(data, r):
    at, to, n = r.randrange(len(data)), r.randrange(len(data)), 600
    a, b = data[at : at + n], data[to : to + n]
    n = min(len(a), len(b))
    data[at : at + n], data[to : to + n] = b[:n], a[:n]


def truncate(data, r):
    del data[r.randrange(len(data)) :]


def insert(data, r):
    data[(at := r.randrange(len(data))) : at] = r.randbytes(r.randrange(1, 100))


def append(data, r):
    data += r.randbytes(r.randrange(1, 70_000))


def empty(data, r):
    data.clear()


FILE_DAMAGES = (
    flip_bit, flip_in_record, flip_in_head, flip_in_tail, overwrite, blank, move, truncate, insert,
    append, empty,
)  # fmt: skip


def vanish(path, whole):
    path.unlink()


def become_folder(path, whole):
    path.unlink()
    path.mkdir()


def become_broken_link(path, whole):
    path.unlink()
    path.symlink_to(path.parent / "gone")


def become_another(path, whole):
    write_shard(path, [b"another record"] * PER_SHARD)


def become_html(path, whole):
    path.write_bytes(b"<html>404</html>" * 9000)


PATH_DAMAGES = (vanish, become_folder, become_broken_link, become_another, become_html)


def damage(path, whole, r):
    """Does one thing to a shard; returns its name."""
    if r.random() < 0.2:
        kind = r.choice(PATH_DAMAGES)
        kind(path, whole)
    else:
        kind, data = r.choice(FILE_DAMAGES), bytearray(whole)
        kind(data, r)
        with open(path, "r+b") as file:  # in place: readers that have it open see it
            file.write(data)
            file.truncate()
    return kind.__name__


def attempt(folder, victim, whole, when, seed):
    """One damage; returns (its name, "refused" | "stopped" | "survived", message, substituted)."""
    r = random.Random(seed)
    if when == "before":
        name = damage(victim, whole, r)
    try:
        source = ArrayRecordSource(str(folder), patience=0)
    except UserError as error:
        return name, "refused", str(error), 0
    if when == "open":
        for index in range(0, len(source), PER_SHARD):
            source[index]
    if when != "before":
        name = damage(victim, whole, r)
    reference = reference_batch(str(folder.parent / "whole"))
    with TrainLoader(source, VIEW, global_batch=2 * PER_SHARD, seed=0, threads=2) as loader:
        try:
            batch = next(loader)
        except UserError as error:
            return name, "stopped", str(error), 0
    assert (batch["record"] == reference["record"]).all()
    good = ~batch["substituted"]
    assert (batch["image"][good] == reference["image"][good]).all(), "silently wrong pixels"
    # What the loader replaced is what the inspection names.
    places = []
    inspection.inspect(source, verify=True, on_damage=places.append)
    named = {place.index for place in places}
    assert named == set(batch["record"][~good].tolist()) == set(loader.damage.records)
    return name, "survived", "", int((~good).sum())


@functools.cache
def reference_batch(folder):
    source = ArrayRecordSource(folder)
    with TrainLoader(source, VIEW, global_batch=2 * PER_SHARD, seed=0) as loader:
        return next(loader)


def make_set(folder):
    """Two shards of noise, which no compression makes smaller."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for shard in range(2):
        items = []
        for number in range(PER_SHARD):
            side = int(rng.integers(8, 60))
            image = encode_image(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))
            record = make_record(image, PER_SHARD * shard + number)
            record = records.Record(**vars(record) | {"width": side, "height": side})
            items.append(records.encode(record))
        write_shard(folder / records.shard_name("train", shard, 2), items)


def main(root):
    """All cases, one JSON line each before and after. Its own process: an abort must be seen."""
    make_set(root / "whole")
    folder = root / "set"
    for case in range(CASES):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(root / "whole", folder)
        victim = folder / records.shard_name("train", case % 2, 2)
        when = ("before", "before", "closed", "open")[case % 4]
        print(json.dumps({"case": case}), flush=True)
        outcome = attempt(folder, victim, victim.read_bytes(), when, case)
        print(json.dumps({"case": case, "when": when, "outcome": outcome}), flush=True)


def test_170_random_damages_each_end_in_a_defined_outcome(tmp_path):
    path = os.pathsep.join([str(runner.ROOT), str(pathlib.Path(__file__).parent)])
    child = subprocess.run(
        [sys.executable, __file__, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert child.returncode == 0, child.stdout[-300:] + child.stderr[-3000:]
    rows = [json.loads(line) for line in child.stdout.splitlines()]
    rows = [row for row in rows if "outcome" in row]
    assert [row["case"] for row in rows] == list(range(CASES))
    ends = {"refused": 0, "stopped": 0, "survived": 0}
    for row in rows:
        name, end, message, substituted = row["outcome"]
        ends[end] += 1
        if end == "survived":
            assert row["when"] != "before" or name not in ("truncate", "empty", "vanish"), row
        else:
            assert f"train-0000{row['case'] % 2}-of-00002.arrayrecord" in message, row
            assert "\n" not in message and substituted == 0
            assert row["when"] == ("before" if end == "refused" else row["when"])
    assert min(ends.values()) > 10, ends
    assert sum(row["outcome"][3] > 0 for row in rows) > 20


# A whole training ------------------------------------------------------------------------------


def errors_of(output):
    assert "Traceback" not in output, output
    return [line for line in output.splitlines() if line.startswith("error: ")]


def test_a_training_refuses_a_damaged_set_and_names_every_bad_shard(shards, tmp_path):
    folder = shutil.copytree(shards, tmp_path / "set")
    os.truncate(folder / "train-00001-of-00004.arrayrecord", 70_000)
    os.truncate(folder / "train-00003-of-00004.arrayrecord", 0)
    result = runner.train(tmp_path / "run", {"data.train": folder})
    (error,) = errors_of(result.output)
    assert result.code == 2
    assert "train-00001-of-00004.arrayrecord: the shard cannot be read: " in error
    assert "train-00003-of-00004.arrayrecord: the shard is a file of 0 bytes" in error


def test_a_training_whose_shards_vanish_saves_and_asks_to_be_started_again(image_records, tmp_path):
    for number in range(400):
        item = records.encode(image_records[number % 64])
        write_shard(tmp_path / f"s{number:03d}.arrayrecord", [item])
    overrides = {"data.train": tmp_path} | ENDLESS
    run = tmp_path / "run"
    process = runner.start(run, overrides)
    wait_for_step(process, run, 1)
    for path in tmp_path.glob("*.arrayrecord"):
        path.unlink()
    output, _ = process.communicate(timeout=120)
    error = saved_and_ended(process, output, run)
    assert ".arrayrecord: cannot be read any more (No such file or directory)" in error


ENDLESS = {"total_steps": 50_000, "checkpoint.every_steps": 50_000, "data.retry_minutes": 0}


def saved_and_ended(process, output, run):
    """The one error of a training that has saved the last step that it logged."""
    (error,) = errors_of(output)
    assert process.returncode == 75, output
    step = runner.last_step(run / "metrics.jsonl")
    assert f"saved at step {step} of 50000" in output
    assert (run / "checkpoints" / str(step) / "meta").is_dir()
    return error


def test_a_training_whose_loader_processes_die_saves_and_asks_to_be_started_again(shards, tmp_path):
    overrides = {"data.train": shards, "data.workers": 1} | ENDLESS
    process = runner.start(tmp_path, overrides)
    wait_for_step(process, tmp_path, 1)
    runner.kill_loader_worker(process)
    output, _ = process.communicate(timeout=120)
    assert "a loader process died at step" in saved_and_ended(process, output, tmp_path)


@pytest.mark.slow
def test_the_count_of_substitutes_is_that_of_all_hosts(image_records, tmp_path):
    items = [records.encode(r) for r in image_records]
    for number in (3, 20, 21, 50, 63):
        items[number] = b"junk"
    write_shard(tmp_path / "a.arrayrecord", items)
    overrides = {"data.train": tmp_path / "a.arrayrecord", "total_steps": 8, "global_batch": 16}
    counts = []
    for processes, rows in ((1, {}), (2, {}), (2, {"sharding.tensor": 2, "sharding.fsdp": 1})):
        workdir = tmp_path / f"run{len(counts)}"
        changes = overrides | rows
        results = runner.train_together(workdir, processes, overrides=changes)
        assert [r.code for r in results] == [0] * processes, results[0].output
        lines = (workdir / "metrics.jsonl").read_text().splitlines()
        counts.append(json.loads(lines[-1])["data/substituted_images"])
    # Two epochs of 64 images in 8 steps of 16; the last row is written when all were delivered.
    assert counts == [10, 10, 10]


def wait_for_step(process, workdir, step):
    deadline = time.monotonic() + 240
    path = workdir / "metrics.jsonl"
    while not (path.exists() and runner.last_step(path) >= step):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
