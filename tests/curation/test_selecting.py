"""Scores of records, selections from them, and what training then sees."""

import dataclasses
import html
import json
import shutil
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.image_shards import encode_image, make_record, write_shard
from webssl_jax.config import UserError
from webssl_jax.curation import scorers, scores, selecting
from webssl_jax.curation.expressions import Condition, Expression
from webssl_jax.data import records
from webssl_jax.data.converter import items
from webssl_jax.data.decode import decode_image
from webssl_jax.data.mixture import Mixture, parts
from webssl_jax.data.sources import ArrayRecordSource
from webssl_jax.tools import curate


@dataclasses.dataclass(frozen=True)
class Grey:
    """The first pixel; and its tens, so that many are equal."""

    version: ClassVar[int] = 1
    columns: ClassVar[dict] = {"grey": pa.int32(), "tens": pa.float32()}

    def __call__(self, batch):
        first = [np.asarray(decode_image(record.image))[0, 0, 0] for record in batch]
        return [{"grey": int(value), "tens": float(value // 10)} for value in first]


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """80 greys in two shards, no two the same; one record is damaged, one is no image."""
    folder = tmp_path_factory.mktemp("pool")
    greys = np.random.default_rng(1).permutation(80).astype(np.uint8)
    made = [
        make_record(encode_image(np.full((4, 4, 3), g, np.uint8)), i) for i, g in enumerate(greys)
    ]
    made[50] = make_record(b"no image", 50)
    encoded = [records.encode(one) for one in made]
    encoded[7] = b"not a record"
    for i in range(2):
        name = folder / f"p-{i:05d}-of-00002.arrayrecord"
        write_shard(name, encoded[40 * i : 40 * (i + 1)])
    return folder, greys


@pytest.fixture(scope="module")
def scored(pool, tmp_path_factory):
    output = tmp_path_factory.mktemp("scores") / "grey"
    return output, scores.score([str(pool[0])], Grey(), output)


def kept_keys(folder):
    return [int(key) for key in pq.read_table(folder / "selection.parquet")["key"].to_pylist()]


def test_every_record_has_its_score_or_its_problem_under_a_name(pool, scored):
    output, summary = scored
    assert summary["records"] == 80 and summary["problems"] == {"damaged": 1, "undecodable": 1}
    table = pa.concat_tables(scores.tables([output], ["grey", "problem", "record"]))
    expected = [None if i in (7, 50) else int(grey) for i, grey in enumerate(pool[1])]
    assert table["grey"].to_pylist() == expected
    assert table["record"].to_pylist() == [*range(40), *range(40)]
    assert table["problem"][50].as_py().startswith("undecodable: not an image")


def test_a_bad_image_is_counted_by_the_name_that_the_converter_gives_it(monkeypatch):
    monkeypatch.setattr("webssl_jax.data.decode.MAX_PIXELS", 15)
    for data in (b"", b"no image", encode_image(np.zeros((4, 4, 3), np.uint8))):
        (scored,) = scores._score(Grey(), [make_record(data, 0)])
        dropped, _ = items.make_record(items.Candidate("key", data), "web", items.Rules())
        assert scored["problem"].partition(":")[0] == dropped.reason


def test_a_pass_that_was_cut_short_ends_with_the_same_files(pool, scored, tmp_path):
    output, _ = scored
    again = tmp_path / "again"
    shutil.copytree(output, again)
    (again / "00001.parquet").unlink()
    (again / "scores.json").unlink()
    (again / "00001.parquet.tmp").write_bytes(b"half")
    with pytest.raises(UserError, match="no complete scores there"):
        scores.tables([again], ["grey"])
    scores.score([str(pool[0])], Grey(), again)
    for path in output.glob("[0-9s]*"):
        assert (again / path.name).read_bytes() == path.read_bytes()
    assert not list(again.glob("*.tmp"))
    with pytest.raises(UserError, match="was begun with --scorer"):
        scores.score([str(pool[0])], scorers.make("statistics"), again)


def test_a_share_is_kept_to_the_record_and_ties_do_not_depend_on_anything(pool, scored, tmp_path):
    greys = {i: int(grey) for i, grey in enumerate(pool[1]) if i not in (7, 50)}
    figures = selecting.select([scored[0]], tmp_path / "a", None, 0.1, "grey")
    highest = sorted(greys, key=greys.get)[-8:]
    assert kept_keys(tmp_path / "a") == sorted(highest)
    assert figures["threshold"] == min(greys[i] for i in highest)
    assert (figures["kept"], figures["dropped"], figures["without_score"]) == (8, 70, 2)

    chosen = []
    for name in ("b", "c"):
        figures = selecting.select([scored[0]], tmp_path / name, None, 0.15, "tens")
        chosen.append(kept_keys(tmp_path / name))
    assert chosen[0] == chosen[1] and len(chosen[0]) == 12
    assert {i for i in greys if greys[i] >= 70} < set(chosen[0])
    assert all(greys[i] >= 60 for i in chosen[0])
    last = [i for i in greys if greys[i] // 10 == 6]
    assert (figures["alike_kept"], figures["alike"]) == (len({*last} & {*chosen[0]}), len(last))


def test_a_condition_is_what_it_says_also_over_several_scores(pool, scored, tmp_path):
    second = tmp_path / "second"
    scores.score([str(pool[0])], scorers.make("statistics:side=4"), second)
    where = Condition("20 <= grey < 30 and not tens * 10 == grey or -width > 0")
    figures = selecting.select([scored[0], second], tmp_path / "out", where)
    greys = {i: int(grey) for i, grey in enumerate(pool[1])}
    assert set(kept_keys(tmp_path / "out")) == {i for i in greys if 20 < greys[i] < 30} - {7, 50}
    assert figures == json.loads((tmp_path / "out" / "selection.json").read_text())
    page = (tmp_path / "out" / "index.html").read_text()
    for name in ("selection", "kept", "dropped"):
        assert (tmp_path / "out" / f"{name}.png").exists() and f'src="{name}.png"' in page
    for key, value in figures.items():
        shown = html.escape(value) if key == "where" else value
        if key in ("where", "records", "without_score", "kept", "dropped"):
            assert f"<td>{key.replace('_', ' ')}</td><td>{shown}</td>" in page


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("grey >", "invalid syntax"),
        ("grey", "is no condition"),
        ("__import__('os') > 1", "cannot read"),
        ("grey ** 2 > 1", "cannot read"),
        ("grey is 1", "cannot read"),
        ("not grey", "cannot be computed"),
        ("(grey > 1) - (grey > 2)", "cannot be computed"),
        ("1 / 0 < grey", "cannot be computed"),
        ("grey > 1" + "0" * 400, "cannot be computed"),
        ("", "invalid syntax"),
    ],
)
def test_a_text_that_is_no_condition_is_refused_before_anything_is_read(text, says):
    with pytest.raises(UserError, match=says):
        Condition(text)
    with pytest.raises(UserError, match="--by 'grey > 1': is no number"):
        Expression("grey > 1", "--by")
    with pytest.raises(UserError, match="--where '': invalid syntax"):
        curate.main(["select", "--scores", "x", "--where", "", "--output", "y"])


def test_a_share_can_be_kept_by_several_columns_together(pool, scored, tmp_path):
    figures = selecting.select([scored[0]], tmp_path, None, 0.1, "grey - 10 * tens")
    greys = {i: int(grey) for i, grey in enumerate(pool[1]) if i not in (7, 50)}
    last_digits = sorted(grey % 10 for grey in greys.values())
    assert sorted(greys[i] % 10 for i in kept_keys(tmp_path)) == last_digits[-8:]
    assert figures["threshold"] == last_digits[-8]
    selecting.select([scored[0]], tmp_path, None, 0.1, "grey * 0")  # by the hash of their names
    random = kept_keys(tmp_path)
    assert len(random) == 8 and np.ptp([greys[i] for i in random]) > 30


def test_shards_of_one_name_in_two_folders_are_told_apart(pool, tmp_path):
    folders = [tmp_path / name for name in ("one", "two")]
    for i, path in enumerate(sorted(pool[0].iterdir())):
        folders[i].mkdir()
        shutil.copy(path, folders[i] / "p.arrayrecord")
    scores.score(list(map(str, folders)), Grey(), tmp_path / "scores")
    selecting.select([tmp_path / "scores"], tmp_path, Condition("grey < 5"))
    table = pq.read_table(tmp_path / "selection.parquet")
    assert set(table["shard"].to_pylist()) == {"one/p.arrayrecord", "two/p.arrayrecord"}
    row = {"train": ",".join(map(str, folders)), "selection": str(tmp_path / "selection.parquet")}
    source = Mixture(parts({"dark": row}), [ArrayRecordSource(row["train"])], 4, 10)
    keys = [records.decode(source[i]).key for i in range(len(source))]
    assert keys == table["key"].to_pylist()
    row["train"] = str(folders[1])  # where only the second half is
    with pytest.raises(UserError, match="names the shard 'one/p.arrayrecord', which is not in"):
        Mixture(parts({"dark": row}), [ArrayRecordSource(row["train"])], 4, 10)


def test_scores_that_do_not_fit_are_named(scored, tmp_path):
    with pytest.raises(UserError, match="gray: no such column of scores; there are grey, key"):
        selecting.select([scored[0]], tmp_path, Condition("gray > 1"))
    with pytest.raises(UserError, match="key: is no column of numbers"):
        selecting.select([scored[0]], tmp_path, Condition("key > 1"))
    with pytest.raises(UserError, match="nothing is kept of 80 records"):
        selecting.select([scored[0]], tmp_path, Condition("grey > 255"))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file: no folder can be made there .File exists"):
        selecting.select([scored[0]], tmp_path / "file", Condition("grey > 1"))
    shutil.copytree(scored[0], tmp_path / "scores")
    for name in ("00000.parquet", ".plan/facts.json"):
        (tmp_path / "scores" / name).write_bytes(b"PAR1")
        with pytest.raises(UserError, match=f"{name}: cannot be read"):
            selecting.select([tmp_path / "scores"], tmp_path, Condition("grey > 1"))


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("statistics:sides=3", "'sides': did you mean 'side'"),
        ("statistics:side=0", "must be at least 1"),
        ("text_boxes:side=0", "must be at least 32"),
        ("os:getcwd", "os:getcwd is no scorer"),
    ],
)
def test_a_scorer_that_cannot_be_is_refused(spec, says):
    with pytest.raises(UserError, match=f"--scorer {spec}: {says}"):
        scorers.make(spec)


def test_training_sees_what_was_selected_without_a_copy(pool, scored, tmp_path):
    selecting.select([scored[0]], tmp_path, Condition("grey < 5"))
    row = {"train": str(pool[0]), "selection": str(tmp_path / "selection.parquet")}
    source = Mixture(parts({"dark": row}), [ArrayRecordSource(str(pool[0]))], 4, 10)
    seen = [
        decode_image(records.decode(source[i]).image).getpixel((0, 0))[0]
        for i in range(len(source))
    ]
    assert set(seen) == set(range(5)) - {int(pool[1][7]), int(pool[1][50])}
