"""Annotations come with their images from every kind of input, and what is missing or damaged is
counted and named."""

import io
import json
import os
import pathlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.data import own_pictures
from tests.data.conversions import counts, read_shards, run_engine
from tests.data.image_shards import encode_image, smooth_image
from tests.data.test_tar_reader import pack
from webssl_jax.config import UserError
from webssl_jax.data import annotations
from webssl_jax.data.converter import items, tar_reader
from webssl_jax.data.converter.folder_reader import FolderReader, annotation_path, list_folder
from webssl_jax.data.converter.parquet_reader import Columns, ParquetReader, list_parquet
from webssl_jax.data.converter.tar_reader import TarReader, list_tars
from webssl_jax.data.converter.tfds_reader import Features, TfdsReader, list_tfds


def image(seed, width=48, height=40, **options):
    pixels = smooth_image(np.random.default_rng(seed), width, height)
    return encode_image(pixels, "JPEG", **options)


def mask(seed, width=48, height=40, dtype=np.uint8):
    """Values of a mask, and its PNG."""
    values = np.random.default_rng(seed).integers(0, 200, (height, width), dtype)
    return values, annotations.encode_mask(values)


def write(root, files):
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)


def convert_folder(root, output, rules=None, **wanted):
    wanted = tuple(wanted.items())
    reader = FolderReader(str(root), "test", annotations=wanted)
    return run_engine(output, reader, list_folder(root, annotations=wanted), rules)


# ------------------------------------------------------------------------------------------- folder


@pytest.mark.parametrize(
    ("pattern", "path", "expected"),
    [
        ("../annotations/{path}.png", "training/a.b.jpg", "../annotations/training/a.b.png"),
        ("{folder}/sync_depth_{stem#rgb_}.png", "bath/rgb_1.jpg", "bath/sync_depth_1.png"),
        ("{path%_leftImg8bit}_gtFine_labelIds.png", "ulm/0_leftImg8bit.png",
         "ulm/0_gtFine_labelIds.png"),
        ("annotations/{path#images/}.png", "images/train/a.jpg", "annotations/train/a.png"),
        ("m/{path#images}.png", "images/a.jpg", "m/a.png"),
        ("{folder}/{stem}.json", "a.jpg", "a.json"),
        ("{path#nothing}.json", "a.jpg", "a.json"),
        ("/elsewhere/{stem}.json", "a/{path}.jpg", "/elsewhere/{path}.json"),
    ],
)  # fmt: skip
def test_a_pattern_gives_the_path_of_an_images_annotation(pattern, path, expected):
    assert annotation_path(pattern, path) == expected


def test_files_beside_a_tree_or_in_another_become_annotations(tmp_path):
    root = tmp_path / "in/images"
    masks = {name: mask(seed) for seed, name in enumerate("ab")}
    for name, (_, data) in masks.items():
        write(tmp_path / "in", {f"masks/x/{name}.png": data})
        write(root, {f"x/{name}.jpg": image(ord(name)), f"x/{name}.labels.json": b"[3, 5]"})
    stats = convert_folder(
        root, tmp_path / "out", mask="../masks/{path}.png", labels="{path}.labels.json"
    )
    found = read_shards(tmp_path / "out")
    assert list(found) == ["x/a.jpg", "x/b.jpg"]
    for name, record in zip("ab", found.values(), strict=True):
        assert record.annotations == {"labels": b"[3, 5]", "mask": masks[name][1]}
        assert np.array_equal(annotations.mask(record), masks[name][0])
    assert stats["annotations"] == {"labels": 2, "mask": 2} and stats["notes"] == {}


def test_an_image_file_that_is_an_annotation_is_no_image(tmp_path):
    root = tmp_path / "in"
    write(root, {f"{name}.jpg": image(ord(name)) for name in "ab"})
    write(root, {f"{name}.png": mask(0)[1] for name in "az"})  # b has none, z no image
    stats = convert_folder(root, tmp_path / "out", mask="{path}.png")
    found = read_shards(tmp_path / "out")
    assert {key: set(record.annotations) for key, record in found.items()} == {
        "a.jpg": {"mask"},
        "b.jpg": set(),
    }
    assert counts(stats["dropped"]) == {"annotation without image": 1}
    assert stats["notes"] == {"no annotation 'mask'": {"count": 1, "examples": ["b.jpg"]}}


def test_what_is_missing_or_damaged_is_left_out_counted_and_named(tmp_path):
    root, masks = tmp_path / "in", tmp_path / "masks"
    write(root, {f"{name}.jpg": image(ord(name)) for name in "abcdefg"})
    whole = mask(0)[1]
    write(masks, {"a.png": whole, "b.png": mask(0, 40, 48)[1], "c.png": whole[:200], "d.png": b""})
    write(masks, {"e.png": encode_image(np.zeros((40, 48, 3), np.uint8))})
    (masks / "f.png").mkdir()
    wanted = {"mask": "../masks/{path}.png"}
    stats = convert_folder(root, tmp_path / "out", **wanted)
    found = read_shards(tmp_path / "out")
    assert [key for key, record in found.items() if record.annotations] == ["a.jpg"]
    assert len(found) == 7 and stats["annotations"] == {"mask": 1}
    assert stats["notes"]["no annotation 'mask'"] == {"count": 1, "examples": ["g.jpg"]}
    damaged = stats["notes"]["damaged annotation 'mask'"]
    says = (
        "b.jpg: annotation 'mask': 40 x 48 pixels, its image has 48 x 40",
        "c.jpg: annotation 'mask': damaged PNG: ",
        "d.jpg: empty file",
        "e.jpg: annotation 'mask': a PNG of mode RGB, not grey",
        "f.jpg: unreadable",
    )
    assert damaged["count"] == len(says)
    for example, expected in zip(damaged["examples"], says, strict=True):
        assert example.startswith(expected) and "\n" not in example

    rules = items.Rules(require_annotations=True)
    stats = convert_folder(root, tmp_path / "required", rules, **wanted)
    assert list(read_shards(tmp_path / "required")) == ["a.jpg"]
    assert counts(stats["dropped"]) == {"image without annotation 'mask'": 6}
    assert counts(stats["notes"]) == {"damaged annotation 'mask'": 5}


def test_what_a_fixed_name_promises_is_checked_at_conversion(tmp_path):
    root = tmp_path / "in"
    write(root, {"a.jpg": image(1), "a.json": b'{"no": "list"}'})
    stats = convert_folder(root, tmp_path / "out", questions="{path}.json", other="{path}.json")
    assert set(read_shards(tmp_path / "out")["a.jpg"].annotations) == {"other"}
    (example,) = stats["notes"]["damaged annotation 'questions'"]["examples"]
    assert example == "a.jpg: annotation 'questions': a list of objects, not dict"


def test_masks_shrink_with_their_image_and_keep_their_values(tmp_path):
    root = tmp_path / "in"
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees: upright it is 200 x 400
    write(root, {"large.jpg": image(1, 400, 200, exif=exif), "small.jpg": image(2)})
    large, large_png = mask(1, 200, 400, np.uint16)
    _, small_png = mask(2)
    write(tmp_path / "m", {"large.png": large_png, "small.png": small_png})
    write(tmp_path / "m", {"large.json": b"[1]", "small.json": b"[2]"})
    rules = items.Rules(max_side=100)
    wanted = {"mask": "../m/{path}.png", "labels": "../m/{path}.json"}
    convert_folder(root, tmp_path / "out", rules, **wanted)
    found = read_shards(tmp_path / "out")
    record = found["large.jpg"]
    assert (record.width, record.height) == (50, 100)
    with Image.open(io.BytesIO(record.image)) as shrunk:
        assert shrunk.size == (50, 100)
    values = annotations.mask(record)
    assert np.array_equal(values, large[2::4, 2::4]) and values.dtype == np.uint16
    assert record.annotations["labels"] == b"[1]"
    assert found["small.jpg"].annotations == {"labels": b"[2]", "mask": small_png}


@pytest.mark.parametrize("pattern", ["masks/all.png", "{folder}/x.png", "{name}.png", "{path.png"])
def test_a_pattern_that_tells_no_images_apart_is_one_line(tmp_path, pattern):
    write(tmp_path, {"a.jpg": image(1)})
    with pytest.raises(UserError, match=r"--annotation mask=.*: give a path with \{path\}"):
        list_folder(tmp_path, annotations=(("mask", pattern),))


# ---------------------------------------------------------------------------------------------- tar


def convert_tar(tmp_path, *members, rules=None, **wanted):
    (tmp_path / "0.tar").write_bytes(pack(*members))
    root, units = list_tars([str(tmp_path / "0.tar")])
    reader = TarReader(str(root), "web", annotations=tuple(wanted.items()))
    stats = run_engine(tmp_path / "out", reader, units, rules)
    return stats, read_shards(tmp_path / "out")


def test_members_of_a_sample_become_annotations_by_their_extension(tmp_path):
    seg, depth = mask(1)[1], mask(2, dtype=np.uint16)[1]
    fields = json.dumps({"caption": "a text", "sha256": "0"}).encode()
    stats, found = convert_tar(
        tmp_path,
        ("1.seg.png", seg),  # before the image, and not taken for it
        ("1.jpg", image(1)),
        ("1.Depth.PNG", depth),
        ("1.json", fields),
        ("1.qa.json", b'[{"question": "Is it?", "answers": ["yes"]}]'),
        ("2.jpg", image(2)),
        ("2.txt", b"two"),
        ("3.seg.png", seg),
        mask="seg.png",
        depth="depth.png",
        meta="json",
        questions="qa.json",
    )
    assert set(found) == {"0/1", "0/2"}
    record = found["0/1"]
    assert record.captions == ("a text",) and record.image == image(1)
    assert record.annotations["mask"] == seg and record.annotations["depth"] == depth
    assert record.annotations["meta"] == fields
    assert annotations.questions(record) == [{"question": "Is it?", "answers": ["yes"]}]
    assert found["0/2"].annotations == {} and found["0/2"].captions == ("two",)
    names = ("mask", "depth", "meta", "questions")
    assert counts(stats["notes"]) == {f"no annotation {name!r}": 1 for name in names}
    assert stats["dropped"]["annotation without image"]["examples"] == ["0/3"]


def test_members_that_were_not_asked_for_are_what_they_were(tmp_path):
    stats, found = convert_tar(tmp_path, ("1.seg.png", image(1)), ("1.jpg", image(2)))
    assert found["0/1"].annotations == {}
    assert counts(stats["notes"]) == {"image beside the one taken, ignored: .seg.png": 1}


def test_a_large_or_second_annotation_of_a_sample_is_noted(tmp_path, monkeypatch):
    monkeypatch.setattr(tar_reader, "MAX_BYTES", 20_000)
    stats, found = convert_tar(
        tmp_path,
        ("1.jpg", image(1)),
        ("1.npy", b"first"),
        ("1.npy", b"second"),
        ("2.jpg", image(2)),
        ("2.npy", bytes(20_001)),
        features="npy",
    )
    assert found["0/1"].annotations == {"features": b"first"} and found["0/2"].annotations == {}
    assert stats["notes"] == {
        "damaged annotation 'features'": {
            "count": 1,
            "examples": ["0/2: more bytes than the limit"],
        },
        "second annotation of its kind in a sample, ignored": {"count": 1, "examples": ["0/1"]},
    }


# ------------------------------------------------------------------------------------------ parquet


def convert_parquet(tmp_path, table, **wanted):
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=2)
    columns = Columns(annotations=tuple(wanted.items()))
    root, units = list_parquet([str(tmp_path / "t.parquet")], columns)
    stats = run_engine(
        tmp_path / "out", ParquetReader(str(root), "pq", columns, str(tmp_path)), units
    )
    return stats, list(read_shards(tmp_path / "out").values())


def test_columns_become_annotations_bytes_as_they_are_and_lists_as_json(tmp_path):
    masks = [mask(i)[1] for i in range(3)]
    write(tmp_path, {"m.png": masks[1]})
    turns = [{"from": "human", "value": "Größe?"}, {"from": "gpt", "value": "Klein."}]
    table = pa.table(
        {
            "image": [image(i) for i in range(3)],
            "mask": [
                {"bytes": masks[0], "path": "gone.png"},
                {"bytes": None, "path": "m.png"},
                {"bytes": None, "path": None},
            ],
            "conversations": [turns, [], None],
            "real": pa.array([[1, 2], [], [3]], pa.list_(pa.int32())),
            "text": ["[7]", '["x"]', None],
            "box": [{"x": 0.5, "name": "größe"}, None, {"x": 1.0, "name": None}],
        }
    )
    stats, found = convert_parquet(
        tmp_path,
        table,
        mask="mask",
        conversations="conversations",
        labels="real",
        text="text",
        box="box",
    )
    assert [record.annotations.get("mask") for record in found] == [*masks[:2], None]
    assert annotations.conversations(found[0]) == turns
    assert annotations.conversations(found[1]) == []
    assert [annotations.labels(record) for record in found] == [(1, 2), (), (3,)]
    assert found[0].annotations["text"] == b"[7]"
    assert annotations.json_value(found[0], "box") == {"x": 0.5, "name": "größe"}
    assert annotations.json_value(found[2], "box") == {"x": 1.0, "name": None}
    assert stats["annotations"] == {
        "box": 2, "conversations": 2, "labels": 3, "mask": 2, "text": 2
    }  # fmt: skip
    missing = {f"no annotation {name!r}": 1 for name in ("mask", "conversations", "text", "box")}
    assert counts(stats["notes"]) == missing


def test_values_that_json_cannot_hold_and_files_that_are_gone_are_damage(tmp_path):
    table = pa.table(
        {
            "image": [image(i) for i in range(3)],
            "score": [1.5, float("nan"), None],
            "parts": [[b"\xff"], [b"text"], []],
            "mask": [{"bytes": None, "path": name} for name in ("gone.png", "../../m.png", None)],
        }
    )
    wanted = {"score": "score", "parts": "parts", "mask": "mask"}
    stats, found = convert_parquet(tmp_path, table, **wanted)
    assert [dict(record.annotations) for record in found] == [
        {"score": b"1.5"},
        {"parts": b'["text"]'},
        {"parts": b"[]"},
    ]
    assert counts(stats["notes"]) == {
        "damaged annotation 'parts'": 1,
        "damaged annotation 'mask'": 2,
        "no annotation 'score'": 2,
        "no annotation 'mask'": 1,
    }
    assert stats["notes"]["damaged annotation 'mask'"]["examples"] == [
        "t/00000000: unreadable",
        "t/00000001: path that leaves the image folder",
    ]


def test_a_missing_column_is_one_line(tmp_path):
    with pytest.raises(UserError, match="no column 'maks'; did you mean 'mask'"):
        convert_parquet(tmp_path, pa.table({"image": [image(0)], "mask": [b""]}), mask="maks")


# --------------------------------------------------------------------------------------------- tfds


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    builder = own_pictures.OwnPictures(
        data_dir=tmp_path_factory.mktemp("tfds"), file_format="array_record"
    )
    builder.download_and_prepare()
    return pathlib.Path(builder.data_dir)


def test_features_become_annotations_images_as_stored_arrays_as_png_and_the_rest_json(
    prepared, tmp_path
):
    asked = Features(
        key="file",
        annotations=(
            ("depth", "relief"),
            ("labels", "label"),
            ("mask", "mask"),
            ("texts", "captions"),
            ("ids", "captions/id"),
            ("name", "file"),
        ),
    )
    root, name, features, units = list_tfds(str(prepared), None, "test", asked)
    stats = run_engine(tmp_path / "out", TfdsReader(str(root), name, features), units)
    assert stats["notes"] == {} and set(stats["annotations"].values()) == {3}
    for key, record in read_shards(tmp_path / "out").items():
        seed = int(key.removeprefix("file "))
        assert record.annotations["mask"] == own_pictures.mask_file(seed)
        assert np.array_equal(annotations.mask(record), own_pictures.mask(seed))
        metres = annotations.depth(record, units_per_metre=100)
        np.testing.assert_array_equal(metres, 3.0 * own_pictures.mask(seed))
        assert annotations.labels(record) == (seed % 2,)
        texts = {"text": [f"größe {seed}", "second"], "id": [1, 2]}
        assert annotations.json_value(record, "texts") == texts
        assert annotations.json_value(record, "ids") == [1, 2]
        assert record.annotations["name"] == key.encode()
    asked = Features(annotations=(("mask", "maks"),))
    with pytest.raises(UserError, match="--annotation mask=maks: no such feature; did you mean"):
        list_tfds(str(prepared), None, "test", asked)


# ----------------------------------------------------------------------------------------- the tool


def test_the_command_takes_annotations_and_a_begun_folder_keeps_to_them(tmp_path, invoke):
    write(tmp_path / "in", {f"{i}.jpg": image(i) for i in range(4)})
    write(tmp_path / "masks", {f"{i}.png": mask(i)[1] for i in range(3)})
    write(tmp_path / "masks", {f"{i}.json": b"[1]" for i in range(4)})
    (tmp_path / "masks/2.png").write_bytes(mask(0, 10, 10)[1])
    wanted = ("--annotation", "mask=../masks/{path}.png")
    more = ("--annotation", "labels=../masks/{path}.json")
    base = ("folder", "--input", tmp_path / "in", "--workers", 1, "--shards", 2)
    args = (*base, "--output", tmp_path / "out")
    code, out, err = invoke(*args, *wanted, *more)
    assert code == 0 and "annotations  labels 4, mask 2" in out
    assert "no annotation 'mask': 3.jpg" in out
    assert err.splitlines()[-1].startswith(
        "1 input (or part of one) damaged, missing or empty; see"
    )
    before = {path: path.read_bytes() for path in (tmp_path / "out").glob("*.arrayrecord")}
    code, _, err = invoke(*args, *more, *wanted)  # their order is no other question
    assert code == 0 and "continuing" in err
    assert before == {path: path.read_bytes() for path in before}
    for changed in (wanted, (*wanted, *more, "--require-annotations"), ()):
        code, _, err = invoke(*args, *changed)
        assert code == 2 and "was begun with --" in err and "annotation" in err
    code, out, _ = invoke(
        *base, "--output", tmp_path / "whole", *wanted, *more, "--require-annotations"
    )
    assert code == 0 and "2  image without annotation 'mask': 2.jpg, 3.jpg" in out


def test_every_kind_of_input_has_the_flag(tmp_path, invoke):
    data = mask(1)[1]
    (tmp_path / "0.tar").write_bytes(pack(("1.jpg", image(1)), ("1.seg.png", data)))
    pq.write_table(pa.table({"image": [image(1)], "m": [data]}), tmp_path / "p.parquet")
    builder = own_pictures.OwnPictures(data_dir=tmp_path / "tfds", file_format="array_record")
    builder.download_and_prepare()
    os.makedirs(tmp_path / "mc/0")
    (tmp_path / "mc/0/0.tar").write_bytes((tmp_path / "0.tar").read_bytes())
    for kind, path, where in (
        ("tar", "0.tar", ".seg.png"),
        ("metaclip", "mc", "seg.png"),
        ("parquet", "p.parquet", "m"),
        ("tfds", builder.data_dir, "mask"),
    ):
        output = tmp_path / f"out-{kind}"
        code, out, err = invoke(
            kind, "--input", tmp_path / path, "--output", output, "--workers", 1,
            "--annotation", f"mask={where}", "--require-annotations",
        )  # fmt: skip
        assert code == 0 and "annotations  mask" in out, err
        assert all(annotations.mask(r).size for r in read_shards(output).values())


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--annotation", "mask"), "argument --annotation: invalid NAME=WHERE"),
        (("--annotation", "Mask=x"), "argument --annotation: invalid NAME=WHERE"),
        (("--annotation", "mask=a", "--annotation", "mask=b"), "--annotation mask: given twice"),
        (("--annotation", "mask=all.png"), "give a path with {path} or {stem} in it"),
        (("--require-annotations",), "--require-annotations: only with --annotation"),
    ],
)
def test_bad_annotation_flags_are_one_line(tmp_path, invoke, flags, says):
    write(tmp_path / "in", {"a.jpg": image(1)})
    code, _, err = invoke(
        "folder", "--input", tmp_path / "in", "--output", tmp_path / "out", *flags
    )
    lines = [line for line in err.splitlines() if not line.startswith("listing")]
    assert code == 2 and len(lines) == 1 and says in lines[0]
    assert not (tmp_path / "out").exists()
