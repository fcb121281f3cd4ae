"""Claims about parquet as input of the converter."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.conversions import counts, read_shards, run_engine
from tests.data.image_shards import encode_image, smooth_image
from webssl_jax.config import UserError
from webssl_jax.data.converter.parquet_reader import Columns, ParquetReader, list_parquet


def image(seed):
    return encode_image(smooth_image(np.random.default_rng(seed), 40, 40), "JPEG")


@pytest.fixture
def convert(tmp_path):
    """Converts a table: (statistics, records by key)."""

    def call(table, *names, columns=None, name="t", **writing):
        pq.write_table(table, tmp_path / f"{name}.parquet", **writing)
        columns = columns or Columns(*names)
        root, units = list_parquet([str(tmp_path / f"{name}.parquet")], columns)
        reader = ParquetReader(str(root), "pq", columns, str(tmp_path))
        stats = run_engine(tmp_path / f"out-{name}", reader, units)
        assert stats["kept"] + sum(counts(stats["dropped"]).values()) == stats["inputs"]
        return stats, read_shards(tmp_path / f"out-{name}")

    return call


def test_columns_of_bytes_captions_key_and_label_become_records(convert):
    table = pa.table(
        {
            "jpg": [image(i) for i in range(5)],
            "text": [f"caption {i}" for i in range(5)],
            "more": [["a", None, f"more {i}"] for i in range(4)] + [None],
            "id": pa.array(range(100, 105), pa.int64()),
            "kind": pa.array(["cat", "dog", None, "cat", "dog"]).dictionary_encode(),
            "unused": [b"x" * 1000] * 5,
        }
    )
    columns = Columns("jpg", ("text", "more"), "id", "kind")
    stats, found = convert(table, columns=columns, row_group_size=2)
    assert list(found) == ["100", "101", "102", "103", "104"] and stats["notes"] == {}
    assert found["103"].image == image(3) and found["103"].label == "cat"
    assert found["103"].captions == ("caption 3", "a", "more 3")
    assert found["104"].captions == ("caption 4",) and found["102"].label is None


def test_hugging_faces_struct_gives_bytes_or_the_file_and_names_of_labels(convert, tmp_path):
    (tmp_path / "there.jpg").write_bytes(image(1))
    rows = [
        {"bytes": image(0), "path": "gone.jpg"},
        {"bytes": None, "path": "there.jpg"},
        {"bytes": None, "path": "gone.jpg"},
        {"bytes": None, "path": None},
        None,
    ]
    features = {"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}
    table = pa.table({"image": rows, "label": [1, 0, 1, 1, 1]})
    table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    stats, found = convert(table, "image", (), None, "label")
    assert {key: r.label for key, r in found.items()} == {"t/00000000": "dog", "t/00000001": "cat"}
    assert counts(stats["dropped"]) == {"no image in the row": 2, "unreadable": 1}


def test_paths_are_read_below_their_folder_only(convert, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jpg").write_bytes(image(0))
    (tmp_path / "in/out.jpg").symlink_to("/etc/hostname")
    paths = ["in/a.jpg", "/etc/hostname", "../../etc/hostname", "in/out.jpg", "in", "zero\0.jpg"]
    stats, found = convert(pa.table({"image": paths + [None]}))
    assert [r.image for r in found.values()] == [image(0)]
    assert counts(stats["dropped"]) == {
        "path that leaves the image folder": 3,
        "unreadable": 2,
        "no image in the row": 1,
    }


def test_null_rows_and_captions_that_are_not_utf8_are_counted(convert):
    broken = pa.Array.from_buffers(
        pa.string(), 3, pa.array([b"gr\xf6\xdfe", b"good", None], pa.binary()).buffers()
    )
    table = pa.table({"image": [image(0), None, image(2)], "text": broken})
    stats, found = convert(table, "image", ("text",))
    assert [r.captions for r in found.values()] == [("gr\ufffd\ufffde",), ()]
    assert counts(stats["dropped"]) == {"no image in the row": 1}
    assert counts(stats["notes"]) == {"caption not UTF-8, mended": 1}


def test_keys_that_come_again_are_dropped(convert):
    table = pa.table({"image": [image(0), image(1)], "id": ["same", "same"]})
    stats, found = convert(table, "image", (), "id")
    assert found["same"].image == image(0) and counts(stats["dropped"]) == {"duplicate key": 1}


def test_a_missing_or_unfit_column_is_one_line_with_the_nearest_name(convert):
    table = pa.table({"images": [image(0)], "caption": ["x"], "size": [3]})
    with pytest.raises(UserError, match="no column 'image'; did you mean 'images'"):
        convert(table)
    with pytest.raises(UserError, match="no column 'captoin'; did you mean 'caption'"):
        convert(table, "images", ("captoin",))
    with pytest.raises(UserError, match="--image-column size: holds int64"):
        convert(table, "size")


def test_a_truncated_file_is_noted_beside_whole_ones_and_refused_alone(tmp_path):
    table = pa.table({"image": [image(i) for i in range(4)]})
    for name in "ab":
        pq.write_table(table, tmp_path / f"{name}.parquet")
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(whole[: len(whole) // 2])
    root, units = list_parquet([str(tmp_path / "*.parquet")], Columns())
    reader = ParquetReader(str(root), "pq", Columns(), str(root))
    stats = run_engine(tmp_path / "out", reader, units)
    assert stats["kept"] == 4
    row = stats["notes"]["damaged parquet file: cannot be opened"]
    assert row == {"count": 1, "examples": ["a.parquet"]}
    for data in (whole[: len(whole) // 2], b"", b"<html></html>"):
        (tmp_path / "a.parquet").write_bytes(data)
        with pytest.raises(UserError, match="a.parquet: cannot be read as parquet"):
            list_parquet([str(tmp_path / "a.parquet")], Columns())


def test_rows_lost_in_a_damaged_group_are_counted_and_the_next_group_is_read(tmp_path):
    table = pa.table({"image": [image(i) for i in range(8)]})
    path = tmp_path / "a.parquet"
    pq.write_table(table, path, row_group_size=4, compression="zstd", use_dictionary=False)
    _, units = list_parquet([str(path)], Columns())
    data = bytearray(path.read_bytes())
    data[4:40] = bytes(36)  # the first page's header
    path.write_bytes(data)
    reader = ParquetReader(str(tmp_path), "pq", Columns(), str(tmp_path))
    stats = run_engine(tmp_path / "out", reader, units)
    assert list(read_shards(tmp_path / "out")) == [f"a/{i:08d}" for i in range(4, 8)]
    (example,) = stats["notes"]["damaged parquet file: rows are lost"]["examples"]
    assert example.startswith("a.parquet, row group 0, 4 rows: ")


def test_a_fault_in_what_is_done_with_rows_is_not_taken_for_damage(convert, monkeypatch):
    def fail(*args):
        raise TypeError("ours")

    monkeypatch.setattr(ParquetReader, "_item", fail)
    with pytest.raises(TypeError, match="ours"):
        convert(pa.table({"image": [image(0)]}))


def test_a_struct_whose_path_is_no_text_has_no_image_without_bytes(convert):
    rows = [{"bytes": image(0), "path": 5}, {"bytes": None, "path": 6}]
    stats, found = convert(pa.table({"image": rows}))
    assert [r.image for r in found.values()] == [image(0)]
    assert counts(stats["dropped"]) == {"no image in the row": 1} and stats["notes"] == {}


def test_memory_is_bounded_by_pages_not_by_the_row_group(tmp_path):
    """200 MB in one row group pass through a small part of that."""
    path = tmp_path / "a.parquet"
    schema = pa.schema([("image", pa.binary())])
    with pq.ParquetWriter(path, schema, compression="none", use_dictionary=False) as writer:
        rows = [bytes([i]) * 100_000 for i in range(20)]
        batches = [pa.record_batch([pa.array(rows, pa.binary())], schema) for _ in range(100)]
        writer.write_table(pa.Table.from_batches(batches), row_group_size=2000)
    del batches
    _, units = list_parquet([str(path)], Columns())
    assert [unit["size"] for unit in units] == [2000]
    pool = pa.default_memory_pool()
    pool.release_unused()
    before, most, rows = pool.bytes_allocated(), 0, 0
    for _ in ParquetReader(str(tmp_path), "pq", Columns(), "").read(units[0]):
        most, rows = max(most, pool.bytes_allocated() - before), rows + 1
    assert rows == 2000 and 1_000_000 < most < 20_000_000
