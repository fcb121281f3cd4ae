"""Claims about values that are no plain texts: missing, numbers, lists, objects."""

import decimal
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.conversions import counts, read_shards, run_engine
from tests.data.test_tar_reader import convert, image, pack  # noqa: F401
from webssl_jax.config import UserError
from webssl_jax.data import annotations
from webssl_jax.data.converter import items
from webssl_jax.data.converter.fields import captions_of, key_of_value, label_of
from webssl_jax.data.converter.parquet_reader import Columns, ParquetReader, list_parquet
from webssl_jax.data.converter.tar_reader import TarReader
from webssl_jax.evaluators.datasets import in_order

NAN = float("nan")


@pytest.mark.parametrize(
    "value, label, note",
    [
        (None, None, ""),
        (NAN, None, ""),
        (np.float32("nan"), None, ""),
        (" ", None, ""),
        ("cat\n", "cat", ""),
        (b"7", "7", ""),
        (7, "7", ""),
        (3.0, "3", ""),
        (np.float32(3), "3", ""),
        (np.array(2), "2", ""),
        (decimal.Decimal("4.00"), "4", ""),
        (True, "true", ""),
        (np.False_, "false", ""),
        (["dog"], "dog", ""),
        ([], None, ""),
        (-1, None, "label -1, ignored"),
        (-1.0, None, "label -1, ignored"),
        ("-1", None, "label -1, ignored"),
        (0.5, None, "label is no whole number, ignored"),
        (float("inf"), None, "label is no whole number, ignored"),
        ([1, 2], None, "label is a list, ignored"),
        ({"caption": b"n0"}, None, "label is an object, ignored"),
        (b"gr\xf6n", "gr\ufffdn", "label not UTF-8, mended"),
    ],
)
def test_a_label_is_a_text_or_a_whole_number_and_all_else_is_missing_or_noted(value, label, note):
    assert label_of(value) == (label, (note,) if note else ())


def test_a_number_is_the_name_of_its_class_and_one_that_is_none_is_noted():
    names = ("cat", "dog")
    assert label_of(1.0, names) == ("dog", ()) and label_of("sheep", names) == ("sheep", ())
    assert label_of(-1, names) == (None, ("label -1, ignored",))
    assert label_of(2, names) == (None, ("label that is no class, ignored",))


def test_captions_are_the_texts_in_lists_of_lists_and_nothing_else_becomes_one():
    value = ["a", None, [b"b", NAN, ["c", "a", " "]], np.array(["d"], object)]
    assert captions_of(value) == (("a", "b", "c", "d"), ())
    assert captions_of([{"caption": b"n0"}, 7, 0.5, True]) == (
        (),
        tuple(
            f"caption is {kind}, ignored"
            for kind in ("an object", "a number", "no whole number", "true or false")
        ),
    )
    assert [key_of_value(v) for v in (5, 5.0, "x ", NAN, "", [1])] == [
        "5",
        "5",
        "x",
        None,
        None,
        None,
    ]


@pytest.fixture
def parquet(tmp_path):
    """Converts tables, a file each: (statistics, records by key)."""

    def call(*tables, **columns):
        for i, table in enumerate(tables):
            pq.write_table(table, tmp_path / f"p-{i}.parquet")
        columns = Columns(**columns)
        root, units = list_parquet([str(tmp_path / "p-*.parquet")], columns)
        reader = ParquetReader(str(root), "pq", columns, str(tmp_path))
        return run_engine(tmp_path / "out", reader, units), read_shards(tmp_path / "out")

    return call


def test_a_column_that_is_int_in_one_file_and_float_with_gaps_in_the_next_gives_the_same_labels(
    parquet,
):
    first = {"image": [image(i) for i in range(3)], "label": [0, 1, 2], "text": ["a", "b", "c"]}
    second = {
        "image": [image(i) for i in range(3, 6)],
        "label": [0.0, 1.0, NAN],
        "text": [NAN, NAN, NAN],
    }
    stats, found = parquet(pa.table(first), pa.table(second), captions=("text",), label="label")
    assert [record.label for record in found.values()] == ["0", "1", "2", "0", "1", None]
    assert [record.captions for record in found.values()] == [("a",), ("b",), ("c",), (), (), ()]
    assert stats["labels"] == {"0": 2, "1": 2, "2": 1} and stats["notes"] == {}


def test_views_lists_of_every_kind_and_fields_of_objects_are_read(parquet):
    words = [["x", "y"], ["z", "w"]]
    table = pa.table(
        {
            "image": pa.array([image(0), image(1)], pa.binary_view()),
            "view": pa.array(["v0", "v1"], pa.string_view()),
            "fixed": pa.array(words, pa.list_(pa.string(), 2)),
            "views": pa.array(words, pa.list_view(pa.string())),
            "said": [[{"raw": "r0", "n": 1}], [{"raw": "r1", "n": 2}, {"raw": "r2", "n": 3}]],
            "about": [{"kind": {"id": 3.0}}, None],
        }
    )
    _, found = parquet(
        table, captions=("view", "fixed", "views", "said.raw"), label="about.kind.id"
    )
    assert [r.captions for r in found.values()] == [
        ("v0", "x", "y", "r0"), ("v1", "z", "w", "r1", "r2")
    ]  # fmt: skip
    assert [r.label for r in found.values()] == ["3", None]
    with pytest.raises(UserError, match="--caption-column said: holds objects.*said.raw or said.n"):
        parquet(table, captions=("said",))


def test_the_other_columns_of_a_crawl_stay_as_the_annotation_meta(parquet):
    table = pa.table(
        {
            "image": [image(0), image(1)],
            "text": ["a", "b"],
            "url": ["https://x/0", None],
            "score": [5.5, NAN],
            "when": pa.array([0, 1], pa.timestamp("s")),
            "embedding": [[0.5], [1.0]],
        }
    )
    stats, found = parquet(table, captions=("text",))
    assert [annotations.metadata(record) for record in found.values()] == [
        {"url": "https://x/0", "score": 5.5, "when": "1970-01-01 00:00:00"},
        {"url": None, "score": None, "when": "1970-01-01 00:00:01"},
    ]
    assert stats["notes"] == {}


def sample(number, **fields):
    return (f"{number}.jpg", image(number)), (f"{number}.json", json.dumps(fields).encode())


def test_captions_and_labels_of_a_json_follow_the_same_rules(convert):  # noqa: F811
    data = pack(
        *sample(0, caption=["only one"], kind=-1),
        *sample(1, caption=["first", "second"], kind=3.0),
        *sample(2, caption=["one", "two", "three"], kind=True),
        *sample(3, caption="plain", kind=NAN),
        *sample(4, caption={"en": "x"}, texts=[["alt", "of two"], ["title", "three"]], kind=[4]),
        *sample(5, caption=5, texts=["a", "b"]),
    )
    stats, found = convert(data, label_field="kind")
    assert [record.captions for record in found.values()] == [
        ("only one",), ("first", "second"), ("one", "two", "three"), ("plain",),
        ("of two", "three"), ("a", "b"),
    ]  # fmt: skip
    assert [r.label for r in found.values()] == [None, "3", "true", None, "4", None]
    assert counts(stats["notes"]) == {
        "label -1, ignored": 1,
        "caption is an object, ignored": 1,
        "caption is a number, ignored": 1,
        "no field 'kind' beside an image": 1,
    }


def test_the_json_of_a_crawl_stays_as_meta_but_for_its_captions(convert):  # noqa: F811
    data = pack(*sample(0, caption="a", url="https://x", score=NAN, size={"w": 4}), *sample(1))
    _, found = convert(data)
    assert annotations.metadata(found["000/0"]) == {
        "url": "https://x", "score": None, "size": {"w": 4}
    }  # fmt: skip
    assert not found["000/1"].annotations
    annotations.check(found["000/0"])


def test_names_with_dots_and_numbers_are_samples_of_their_own(convert):  # noqa: F811
    members = []
    for place, name in enumerate(("22.05", "22.10", "22.15")):
        members += [(f"{name}.jpg", image(place)), (f"{name}.txt", f"caption of {name}".encode())]
    stats, found = convert(pack(*members))
    assert {key: r.captions for key, r in found.items()} == {
        f"000/{name}": (f"caption of {name}",) for name in ("22.05", "22.10", "22.15")
    }
    assert stats["notes"] == {}


def test_words_behind_a_dot_are_told_to_be_one_sample_or_cut_at_the_last_dot(convert):  # noqa: F811
    members = [(f"photo.of.{word}.jpg", image(i)) for i, word in enumerate(("cat", "dog"))]
    stats, _ = convert(pack(*members))
    assert counts(stats["dropped"]) == {items.SECOND_IMAGE: 1}  # with an error: see MISREAD
    reader = TarReader("", "", cut_names="last-dot")
    assert reader.split_name("a/photo.of.cat.jpg") == ("a/photo.of.cat", "jpg")


def test_the_photo_wins_over_its_depth_map_and_image_and_captions_can_be_named(
    convert,  # noqa: F811
    tmp_path,
):
    data = pack(
        ("1.depth.png", image(1, "PNG")),
        ("1.jpg", image(2)),
        ("1.long.txt", b"long"),
        ("1.txt", b"short"),
        ("1.json", b'{"alt": {"en": "alt"}, "caption": "c"}'),
    )
    stats, found = convert(data)
    assert found["000/1"].image == image(2) and found["000/1"].captions == ("long", "c")
    assert stats["notes"]["image beside the one taken, ignored: .depth.png"]["examples"] == [
        "000/1.depth.png"
    ]
    choice = dict(
        image_member="depth.png", caption_members=("txt",), caption_fields=("alt.en", "gone")
    )
    units = [{"path": "000.tar", "size": 1}]
    stats = run_engine(tmp_path / "other", TarReader(str(tmp_path), "web", **choice), units)
    found = read_shards(tmp_path / "other")
    assert found["000/1"].image == image(1, "PNG")
    assert found["000/1"].captions == ("short", "alt")
    assert counts(stats["notes"]) == {
        "member of another kind, ignored: .jpg": 1,
        "member of another kind, ignored: .long.txt": 1,
        "no field 'gone' beside an image": 1,
    }


def test_images_and_texts_apart_are_told_apart_from_those_without_a_partner(convert):  # noqa: F811
    pictures = [(f"{i}.jpg", image(i)) for i in range(3)]
    texts = [(f"{i}.txt", b"t") for i in range(1, 4)]
    stats, _ = convert(pack(*pictures, *texts))
    assert counts(stats["dropped"]) == {items.APART: 2, "caption without image": 1}


def test_texts_before_their_images_are_apart_too(convert):  # noqa: F811
    stats, _ = convert(pack(("1.txt", b"t"), ("2.txt", b"u"), ("1.jpg", image(1))))
    assert counts(stats["notes"]) == {items.APART: 1}


def test_an_empty_tar_is_named(convert):  # noqa: F811
    stats, _ = convert(pack(), pack(("a.txt", b"x")), pack(("1.jpg", image(1))))
    assert stats["notes"]["empty tar: no image in it"]["examples"] == ["000.tar", "001.tar"]


def test_whole_numbers_are_sorted_as_numbers():
    labels = [str(n) for n in range(12)]
    assert in_order(set(labels)) == tuple(labels)
    assert in_order({"b", "10", "9"}) == ("10", "9", "b")
    assert in_order({"-2", "-10", "3", "03"}) == ("-10", "-2", "03", "3")
