"""Claims about tools/curate.py and the two passes under it."""

import dataclasses
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from array_record.python import array_record_module

from tests.curation.pools import (
    TOOL,
    command,
    environment,
    random_captions,
    run,
    slow_match,
    write_pool,
)
from tests.data.conversions import read_shards
from webssl_jax.curation import balancing, passes
from webssl_jax.data import records
from webssl_jax.data.converter import runners

ENTRIES = [
    "dog",
    "Dog",
    "New York",
    "a",
    "flag",
    "a dog",
    "naïve",
    "猫",
    "dog .",
    "nowhere",
    "St. X",
]


@pytest.fixture
def inline(monkeypatch):
    """The commands in this process, whatever the workers."""
    monkeypatch.setattr(runners, "pool", lambda workers: runners.here())


@pytest.fixture
def invoke(inline, monkeypatch, capsys):
    """The tool in this process: (exit code, lines on stderr)."""

    def call(*args):
        monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(TOOL), run_name="__main__")
        return stop.value.code, capsys.readouterr().err.splitlines()

    return call


def write_entries(folder):
    path = folder / "entries.txt"
    path.write_text("".join(f"{entry}\n" for entry in ENTRIES))
    return path


@pytest.fixture
def entries(tmp_path):
    return write_entries(tmp_path)


def curate(tmp_path, pool, entries, threshold=40, seed=0, name="out"):
    """Both passes; returns the folder of the curated shards."""
    index, output = tmp_path / f"{name}-index", tmp_path / name
    passes.match([pool], entries, index)
    passes.balance(index, output, "train", threshold, None, seed)
    return output


def files_of(folder):
    """{name: bytes} of all that a user sees, and of the index."""
    paths = [*folder.glob("*"), *folder.glob(".plan/*.npz")]
    return {path.name: path.read_bytes() for path in paths if path.is_file()}


def make_matched(folder):
    """A pool with both passes done, and much that is wrong beside it."""
    pool = write_pool(folder / "pool", random_captions(5, 50), 2)
    passes.match([pool], write_entries(folder), folder / "index")
    passes.balance(folder / "index", folder / "out", "train", 10, None, 0)
    write_pool(folder / "mute", [[]] * 5, 1)
    write_pool(folder / "foreign", [["zzz"]] * 5, 1)
    (folder / "other.txt").write_text("dog\n")
    (folder / "empty.txt").write_text("")
    (folder / "twice.txt").write_text("dog\ndog\n")
    return folder


@pytest.fixture(scope="module")
def matched(tmp_path_factory):
    """:func:`make_matched`, not to be changed."""
    return make_matched(tmp_path_factory.mktemp("matched"))


def test_counts_and_samples_are_those_of_the_plain_algorithm(tmp_path, entries):
    captions = random_captions(0, 900)
    pool = write_pool(tmp_path / "pool", captions, 3)
    output = curate(tmp_path, pool, entries)
    found = [[slow_match(ENTRIES, text) for text in texts] for texts in captions]
    counts = np.zeros(len(ENTRIES), int)
    for texts in found:
        for ids in texts:
            counts[ids] += 1
    np.testing.assert_array_equal(np.load(tmp_path / "out-index/counts.npy"), counts)
    assert (counts > 40).sum() >= 5 and (counts[-2:] == 0).all()

    kept, after = read_shards(output), np.zeros(len(ENTRIES), int)
    for number, (texts, ids_of) in enumerate(zip(captions, found)):
        record = kept.get(f"key{number}")
        mine = record.captions if record else ()
        assert record is None or record.image == b"image %d" % number
        for text, ids in zip(texts, ids_of):
            if any(counts[i] <= 40 for i in ids):
                assert text in mine  # the tail stays whole
            assert ids or text not in mine
            if text in mine:
                after[ids] += 1
        order = iter(texts)
        assert mine != () or record is None
        assert all(text in order for text in mine)  # in their order, and no others
    stored = json.loads((output / "train.entries.json").read_text())
    assert stored == {e: [a, b] for e, a, b in zip(ENTRIES, counts.tolist(), after.tolist()) if a}
    summary = json.loads((output / "train.summary.json").read_text())
    assert summary["before"]["captions"] == sum(map(len, captions))
    assert summary["before"]["uncaptioned"] == sum(not texts for texts in captions)
    assert summary["before"]["matched_captions"] == sum(bool(i) for ids in found for i in ids)
    assert summary["before"]["entries_that_cannot_match"] == 1
    assert summary["after"]["records"] == len(kept)
    assert summary["after"]["captions"] == sum(len(record.captions) for record in kept.values())
    head = counts > 40
    assert summary["head"]["before"] == counts[head].sum()
    assert summary["head"]["after"] == after[head].sum() < counts[head].sum()
    assert summary["tail"]["after"] == summary["tail"]["before"] == counts[~head].sum()
    assert "head, more than 40" in (output / "train.table.txt").read_text()


def test_every_caption_stays_with_the_probability_of_its_entries(tmp_path, entries):
    """Over seeds: the share of seeds in which a caption stays is 1 - prod(1 - t / count)."""
    captions = [["a dog"]] * 300 + [["dog"]] * 200 + [["flag"]] * 5 + [["flag a"]] * 5
    pool = write_pool(tmp_path / "pool", captions, 1)
    index = tmp_path / "index"
    passes.match([pool], entries, index)
    counts = dict(zip(ENTRIES, np.load(index / "counts.npy")))
    assert (counts["dog"], counts["a"], counts["a dog"], counts["flag"]) == (500, 305, 300, 10)
    found = balancing.Matched.of(pq.read_table(index / "00000.parquet"))
    arrays = found.lengths, found.matches, found.digests
    asked = balancing.probabilities(np.load(index / "counts.npy"), 20)
    kept = np.mean([balancing.sample(*arrays, asked, seed) for seed in range(200)], axis=0)
    expected = 1 - (1 - 20 / 500) * (1 - 20 / 305) * (1 - 20 / 300)
    assert abs(kept[:300].mean() - expected) < 0.005
    assert abs(kept[300:500].mean() - 20 / 500) < 0.004
    assert (kept[500:] == 1).all()


def test_the_same_is_sampled_however_the_pool_is_cut_and_another_with_another_seed(
    tmp_path, entries
):
    captions = random_captions(3, 600)
    found = []
    for shards, seed in ((1, 0), (4, 0), (4, 1)):
        pool = write_pool(tmp_path / f"pool{shards}{seed}", captions, shards)
        output = curate(tmp_path, pool, entries, 20, seed, name=f"out{shards}{seed}")
        assert len(list(output.glob("*.arrayrecord"))) == shards
        found.append(read_shards(output))
    assert found[0] == found[1] and found[0].keys() != found[2].keys()
    assert 50 < len(found[0]) < 500


def start(*args):
    return subprocess.Popen(
        command(*args),
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_killed_and_continued_with_two_workers_is_as_if_nothing_had_happened(tmp_path, entries):
    pool = write_pool(tmp_path / "pool", random_captions(4, 6000), 30)
    whole = curate(tmp_path, pool, entries, 100)
    index, output = tmp_path / "index", tmp_path / "killed"
    steps = [
        (["match", "--input", pool, "--entries", entries], index, "*.parquet"),
        (["balance", "--index", index, "--threshold", 100], output, "*.arrayrecord"),
    ]
    for (args, folder, mark), expected in zip(steps, (tmp_path / "out-index", whole)):
        args += ["--output", folder, "--workers", 2]
        process = start(*args)
        while not list(folder.glob(mark)) and process.poll() is None:
            time.sleep(0.001)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        before = {path: path.stat().st_mtime_ns for path in folder.glob(mark)}
        assert 0 < len(before) < 30
        continued = run(*args)
        assert continued.returncode == 0, continued.stderr
        assert {path: path.stat().st_mtime_ns for path in before} == before  # none written again
        assert len(list(folder.glob(mark))) == 30 and not list(folder.rglob("*.tmp"))
        expected, found = files_of(expected), files_of(folder)
        assert found.keys() == expected.keys()
        assert [name for name in found if found[name] != expected[name]] == []


def test_a_command_that_is_done_says_the_same_again(matched, invoke):
    before = files_of(matched / "index") | files_of(matched / "out")
    pool, index = matched / "pool", matched / "index"
    match = ["match", "--input", pool, "--entries", matched / "entries.txt", "--output", index]
    assert invoke(*match)[0] == 0
    balance = ["balance", "--index", index, "--threshold", 10, "--output", matched / "out"]
    assert invoke(*balance)[0] == 0
    assert files_of(index) | files_of(matched / "out") == before


def test_ctrl_c_stops_with_130_and_says_how_to_go_on(tmp_path, entries):
    pool = write_pool(tmp_path / "pool", random_captions(4, 4000), 40)
    args = ["match", "--input", pool, "--entries", entries, "--output", tmp_path / "index"]
    process = start(*args, "--workers", 1)  # a second one might not have started to ignore it
    while not list((tmp_path / "index").glob("*.parquet")) and process.poll() is None:
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "stopped; the same command continues"
    assert "Traceback" not in errors


def damage(folder):
    """Two records of a shard: one is not a record, one does not match its checksum."""
    path = sorted(Path(folder).glob("*.arrayrecord"))[0]
    reader = array_record_module.ArrayRecordReader(str(path))
    data = [reader.read([i])[0] for i in range(reader.num_records())]
    reader.close()
    writer = array_record_module.ArrayRecordWriter(str(path), records.WRITER_OPTIONS)
    for i, one in enumerate(data):
        writer.write(b"junk" if i == 3 else one)
    writer.close()
    raw = path.read_bytes()
    place = raw.index(data[7])
    path.write_bytes(raw[:place] + b"\xff" + raw[place + 1 :])


def test_damaged_records_are_left_out_counted_and_named(tmp_path, entries, invoke):
    captions = [["a dog"]] * 40
    pool = write_pool(tmp_path / "pool", captions, 2)
    # stored as they are: only then does the damage hit a record's own bytes
    raw = sorted((tmp_path / "pool").iterdir())[0].read_bytes()
    assert b"key7" in raw
    damage(pool)
    index = tmp_path / "index"
    code, errors = invoke("match", "--input", pool, "--entries", entries, "--output", index)
    assert code == 0
    assert errors[-1].startswith("2 damaged records left out (") and "record 3:" in errors[-1]
    summary = json.loads((index / "match.json").read_text())
    assert summary["damaged"]["count"] == 2 and summary["records"] == 40
    assert [name.split(": ")[0][-9:] for name in summary["damaged"]["records"]] == [
        " record 3",
        " record 7",
    ]
    assert summary["captions"] == 38
    code, _ = invoke("balance", "--index", index, "--threshold", 100, "--output", tmp_path / "o")
    assert code == 0 and len(read_shards(tmp_path / "o")) == 38


def test_an_empty_shard_stays_empty_and_patterns_may_be_several(tmp_path, entries):
    pool = write_pool(tmp_path / "pool", [["a dog"], ["flag"]], 3)
    files = sorted(str(path) for path in Path(pool).iterdir())
    passes.match(files, entries, tmp_path / "index")
    passes.balance(tmp_path / "index", tmp_path / "out", "few", 1, None, 0)
    names = sorted(path.name for path in (tmp_path / "out").glob("*.arrayrecord"))
    assert names == [f"few-0000{i}-of-00003.arrayrecord" for i in range(3)]
    assert len(read_shards(tmp_path / "out", "few")) == 2


def test_a_relative_pattern_is_continued_from_any_folder(tmp_path, entries, monkeypatch):
    write_pool(tmp_path / "pool", [["a dog"]] * 10, 2)
    monkeypatch.chdir(tmp_path)
    passes.match(["pool"], entries, tmp_path / "index")
    monkeypatch.chdir("/")
    passes.match([str(tmp_path / "pool")], entries, tmp_path / "index")
    passes.balance(tmp_path / "index", tmp_path / "out", "train", 10, None, 0)
    assert len(read_shards(tmp_path / "out")) == 10


def test_a_tail_share_chooses_the_threshold_and_says_it(tmp_path, entries):
    pool = write_pool(tmp_path / "pool", random_captions(0, 900), 3)
    index = tmp_path / "index"
    passes.match([pool], entries, index)
    counts = np.load(index / "counts.npy")
    summary = passes.balance(index, tmp_path / "out", "train", None, 0.2, 0)
    assert summary["threshold"] == balancing.threshold_of_tail(counts, 0.2)
    assert summary["tail"]["before"] < 0.5 * counts.sum()


@pytest.mark.parametrize(
    "args, says",
    [
        ("match --input pool --entries empty.txt --output new", "empty.txt: holds no entry"),
        ("match --input pool --entries twice.txt --output new", "line 2 repeats line 1"),
        ("match --input mute --entries other.txt --output new", "no record has a caption"),
        ("match --input foreign --entries other.txt --output new", "none is in any of the 5"),
        ("match --input gone --entries other.txt --output new", "no such file or folder"),
        ("match --input pool --entries other.txt --output index", "was begun with --entries"),
        ("match --input mute --entries entries.txt --output index", "was begun with --input"),
        ("match --input pool --entries other.txt --output pool", "from elsewhere"),
        (
            "match --input pool --entries other.txt --output new --worker 1",
            "did you mean '--workers'",
        ),
        ("balance --index gone --threshold 5 --output new", "no complete index"),
        ("balance --index index --threshold 0 --output new", "positive whole number value: '0'"),
        ("balance --index index --threshold 2.5 --output new", "positive whole number"),
        ("balance --index index --tail-share 1 --output new", "share (above 0, below 1)"),
        ("balance --index index --output new", "--threshold --tail-share is required"),
        ("balance --index index --threshold 11 --output out", "begun with --threshold 10, now 11"),
        ("balance --index index --threshold 10 --seed 1 --output out", "begun with --seed 0"),
        ("count --output new", "nothing to count"),
        ("count --text other.txt --output empty.txt", "is a file"),
        ("count --text gone.txt --output new", "gone.txt: cannot be read"),
        ("entries --words other.txt --output pool", "is a folder"),
        ("entries --output new", "no source of entries"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(matched, tmp_path, invoke, monkeypatch, args, says):
    monkeypatch.chdir(matched)
    code, errors = invoke(*args.replace("new", str(tmp_path / "new")).split())
    lines = [line for line in errors if not line.startswith(("matching ", "counting "))]
    assert code == 2 and len(lines) == 1 and says in lines[0], errors


def test_shards_that_changed_after_they_were_matched_are_refused(tmp_path, invoke):
    index, output = make_matched(tmp_path) / "index", tmp_path / "new"
    path = sorted((tmp_path / "pool").iterdir())[0]
    data = path.read_bytes()
    write_pool(tmp_path / "longer", random_captions(6, 60), 1)
    path.write_bytes(next((tmp_path / "longer").iterdir()).read_bytes())
    code, errors = invoke("balance", "--index", index, "--threshold", 5, "--output", output)
    assert code == 2 and path.name in errors[-1] and "when the pass over it began" in errors[-1]
    path.write_bytes(data)
    code, _ = invoke("balance", "--index", index, "--threshold", 5, "--output", output)
    assert code == 0 and len(read_shards(output)) > 5


def test_a_caption_that_is_not_the_matched_one_is_refused(matched):
    number = np.array([0], np.uint32)
    record = records.Record(b"", ("now this",), "key", 1, 1, "pool")
    then = dataclasses.replace(record, captions=("once that",))
    digest = np.array([balancing.text_digest(then, "once that")], np.uint64)
    task = passes._tasks(matched / "index", matched / "out", "train", 0)[0]
    assert balancing._captions(task, then, number, digest) == ("once that",)
    with pytest.raises(balancing.UserError, match="not the one that was matched"):
        balancing._captions(task, record, number, digest)
