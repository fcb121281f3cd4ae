"""A million tiny records scored, selected from, freed of near-duplicates and sampled by clusters:
in bounded memory, and killed ten times at random with the same files to the byte.

Also a command that prints times, rates and memory: python -m tests.curation.test_million_scores N
KILLS=1 before it kills as the test does; BEAM=PYTHON, of an environment with apache-beam, has
Beam's DirectRunner do what Beam can do, too, and compares.
"""

import functools
import hashlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.data.test_million_records import ROOT, run, tiny_png
from webssl_jax.data import records
from webssl_jax.data.converter.work import temporary_shard
from webssl_jax.data.sources import ArrayRecordSource
from webssl_jax.evaluators import feature_files

COUNT = int(os.environ.get("CURATED_RECORDS", 20_000))
SHARDS = 20  # and files of features; a multiple of 10
WIDTH = 32
KILLS = 10
DAMAGED, UNREADABLE = 8, 7  # of each thousand records: the place of one


def write_shards(folder, count):
    """``count`` records in SHARDS shards. Of each thousand one is damaged and one is no image."""
    folder.mkdir()
    each = count // SHARDS
    for shard in range(SHARDS):

        def write(writer, first=shard * each):
            for number in range(first, first + each):
                image = b"no image" if number % 1000 == UNREADABLE else tiny_png(number)
                record = records.Record(image, (), f"{number:07d}", 8, 8, "made")
                junk = number % 1000 == DAMAGED
                writer.write(b"junk" if junk else records.encode(record))
            return each

        with temporary_shard(folder / records.shard_name("p", shard, SHARDS), write) as temporary:
            temporary.replace(folder / records.shard_name("p", shard, SHARDS))


def write_features(folder, shards, count):
    """Drawn at random; those of the last tenth are like those of the first."""
    folder.mkdir()
    facts = {"weights": "made", "images": count, "columns": ["cls"], "dtype": "float32"}
    facts["input"] = feature_files.input_digest(ArrayRecordSource(str(shards)))
    (folder / feature_files.FACTS).write_text(json.dumps(facts))
    each = count // SHARDS
    for part in range(SHARDS):
        like = part - SHARDS * 9 // 10
        rows = np.random.default_rng([0, part if like < 0 else like]).normal(size=(each, WIDTH))
        if like >= 0:
            rows += 0.03 * np.random.default_rng([1, part]).normal(size=rows.shape)
        numbers = np.arange(part * each, (part + 1) * each)
        gone = np.isin(numbers % 1000, (DAMAGED, UNREADABLE))
        images = [
            feature_files._Image(int(i), f"{i:07d}", None, None, "gone" if gap else None)
            for i, gap in zip(numbers, gone, strict=True)
        ]
        table = feature_files._table(images, {"cls": rows[~gone].astype(np.float32)}, "float32")
        feature_files._save(table, folder / f"part-{part:05d}-of-{SHARDS:05d}.parquet")


def commands(folder):
    """{stage: (arguments, whether it goes on after a kill)}."""
    tool, shards = [ROOT / "tools" / "curate.py"], folder / "shards"
    features = ["--features", folder / "features", "--input", shards]
    out = folder / "out"
    return {
        "score": [*tool, "score", "--input", shards, "--scorer", "statistics", "--workers", 2]
        + ["--output", out / "scores"],
        "select": [*tool, "select", "--scores", out / "scores", "--where", "width > 1"]
        + ["--top-share", 0.1, "--by", "bytes", "--output", out / "top"],
        "dedup": [*tool, "dedup", *features, "--threshold", 0.98, "--exact", 5000]
        + ["--output", out / "once"],
        "cluster": [*tool, "cluster", *features, "--levels", "200,20", "--share", 0.25]
        + ["--output", out / "even"],
    }


def contents(folder):
    """{path: digest} of all that a user sees."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and ".plan" not in path.parts
    }


def whole(folder, count):
    """{stage: what it took} of all commands, one after the other; each is printed."""
    stages = {}
    for name, command in commands(folder).items():
        stage = stages[name] = run(command)
        assert stage.code == 0, stage.output
        print(
            f"{count:>9,} {name:8} {stage.seconds:7.1f} s, {stage.cpu_seconds:7.1f} s of CPU, "
            f"{1e6 * stage.cpu_seconds / count:7.1f} us a record, at most "
            f"{stage.megabytes:6.0f} MB a process",
            flush=True,
        )
    return stages


def killed(folder, seconds):
    """The same, killed KILLS times at moments drawn over ``seconds`` of each stage."""
    rng = np.random.default_rng()
    share = np.array(list(seconds.values()))
    stage_of = rng.choice(len(share), KILLS, p=share / share.sum())
    kills = 0
    for number, (name, command) in enumerate(commands(folder).items()):
        moments = np.sort(rng.uniform(0, seconds[name], (stage_of == number).sum()))
        for wait in np.diff(moments, prepend=0):
            end = time.monotonic() + wait
            stage = run(command, functools.partial(_is_past, end))
            assert stage.code in (-9, 0), stage.output
            kills += stage.code == -9
        stage = run(command)
        assert stage.code == 0, stage.output
    return kills


def _is_past(end):
    return time.monotonic() > end


def check(folder, count):
    """What was planted was found, and what is damaged is counted under its name."""
    out = folder / "out"
    scores = json.loads((out / "scores" / "scores.json").read_text())
    assert scores["records"] == count
    assert scores["problems"] == {"damaged": count // 1000, "undecodable": count // 1000}
    top = json.loads((out / "top" / "selection.json").read_text())
    assert top["kept"] == count // 10 and top["without_score"] == count // 500
    once = json.loads((out / "once" / "dedup.json").read_text())
    assert once["cells"] > 1 and once["without_features"] == count // 500
    assert once["dropped"] > 0.99 * count * (0.1 - 0.0002)
    even = pq.read_table(out / "even" / "selection.parquet")
    assert len(even) == count // 4 == len(set(even["key"].to_pylist()))


def on_beam(folder, count, python):
    """What Beam's DirectRunner makes of score and dedup is what processes have made."""
    options = "--beam-options=--runner=DirectRunner --direct_num_workers=2"
    for name in ("score", "dedup"):
        command = [str(x) for x in commands(folder)[name]]
        place = pathlib.Path(command[-1])
        output = folder / "beam" / place.name
        began = time.monotonic()
        subprocess.run(
            [python, *command[:-1], str(output), "--runner", "beam", options],
            env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
            check=True,
        )
        found, expected = contents(output), contents(place)
        assert found.keys() == expected.keys()
        assert [path for path in found if found[path] != expected[path]] == []
        print(f"{count:>9,} {name:8} {time.monotonic() - began:7.1f} s on Beam, the same bytes")


def journey(folder, count, kills=True):
    """{stage: what it took without a kill}, and how often it was killed afterwards."""
    write_shards(folder / "shards", count)
    write_features(folder / "features", folder / "shards", count)
    stages = whole(folder, count)
    check(folder, count)
    if python := os.environ.get("BEAM"):
        on_beam(folder, count, python)
    if not kills:
        return stages, 0
    expected = contents(folder / "out")
    (folder / "out").rename(folder / "first")
    hit = killed(folder, {name: stage.seconds for name, stage in stages.items()})
    found = contents(folder / "out")
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []
    return stages, hit


@pytest.mark.slow
def test_records_are_curated_in_bounded_memory_and_kills_change_no_byte(tmp_path):
    stages, kills = journey(tmp_path, COUNT)
    assert kills > KILLS // 2
    for name, stage in stages.items():
        assert stage.megabytes < 1536, f"{name}: {stage.megabytes:.0f} MB"


if __name__ == "__main__":
    for size in map(int, sys.argv[1:]):
        with tempfile.TemporaryDirectory() as where:
            _, times = journey(pathlib.Path(where), size, kills="KILLS" in os.environ)
            if times:
                print(f"{size:>9,} killed {times} times, then the same bytes", flush=True)
