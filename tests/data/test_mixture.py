"""Several sources in one stream, each with its share."""

import collections
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.image_shards import encode_image, make_record, write_shard
from tests.e2e import runner
from webssl_jax.config import ConfigError, UserError
from webssl_jax.data import records
from webssl_jax.data.mixture import BLOCK, Mixture, Schedule, parts
from webssl_jax.data.pipeline import TrainLoader
from webssl_jax.data.sources import ArrayRecordSource
from webssl_jax.data.views import RandomResizedCropView
from webssl_jax.tools import peek

VIEW = RandomResizedCropView(16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three sources of 30, 10 and 20 records; two of the last are no image."""
    folder = tmp_path_factory.mktemp("mixture")
    pixels = np.random.default_rng(0).integers(0, 256, (60, 20, 20, 3), np.uint8)
    encoded = [records.encode(make_record(encode_image(one), i)) for i, one in enumerate(pixels)]
    encoded[41] = encoded[55] = b"not a record"
    for name, start, end in (("a", 0, 30), ("b", 30, 40), ("c", 40, 60)):
        (folder / name).mkdir()
        middle = (start + end) // 2
        for i, items in enumerate((encoded[start:middle], encoded[middle:end])):
            write_shard(folder / name / f"s-{i:05d}-of-00002.arrayrecord", items)
    return folder


def mixed(folder, steps=1000, batch=16, **rows):
    found = parts({name: {"train": str(folder / name), **row} for name, row in rows.items()})
    return Mixture(found, [ArrayRecordSource(part.train) for part in found], batch, steps)


def selection(path, *rows):
    shards, numbers = zip(*rows, strict=True)
    pq.write_table(pa.table({"shard": shards, "record": numbers}), path)
    return str(path)


def test_each_part_has_its_share_of_every_batch_and_passes_through_its_own_epochs(folder):
    source = mixed(folder, a={"share": 1}, b={"share": 2.0}, c={"share": 1})
    order = source.order(5)
    stream = np.array([order[i] for i in range(160)])
    part = np.array([source.part_of(i) for i in stream])
    for batch in part.reshape(10, 16):
        assert np.abs(np.bincount(batch, minlength=3) - (4, 8, 4)).max() <= 1
    assert source.schedule.seen(160).tolist() == np.bincount(part).tolist() == [40, 80, 40]
    for number, (first, size) in enumerate(((0, 30), (30, 10), (40, 20))):
        own = stream[part == number]
        for epoch in range(len(own) // size):
            seen = own[epoch * size : (epoch + 1) * size]
            assert sorted(seen) == list(range(first, first + size))
    assert [order[i] for i in (7, 159)] == stream[[7, 159]].tolist()  # not by what came before
    other = source.order(6)
    assert [other[i] for i in range(160)] != stream.tolist()


def test_a_schedule_of_shares_changes_at_its_percents_and_never_skips_a_record(folder):
    rows = {"a": {"share": ((0, 1), (50, 0), (75, 1))}, "b": {"share": ((0, 0), (50, 3))}}
    source = mixed(folder, steps=10, batch=12, **rows)
    order = source.order(0)
    part = [source.part_of(order[i]) for i in range(120)]
    assert set(part[:60]) == {0} and set(part[60:96]) == {1}  # 75 % of 10 steps is step 8
    assert collections.Counter(part[96:]) == {0: 6, 1: 18}
    places = [[source.schedule.at(i)[1] for i in range(120) if part[i] == p] for p in (0, 1)]
    assert places == [list(range(66)), list(range(54))]
    assert source.schedule.seen(96).tolist() == [60, 36]


def test_shares_are_exact_in_every_block_however_odd():
    rows = {"a": {"train": "x", "share": 1 / 3}, "b": {"train": "x", "share": 0.123456}}
    schedule = Schedule(parts(rows), 8, 10)
    each = schedule.seen(BLOCK)
    assert each.sum() == BLOCK and abs(each[0] / BLOCK - 0.729750) < 1e-4
    assert (schedule.seen(3 * BLOCK + 17) - schedule.seen(17) == 3 * each).all()


def test_a_selection_shows_only_its_records_and_hands_its_numbers_to_the_log(folder, tmp_path):
    rows = [("s-00001-of-00002.arrayrecord", 3), ("s-00000-of-00002.arrayrecord", 2)]
    chosen = selection(tmp_path / "chosen.parquet", *rows)
    source = mixed(folder, a={}, c={"selection": chosen})
    assert len(source) == 32 and source.counts == [30, 2]
    assert [source.describe(i).split("/")[-1] for i in (30, 31)] == [
        "s-00000-of-00002.arrayrecord record 2",
        "s-00001-of-00002.arrayrecord record 3",
    ]
    assert [shard.records for shard in source.shards] == [15, 15, 1, 1]
    some, again = (mixed(folder, c={"selection": chosen, "cap": 1}, a={"cap": 7}) for _ in "ab")
    assert some.counts == [1, 7] and sum(shard.records for shard in some.shards) == 8
    seen = [some[i] for i in range(8)]
    assert len(set(seen)) == 8 and [again[i] for i in range(8)] == seen
    assert mixed(folder, a={"cap": 30}, c={"selection": chosen, "cap": 5}).counts == [30, 2]
    assert records.decode(source[31]).key == make_record(b"", 53).key


def test_a_damaged_record_is_replaced_from_its_own_part_and_counted_there(folder):
    source = mixed(folder, a={}, c={"share": 1.0})
    with TrainLoader(source, VIEW, global_batch=16, seed=1) as loader:
        batches = [next(loader) for _ in range(5)]
        again = loader.batch_at(3)
    for name, values in batches[3].items():
        np.testing.assert_array_equal(again[name], values)
    assert loader.damage.by_row.sum(0).tolist() == [0, 4]  # two of c, in two epochs
    assert set(loader.damage.records) == {31, 45}
    assert all(30 <= candidate < 50 for candidate in loader._load._candidates(31))


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ({"a": {"train": "x", "shares": 1}}, r"mixture\.a\.shares: did you mean 'share'"),
        ({"a": {"share": 1}}, r"mixture\.a\.train: name the shards"),
        ({"a": {"train": "x", "share": -1}}, "must be a number from 0 on"),
        ({"a": {"train": "x", "cap": 0.5}}, r"mixture\.a\.cap = 0.5: must be a number from 0"),
        ({"a": {"train": "x", "share": ((5, 1),)}}, "must be a number from 0 on"),
        ({"a": {"train": "x", "share": ((0, 1), (50, 0))}}, "at 50 % of the run all shares are 0"),
    ],
)
def test_a_bad_row_is_named(rows, says):
    with pytest.raises(ConfigError, match=says):
        parts(rows)


def test_a_share_below_one_image_in_a_block_and_a_selection_that_does_not_fit_are_named(
    folder, tmp_path
):
    rows = {"a": {"train": "x"}, "b": {"train": "x", "share": 1e-6}}
    with pytest.raises(ConfigError, match=r"mixture\.b\.share: 1e-06 of 1 is less than one image"):
        Schedule(parts(rows), 8, 10)
    name = "s-00000-of-00002.arrayrecord"
    for rows, says in (
        ([("other", 0)], "names the shard 'other', which is not in"),
        ([(name, 15)], f"names record 15 of {name}, which has 15"),
        ([(name, 1), (name, 1)], "record 1 twice"),
        ([(name, 0.5)], "cannot be read as parquet"),
        ([(name, "x")], "cannot be read as parquet"),
        ([(name, 0), (None, 1)], "rows without a shard or a record"),
        ([(name, 0), (name, None)], "rows without a shard or a record"),
    ):
        with pytest.raises(UserError, match=says):
            mixed(folder, a={"selection": selection(tmp_path / "chosen.parquet", *rows)})
    both = {"train": f"{folder / 'a'},{folder / 'b'}"}
    with pytest.raises(UserError, match=f"'{name}', which is that of several of"):
        mixed(folder, a=both | {"selection": selection(tmp_path / "two.parquet", (name, 0))})
    with pytest.raises(UserError, match=r"nowhere\.parquet: cannot be read as parquet"):
        mixed(folder, a={"selection": str(tmp_path / "nowhere.parquet")})


def test_a_run_logs_each_part_keeps_its_shares_and_can_be_peeked_at(folder, tmp_path, capsys):
    rows = {f"mixture.{name}.train": folder / name for name in ("a", "c")}
    settings = {"data.train": "", **rows, "mixture.c.share": 3, "total_steps": 6}
    result = runner.train(tmp_path / "run", settings)
    assert result.code == 0, result.output
    changed = runner.train(tmp_path / "run", {**settings, "mixture.c.share": 1})
    assert changed.code == 2 and "config.mixture.c.share: 3 -> 1" in changed.output
    with open(tmp_path / "run" / "metrics.jsonl") as file:
        row = json.loads(file.readlines()[-1])
    assert {name: row[f"data/{name}/epochs"] for name in ("a", "c")} == {"a": 0.8, "c": 3.6}
    assert row["data/c/substituted_images"] == row["data/substituted_images"] > 0
    assert row["data/a/substituted_images"] == 0
    assert json.load(open(tmp_path / "run" / "data.json"))["records"] == 50

    sheet = tmp_path / "sheet.png"
    arguments = ["--config", str(tmp_path / "run" / "config.json"), "--output", str(sheet)]
    assert peek.main(arguments) == 0 and sheet.stat().st_size
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[2:4] == [["a", "30", "24", "25.0%", "0.80"], ["c", "20", "72", "75.0%", "3.60"]]
