"""Claims about tars as input of the converter: what a sample is, and what each defect becomes."""

import gzip
import io
import json
import tarfile
import tracemalloc

import numpy as np
import pyarrow
import pytest

from tests.data.conversions import counts, read_shards, run_engine
from tests.data.image_shards import encode_image, smooth_image
from webssl_jax.config import UserError
from webssl_jax.data.converter import fields, items, tar_reader, tar_stream
from webssl_jax.data.converter.tar_reader import TarReader, list_metaclip, list_tars


def image(seed, fmt="JPEG", side=40):
    return encode_image(smooth_image(np.random.default_rng(seed), side, side), fmt)


def pack(*members, fmt=tarfile.PAX_FORMAT):
    """A tar of (name, bytes) or TarInfo."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=fmt) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            name, data = member
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def samples(count, first=0):
    """img2dataset's members."""
    made = []
    for i in range(first, first + count):
        fields = {"caption": f"caption {i}", "url": "https://x", "sha256": "0", "width": 40}
        made += [
            (f"{i:05d}.jpg", image(i)),
            (f"{i:05d}.json", json.dumps(fields).encode()),
            (f"{i:05d}.txt", f"caption {i}".encode()),
        ]
    return made


@pytest.fixture
def convert(tmp_path):
    """Converts tars given as bytes: (statistics, records by key)."""

    def call(*archives, rules=None, **reader):
        for i, data in enumerate(archives):
            (tmp_path / f"{i:03d}.tar").write_bytes(data)
        root, units = list_tars([str(tmp_path / "*.tar")])
        output = tmp_path / "out"
        stats = run_engine(
            output, TarReader(str(root), "web", **reader), units, rules, len(archives)
        )
        assert stats["kept"] + sum(counts(stats["dropped"]).values()) == stats["inputs"]
        found = read_shards(output)
        assert len(found) == stats["kept"]
        return stats, found

    return call


def test_an_img2dataset_sample_becomes_one_record_with_its_bytes_caption_and_key(convert):
    stats, found = convert(pack(*samples(3)), pack(*samples(2, first=3)))
    assert list(found) == ["000/00000", "000/00001", "000/00002", "001/00003", "001/00004"]
    assert found["001/00004"].image == image(4)
    assert found["001/00004"].captions == ("caption 4",)  # of txt and json, once
    assert (stats["dropped"], stats["notes"]) == ({}, {})


def test_png_webp_labels_and_names_with_more_dots_belong_to_their_sample(convert):
    data = pack(
        ("a/x.y/1.png", image(1, "PNG")),
        ("a/x.y/1.cls", b"7\n"),
        ("./2.WEBP", image(2, "WEBP")),
        ("./2.json", b'{"captions": ["one", "two"], "kind": "cat"}'),
        ("3.left.jpg", image(3)),
        ("3.caption.txt", b"three"),
    )
    _, found = convert(data, label_field="kind")
    assert {key: (r.captions, r.label) for key, r in found.items()} == {
        "000/a/x.y/1": ((), "7"),
        "000/2": (("one", "two"), "cat"),
        "000/3": (("three",), None),
    }


def test_metaclip_shards_are_found_by_number_and_give_all_their_texts(tmp_path):
    for shard in (7, 107, 250):
        path = tmp_path / "in" / str(shard % 100) / f"{shard}.tar"
        path.parent.mkdir(parents=True, exist_ok=True)
        texts = {"texts": [["alt", f"alt {shard}"], ["title", "a title"]]}
        members = [("u.json", json.dumps(texts).encode()), ("u.jpeg", image(shard))]
        path.write_bytes(pack(*members))
    (tmp_path / "in/7/8.tar").write_bytes(b"not where shard 8 belongs")
    units = list_metaclip(tmp_path / "in", None, None)
    assert [unit["path"] for unit in units] == ["7/7.tar", "7/107.tar", "50/250.tar"]
    reader = TarReader(str(tmp_path / "in"), "metaclip")
    run_engine(tmp_path / "out", reader, units)
    found = read_shards(tmp_path / "out")
    assert found["7/107/u"].captions == ("alt 107", "a title")
    units = list_metaclip(tmp_path / "in", 107, 109)
    assert [unit.get("note") for unit in units] == [None, "shard missing", "shard missing"]
    stats = run_engine(tmp_path / "range", reader, units)
    assert stats["kept"] == 1 and stats["notes"]["shard missing"]["examples"][0] == "8/108.tar"
    with pytest.raises(UserError, match="no MetaCLIP shard such as .*/0/0.tar"):
        list_metaclip(tmp_path / "in/7", 0, None)


def test_members_that_climb_out_links_and_devices_are_dropped_and_never_written(convert, tmp_path):
    special = []
    for name, kind in (("l", tarfile.SYMTYPE), ("h", tarfile.LNKTYPE), ("d", tarfile.CHRTYPE)):
        info = tarfile.TarInfo(f"{name}.jpg")
        info.type, info.linkname = kind, "/etc/passwd"
        special.append(info)
    folder = tarfile.TarInfo("folder")
    folder.type = tarfile.DIRTYPE
    data = pack(
        ("../up.jpg", image(1)),
        ("/tmp/absolute.jpg", image(2)),
        ("a/../../b.jpg", image(3)),
        folder,
        *special,
        *samples(1),
    )
    before = {path for path in tmp_path.rglob("*")}
    stats, found = convert(data)
    assert counts(stats["dropped"]) == {
        "link, device or sparse file in a tar": 3,
        "path that leaves the tar": 3,
    }
    assert list(found) == ["000/00000"]
    assert not [p for p in tmp_path.rglob("*.jpg") if p not in before]


def test_what_lacks_its_other_half_is_counted(convert, tmp_path):
    data = pack(("1.txt", b"text"), ("2.jpg", image(2)), ("3.json", b"{}"), *samples(1, first=4))
    stats, found = convert(data)
    assert counts(stats["dropped"]) == {"caption without image": 2}
    assert stats["dropped"]["caption without image"]["examples"] == ["000/1", "000/3"]
    assert list(found) == ["000/2", "000/00004"] and stats["captioned"] == 1


def test_a_required_caption_drops_images_without_one(convert):
    data = pack(("1.jpg", image(1)), ("2.jpg", image(2)), ("2.txt", b" \n"), *samples(1, first=4))
    stats, found = convert(data, rules=items.Rules(require_caption=True))
    assert counts(stats["dropped"]) == {"image without caption": 2}
    assert list(found) == ["000/00004"]


def test_bad_texts_beside_an_image_keep_the_image_and_are_noted(convert, monkeypatch):
    monkeypatch.setattr(fields, "MAX_TEXT_BYTES", 1000)
    monkeypatch.setattr(tar_reader, "MAX_TEXT_BYTES", 1000)
    data = pack(
        ("1.jpg", image(1)),
        ("1.json", b'{"caption": '),
        ("2.jpg", image(2)),
        ("2.txt", "größe".encode("latin-1")),
        ("3.jpg", image(3)),
        ("3.json", b'{"caption": "\\ud800 half a pair", "texts": 5}'),
        ("4.jpg", image(4)),
        ("4.json", b"[" * 900),
        ("5.jpg", image(5)),
        ("5.txt", b"x" * 1001),
        ("6.jpg", image(6)),
        ("6.npy", b"features"),
    )
    stats, found = convert(data)
    assert len(found) == 6
    assert found["000/2"].captions == ("gr\ufffd\ufffde",)
    assert "half a pair" in found["000/3"].captions[0]
    assert counts(stats["notes"]) == {
        "bad json beside an image": 2,
        "caption not UTF-8, mended": 2,
        "caption is a number, ignored": 1,
        "member of another kind, ignored: .npy": 1,
        "text larger than the limit, ignored": 1,
    }
    assert stats["notes"]["bad json beside an image"]["examples"] == ["000/1", "000/4"]


def test_keys_that_come_again_and_second_images_are_dropped(convert):
    data = pack(
        ("1.jpg", image(1)),
        ("1.png", image(2, "PNG")),
        ("2.jpg", image(3)),
        ("2.jpg", image(4)),
        ("1.jpg", image(5)),
        ("1.txt", b"late"),
    )
    stats, found = convert(data)
    assert counts(stats["dropped"]) == {items.SECOND_IMAGE: 2, "duplicate key": 1}
    assert found["000/1"].image == image(1) and found["000/2"].image == image(3)


@pytest.mark.parametrize("fmt", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_long_and_foreign_names_survive(convert, fmt):
    deep = "/".join(["folder" * 5] * 6) + "/ü図.jpg"  # more than 100 bytes
    if fmt != tarfile.USTAR_FORMAT:
        deep = "x" * 300 + "/" + deep
    _, found = convert(pack((deep, image(1)), ("caf\udce9.jpg", image(2)), fmt=fmt))
    assert list(found)[0] == "000/" + deep.removesuffix(".jpg")
    assert list(found)[1].startswith("000/caf\ufffd#")


def test_gzip_and_zstd_are_told_by_content(convert):
    buffer = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(buffer, "zstd") as file:
        file.write(pack(*samples(2, first=2)))
    zstd = buffer.getvalue().to_pybytes()
    stats, found = convert(gzip.compress(pack(*samples(2))), zstd)
    assert len(found) == 4 and stats["notes"] == {}


def test_damage_keeps_what_came_before_and_names_the_tar(convert):
    whole = pack(*samples(6))
    flipped = bytearray(whole)
    flipped[whole.index(b"00003.jpg") + 3] ^= 1  # a header
    member = whole.index(b"00003.jpg")
    zeroed = (
        whole[:member]
        + bytes(whole.index(b"00004.jpg") - member)
        + whole[whole.index(b"00004.jpg") :]
    )
    stats, found = convert(
        whole[: member + 700],  # inside a member
        whole[:member],  # between two members: tarfile would say nothing
        bytes(flipped),
        zeroed,
        whole + whole,  # joined tars: all is read
        whole + b"<html>" * 200,
        gzip.compress(whole)[:-20000],
        b"",
        b"<html>not a tar</html>" * 40,
        rules=items.Rules(keep_duplicates=True),
    )
    by_tar = {i: sum(key.startswith(f"{i:03d}/") for key in found) for i in range(9)}
    assert {i: n for i, n in by_tar.items() if i != 6} == {
        0: 3, 1: 3, 2: 3, 3: 5, 4: 6, 5: 6, 7: 0, 8: 0
    }  # fmt: skip
    assert by_tar[6] < 6
    assert counts(stats["notes"]) == {
        "damaged tar: what lies behind is lost": 7,
        "zeros inside a tar: a part is overwritten, or tars were joined": 2,
    }
    assert counts(stats["dropped"]) == {"duplicate key": 6}  # of the joined tar
    examples = stats["notes"]["damaged tar: what lies behind is lost"]["examples"]
    assert examples[0].startswith("000.tar at byte ") and examples[0].endswith("truncated")
    assert examples[1].endswith("ends without its end marker")


def test_a_vanished_tar_is_noted_and_the_others_are_read(tmp_path):
    for i in range(2):
        (tmp_path / f"{i}.tar").write_bytes(pack(*samples(1, first=i)))
    root, units = list_tars([str(tmp_path / "*.tar")])
    (tmp_path / "0.tar").unlink()
    stats = run_engine(tmp_path / "out", TarReader(str(root), "web"), units)
    assert stats["kept"] == 1
    assert stats["notes"]["unreadable file"]["examples"] == ["0.tar: No such file or directory"]


def test_a_member_over_the_limit_is_skipped_without_loading_it(tmp_path, monkeypatch):
    monkeypatch.setattr(tar_reader, "MAX_BYTES", 1 << 20)
    (tmp_path / "0.tar").write_bytes(
        pack(*samples(1), ("big.jpg", bytes(40 << 20)), ("big.txt", b"t"), *samples(1, first=1))
    )
    root, units = list_tars([str(tmp_path / "0.tar")])
    tracemalloc.start()
    found = list(TarReader(str(root), "web").read(units[0]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [item.key for item in found] == ["0/00000", "0/big.jpg", "0/00001"]
    assert isinstance(found[1], items.Dropped) and found[1].reason == "more bytes than the limit"
    assert peak < 6 << 20


def test_memory_does_not_grow_with_the_tar(tmp_path):
    peaks = []
    for count in (20, 200):
        data = pack(*((f"{i}.jpg", bytes([i]) * 200_000) for i in range(count)))
        (tmp_path / "0.tar").write_bytes(data)
        del data
        tracemalloc.start()
        with open(tmp_path / "0.tar", "rb") as file:
            assert sum(1 for _ in tar_stream.members(file, lambda name: 1 << 20)) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0] < 3_000_000


def test_one_large_tar_is_split_between_samples_over_many_units(tmp_path, monkeypatch):
    members = samples(40)
    members[30:30] = [("x" * 200 + ".jpg", image(50))]  # a header of its own for the name
    apart = [*members[0::3], *members[1::3]]
    for name, data in (
        ("a", pack(*members)),
        ("b", gzip.compress(pack(*members))),
        ("c", pack(*apart)),
        ("d", pack(*members)[:-20000]),
    ):
        (tmp_path / f"{name}.tar").write_bytes(data)
    root, whole = list_tars([str(tmp_path / "*.tar")])
    assert len(whole) == 4
    monkeypatch.setattr(tar_reader, "PIECE", 15_000)
    _, units = list_tars([str(tmp_path / "*.tar")])
    pieces = [unit for unit in units if unit["path"] == "a.tar"]
    assert len(pieces) > 4 and len(units) == len(pieces) + 3
    reader = TarReader(str(root), "web")
    found = [item for unit in pieces for item in reader.read(unit)]
    assert found == list(reader.read(whole[0])) and len(found) == 41
    (tmp_path / "a.tar").write_bytes(pack(*members)[: pieces[2]["end"]])
    last = list(reader.read(pieces[-1]))
    assert [type(item) for item in last] == [items.Note]  # a piece that is gone is damage


def test_inputs_that_are_no_tars_are_refused_with_one_line(tmp_path):
    for pattern, message in (
        (str(tmp_path / "none*.tar"), "no file matches"),
        (str(tmp_path), "is a folder"),
        ("s3://bucket/*.tar", "give only paths, or only gs://; or mount a bucket"),
    ):
        with pytest.raises(UserError, match=message):
            list_tars([pattern])
