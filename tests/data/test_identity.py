"""What a run knows of its records, and what it does when they are others than before."""

import dataclasses
import json
import shutil

import pytest

from tests.data.image_shards import write_shard
from webssl_jax import config as configs
from webssl_jax import runs
from webssl_jax.config import UserError
from webssl_jax.data import records
from webssl_jax.data.damage_list import DamageList
from webssl_jax.data.identity import Identity
from webssl_jax.data.sources import ArrayRecordSource, Shard
from webssl_jax.evaluators.datasets import CAPTIONED, open_dataset

LAST = "train-00003-of-00004.arrayrecord"


def found(folder, **options):
    return Identity.of(ArrayRecordSource(str(folder), **options))


def one_more(folder):
    write_shard(folder / "train-extra.arrayrecord", [b"another"] * 3)


def one_less(folder):
    for index in range(4):
        (folder / records.shard_name("train", index, 4)).rename(folder / f"{index}.arrayrecord")
    (folder / "3.arrayrecord").unlink()


def of_other_records(folder):
    """Of as many records and bytes: only what is in them tells."""
    size, source = (folder / LAST).stat().st_size, ArrayRecordSource(str(folder / LAST))
    write_shard(folder / LAST, [source[15 - i] for i in range(16)])
    assert (folder / LAST).stat().st_size == size


def shorter(folder):
    write_shard(folder / LAST, [b"another"] * 15)


@pytest.mark.parametrize(
    "change, says",
    [
        (one_more, "64 -> 67 records; 1 shard more (train-extra.arrayrecord: 3 records)"),
        (one_less, "64 -> 48 records; 3 shards more (0.arrayrecord: 16 records; 1.arr"),
        (of_other_records, "16 of 64 records that were compared have another content"),
        (shorter, f"64 -> 63 records; 1 shard replaced ({LAST}: 16 -> 15 records)"),
    ],
)
def test_a_run_refuses_records_that_are_not_those_of_its_start(
    shards, tmp_path, caplog, change, says
):
    folder, workdir = shutil.copytree(shards, tmp_path / "set"), tmp_path / "run"
    workdir.mkdir()
    config = configs.load("web_mae:size=tiny", [f"data.train={folder}"])
    runs.check_records(config, workdir, found(folder), 0)
    moved = shutil.copytree(folder, tmp_path / "moved")
    runs.check_records(config, workdir, found(moved), 7)  # the same, elsewhere
    assert not caplog.text
    change(folder)
    with pytest.raises(UserError, match="data.allow_change=true") as error:
        runs.check_records(config, workdir, found(folder), 7)
    assert says in str(error.value) and "until step 7: " in str(error.value)
    config.data.allow_change = True
    runs.check_records(config, workdir, found(folder), 7)
    assert says in caplog.text
    config.data.allow_change = False
    runs.check_records(config, workdir, found(folder), 9)  # from now on these are its own


def test_another_runs_records_are_those_of_the_run_that_continues_it(shards, tmp_path):
    folder = shutil.copytree(shards, tmp_path / "set")
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    overrides = [f"data.train={folder}", f"resume_from={tmp_path / 'first'}"]
    config = configs.load("web_mae:size=tiny", overrides)
    runs.check_records(config, tmp_path / "first", found(folder), 0)
    one_more(folder)
    with pytest.raises(UserError, match="1 shard more"):
        runs.check_records(config, tmp_path / "second", found(folder), 7)


def test_a_record_that_was_damaged_since_is_no_other_record(shards, tmp_path):
    folder = shutil.copytree(shards, tmp_path / "set")
    before = found(folder)
    file = folder / LAST
    data = bytearray(file.read_bytes())
    data[data.index(ArrayRecordSource(str(file))[3][40:60])] ^= 0xFF
    file.write_bytes(data)
    now = found(folder)
    assert now.samples.count("") == 1 and before.changes(now) == now.changes(before) == []
    assert len(open_dataset(str(folder), CAPTIONED)) == 64  # nor does an evaluation end with it
    file.unlink()
    lost = found(folder, max_lost=0.25, known=before.shards, patience=0)
    assert lost.samples.count("") == 16 and before.changes(lost) == []


def test_changes_among_many_shards_are_named_in_numbers(tmp_path):
    names = [f"train-{i:05d}-of-20000.arrayrecord" for i in range(20_000)]
    many = tuple(Shard(name, 10**9, 100_000) for name in names)
    before = Identity(many, ("ab",) * 256)
    before.write(tmp_path / "data.json")
    assert Identity.read(tmp_path / "data.json") == before
    other = tuple(shard._replace(size=shard.size + 1) for shard in many[100:105])
    (total, replaced) = before.changes(
        dataclasses.replace(before, shards=many[:100] + other + many[105:])
    )
    assert total == "2,000,000,000 -> 2,000,000,000 records"
    assert replaced.startswith(f"5 shards replaced ({names[100]}: 1,000,000,000 -> 1,000,000,001 b")
    assert replaced.endswith("; ...)")


def test_what_was_damaged_is_listed_once_over_all_starts(shards, tmp_path):
    folder = shutil.copytree(shards, tmp_path / "set")
    (folder / LAST).unlink()
    file = tmp_path / "damaged.jsonl"
    for _ in range(2):
        source = ArrayRecordSource(str(folder), max_lost=0.25)
        add = DamageList(file, source)
        add(17, "no image")
        add(17, "no image")
    lost, damaged = map(json.loads, file.read_text().splitlines())
    assert lost["shard"] == str(folder / LAST) and "missing" in lost["reason"]
    place = str(folder / "train-00001-of-00004.arrayrecord")
    assert damaged == {"shard": place, "record": 1, "reason": "no image"}
