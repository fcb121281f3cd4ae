"""A million captions and half a million entries: curated in linear time and bounded memory, killed
twice on the way, with the counts of a slow reference.

Also a command that prints times and memory: python -m tests.curation.test_million_captions 100000
"""

import functools
import json
import pathlib
import sys
import tempfile

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.curation.pools import spaced
from tests.data.test_million_records import ROOT, run
from webssl_jax.curation.balancing import Matched
from webssl_jax.curation.matching import words_of
from webssl_jax.data import records
from webssl_jax.data.converter.work import temporary_shard

PER_SHARD = 10_000
ENTRIES = 500_000
MARKS = np.array([" ", " ", " ", " ", " ", ", ", ". ", "! ", "  ", "\t"])


@functools.cache
def vocabulary():
    """Half a million words of one to five syllables, the frequent ones short."""
    rng = np.random.default_rng(1)
    syllables = np.array([a + b for a in "bdfgklmnprstvz" for b in "aeiouyäé"])
    words = dict.fromkeys(syllables)
    for n in (2, 3, 3, 4, 4, 5):
        for row in syllables[rng.integers(0, len(syllables), (200_000, n))].tolist():
            words["".join(row)] = None
    return np.array(list(words)[:500_000])


def captions_of(shard, count):
    """Captions of three to twenty words, drawn as Zipf has them, with marks between them."""
    rng = np.random.default_rng([2, shard])
    words = vocabulary()
    lengths = rng.integers(3, 21, count)
    ranks = np.minimum(np.exp(rng.random(lengths.sum()) * np.log(len(words))), len(words)) - 1
    drawn = words[ranks.astype(int)]
    marks = MARKS[rng.integers(0, len(MARKS), lengths.sum())]
    pieces = [word + mark for word, mark in zip(drawn.tolist(), marks.tolist())]
    ends = np.cumsum(lengths)
    return ["".join(pieces[end - n : end]) for n, end in zip(lengths.tolist(), ends.tolist())]


def make_entries():
    """Words, and pairs and triples as texts have them; some with marks, some that nobody writes."""
    words = vocabulary()
    entries = dict.fromkeys(words[:200_000].tolist())
    shard = 10**6  # texts of their own
    while len(entries) < ENTRIES:
        for caption in captions_of(shard, 20_000):
            found = words_of(caption) if shard % 4 else caption.split(" ")
            for n in (2, 3):
                entries |= dict.fromkeys(
                    " ".join(found[i : i + n]) for i in range(0, len(found) - n, 3)
                )
        entries.pop("", None)
        shard += 1
    return list(entries)[:ENTRIES]


def write_pool(folder, count):
    """Records of two captions, in shards of ``PER_SHARD`` captions."""
    folder.mkdir()
    shards = -(-count // PER_SHARD)
    for shard in range(shards):
        texts = captions_of(shard, min(PER_SHARD, count - shard * PER_SHARD))

        def write(writer, shard=shard, texts=texts):
            for i in range(0, len(texts), 2):
                mine = tuple(texts[i : i + 2])
                writer.write(
                    records.encode(records.Record(b"image", mine, f"{shard}-{i}", 1, 1, "made"))
                )
            return -(-len(texts) // 2)

        path = folder / records.shard_name("train", shard, shards)
        with temporary_shard(path, write) as temporary:
            temporary.replace(path)


def check_counts(count, entries, counts, index):
    """Against each entry looked for by itself: some entries in all captions, and all entries in
    some captions."""
    rng = np.random.default_rng(3)
    frequent = np.argsort(-counts)[:50]
    some = np.unique(np.concatenate([frequent, rng.integers(0, len(entries), 50)]))
    padded = [f" {entries[i]} " for i in some]
    found = np.zeros(len(some), int)
    for shard in range(-(-count // PER_SHARD)):
        texts = captions_of(shard, min(PER_SHARD, count - shard * PER_SHARD))
        for text in map(spaced, texts):
            found += [entry in text for entry in padded]
        if shard == 0:
            first = texts[:100]
    np.testing.assert_array_equal(found, counts[some])

    matched = Matched.of(pq.read_table(index / "00000.parquet"))
    places = 2 * matched.places + matched.numbers
    ends = np.cumsum(matched.lengths)
    rows = dict(zip(places.tolist(), np.split(matched.matches, ends[:-1])))
    padded = [f" {entry} " for entry in entries]
    for place, text in enumerate(map(spaced, first)):
        mine = [i for i, entry in enumerate(padded) if entry in text]
        assert mine == rows.get(place, np.zeros(0)).tolist(), text


def times(folder, mark):
    """{file of a finished shard: when it was written}."""
    return {path: path.stat().st_mtime_ns for path in folder.glob(mark)}


def journey(folder, count, kill):
    """{stage: what it took}, after checking the counts; with ``kill`` both passes are killed when a
    third is done, and continued."""
    pool, index, output = folder / "pool", folder / "index", folder / "out"
    entries = make_entries()
    (folder / "entries.json").write_text(json.dumps(entries))
    write_pool(pool, count)
    shards = -(-count // PER_SHARD)
    tool = [ROOT / "tools" / "curate.py"]
    match = [*tool, "match", "--input", pool, "--entries", folder / "entries.json"]
    balance = [*tool, "balance", "--index", index, "--threshold", max(count // 1000, 20)]
    stages = {}
    for name, command, made, mark in (
        ("match", match, index, "*.parquet"),
        ("balance", balance, output, "*.arrayrecord"),
    ):
        command = [*command, "--output", made, "--workers", 2]
        done = functools.partial(times, made, mark)
        before = {}
        if kill:
            stages[f"{name}, killed"] = run(command, lambda done=done: len(done()) > shards // 3)
            assert stages[f"{name}, killed"].code == -9, stages[f"{name}, killed"].output
            before = done()
            assert 0 < len(before) < shards
            name += ", continued"
        stages[name] = run(command)
        assert stages[name].code == 0, stages[name].output
        after = done()
        assert {path: after[path] for path in before} == before  # none was written again
    counts = np.load(index / "counts.npy")
    summary = json.loads((output / "train.summary.json").read_text())
    assert summary["before"]["captions"] == count and summary["before"]["entries"] == ENTRIES
    assert 0 < summary["after"]["captions"] < summary["before"]["matched_captions"]
    assert summary["tail"]["after"] == summary["tail"]["before"] > 0
    check_counts(count, entries, counts, index)
    return stages


@pytest.mark.slow
def test_a_million_captions_in_bounded_memory_killed_twice_with_the_reference_counts(tmp_path):
    for name, stage in journey(tmp_path, 1_000_000, kill=True).items():
        assert stage.megabytes < 1024, f"{name}: {stage.megabytes:.0f} MB"


if __name__ == "__main__":
    for size in map(int, sys.argv[1:]):
        with tempfile.TemporaryDirectory() as where:
            for stage, took in journey(pathlib.Path(where), size, kill=False).items():
                print(
                    f"{size:>9,} {stage:8} {took.seconds:7.1f} s, {took.cpu_seconds:7.1f} s of "
                    f"CPU, at most {took.megabytes:6.0f} MB a process",
                    flush=True,
                )
