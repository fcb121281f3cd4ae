"""Claims about what a user has: inputs that change, pictures of any kind, tars that do not fit, and
sets of records to merge, to select from and to remove from."""

import json

import numpy as np
import pytest
from PIL import Image

from tests.data.conversions import counts, read_shards
from tests.data.image_shards import smooth_image, write_shard
from tests.data.test_awkward_images import save
from tests.data.test_tar_reader import pack, samples
from webssl_jax.data import annotations, decode, records
from webssl_jax.data.sources import ArrayRecordSource


def image(seed=0):
    return Image.fromarray(smooth_image(np.random.default_rng(seed), 64, 48))


def summary_of(output):
    return json.loads((output / "train.summary.json").read_text())


# ------------------------------------------------------------------------ inputs beside an old plan


def test_new_and_replaced_inputs_beside_a_plan_are_refused_by_name(tmp_path, make_records):
    command = ("tar", "--input", tmp_path / "*.tar", "--output", tmp_path / "out")
    (tmp_path / "a.tar").write_bytes(pack(*samples(1)))
    (tmp_path / "b.tar").write_bytes(pack(*samples(1, first=1)))
    assert make_records(*command)[0] == 0
    code, _, said = make_records(*command)
    assert code == 0 and "continuing" in said
    (tmp_path / "c.tar").write_bytes(pack(*samples(1, first=2)))
    (tmp_path / "b.tar").write_bytes(pack(*samples(1, first=3)))  # of the same size
    code, _, said = make_records(*command)
    assert code == 2
    assert "was begun with 2 inputs; now there are 1 new (c.tar) and 1 changed (b.tar);" in said
    for path in tmp_path.glob("*.tar"):  # who has converted may remove his tars
        path.unlink()
    assert make_records(*command)[0] == 0 and len(read_shards(tmp_path / "out")) == 2


def test_a_tar_whose_texts_follow_all_images_ends_with_an_error(tmp_path, make_records):
    members = samples(3)
    (tmp_path / "a.tar").write_bytes(pack(*members[0::3], *members[2::3]))
    command = ("tar", "--input", tmp_path / "a.tar", "--output", tmp_path / "out")
    code, _, said = make_records(*command)
    assert code == 2 and "3 x caption apart from its image (a/00000, ...)" in said
    assert "tar --sort=name" in said


def test_images_that_share_a_name_up_to_a_dot_end_with_an_error_or_are_named(
    tmp_path, make_records
):
    members = [(f"cat.of.{word}.png", save(image(i), "PNG")) for i, word in enumerate("ab")]
    (tmp_path / "a.tar").write_bytes(pack(*members))
    command = ("tar", "--input", tmp_path / "a.tar")
    code, _, said = make_records(*command, "--output", tmp_path / "1")
    assert code == 2 and "1 x second image of a sample (a/cat.of.b.png, ...)" in said
    for number, choice in enumerate((("--cut-names", "last-dot"), ("--image-member", "of.a.png"))):
        assert make_records(*command, "--output", tmp_path / f"o{number}", *choice)[0] == 0
        assert len(read_shards(tmp_path / f"o{number}")) == 2 - number


# --------------------------------------------------------------------------- pictures of all kinds


def test_pictures_of_any_kind_are_read_and_what_is_none_is_counted_by_suffix(
    tmp_path, make_records
):
    pytest.importorskip("pillow_heif")
    pytest.importorskip("pillow_jxl")
    folder = tmp_path / "in"
    folder.mkdir()
    kinds = {"a.jpg": "JPEG", "c.heic": "HEIF", "d": "PNG", "e.jpg_large": "JPEG", "f.jxl": "JXL"}
    kinds["h.avif"] = "AVIF"
    for seed, (name, fmt) in enumerate(kinds.items()):
        (folder / name).write_bytes(save(image(seed), fmt))
    (folder / "g.svg").write_text("<svg/>")
    for name in ("i.txt", "j.txt", "LICENSE"):
        (folder / name).write_text("words")
    command = ("folder", "--input", folder, "--output", tmp_path / "out", "--shards", 10)
    assert make_records(*command)[0] == 0
    found = read_shards(tmp_path / "out")
    assert list(found) == sorted(kinds)
    for seed, name in enumerate(kinds):
        record = found[name]
        assert (record.width, record.height) == (64, 48)
        close = np.asarray(decode.decode_image(record.image), float) - np.asarray(image(seed))
        assert np.abs(close).mean() < 12, name
    # Those that need the extra are JPEG now, so that who trains does not need it
    assert {decode.format_of(found[name].image) for name in ("c.heic", "f.jxl")} == {"JPEG"}
    assert found["h.avif"].image == (folder / "h.avif").read_bytes()
    notes = summary_of(tmp_path / "out")["notes"]
    assert {reason.rpartition(": ")[2]: row["count"] for reason, row in notes.items()} == {
        ".svg": 1, ".txt": 2, "no suffix": 1
    }  # fmt: skip


def test_without_its_decoder_a_picture_is_counted_under_the_name_of_what_is_missing(
    tmp_path, make_records, monkeypatch
):
    known = tuple(name for name in decode.FORMATS if name not in decode.EXTRA)
    monkeypatch.setattr(decode, "FORMATS", known)
    (tmp_path / "in").mkdir()
    image().save(tmp_path / "in/a.png")
    (tmp_path / "in/b.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    (tmp_path / "in/c.jxl").write_bytes(bytes.fromhex("ff0a7f10d8050800") + bytes(100))
    command = ("folder", "--input", tmp_path / "in", "--output", tmp_path / "out")
    assert make_records(*command)[0] == 0
    assert counts(summary_of(tmp_path / "out")["dropped"]) == {
        f"no decoder for {name}: pip install 'webssl_jax[formats]'": 1 for name in ("HEIF", "JXL")
    }


SIZES = [(8, 8), (1, 1), (300, 200), (600, 500), (1000, 5), (20000, 9000)]


@pytest.mark.parametrize("size", SIZES)
def test_the_size_of_a_jpeg_xl_is_known_before_it_is_decoded(size):
    pytest.importorskip("pillow_jxl")
    if size[0] < 10000:
        assert decode.extra_formats.jxl_size(save(Image.new("L", size), "JXL")) == size
        return
    # a header alone: not small, 18 bits for the height, no ratio, 18 bits for the width
    fields = ((0, 1), (2, 2), (9000 - 1, 18), (0, 3), (2, 2), (20000 - 1, 18))
    bits = at = 0
    for value, count in fields:
        bits, at = bits | value << at, at + count
    with pytest.raises(decode.TooManyPixelsError, match="20000 x 9000"):
        decode.open_image(b"\xff\x0a" + bits.to_bytes(40, "little"))


# --------------------------------------------------------------------------------- sets of records


@pytest.fixture
def sets(tmp_path):
    """Two sets of 4 records with scores and addresses; the first record of both has one key."""
    made = {}
    for name in ("one", "two"):
        items = []
        for i in range(4):
            data = save(image(len(made)), "JPEG")
            key = "same" if i == 0 else f"{name}/{i}"
            meta = {"url": f"https://{name}/{i}", "score": i} | ({} if i < 3 else {"score": None})
            notes = {"meta": annotations.encode_json(meta), "raw": b"\xff"}
            record = records.Record(data, (f"c{i}",), key, 64, 48, name, "cat", notes)
            made[name, key] = record
            items.append(records.encode(record))
        (tmp_path / name).mkdir()
        write_shard(tmp_path / name / records.shard_name("train", 0, 1), items)
    return made


def read_all(folder):
    source = ArrayRecordSource(str(folder))
    found = [records.decode(source[i]) for i in range(len(source))]
    return {(record.source, record.key): record for record in found}


def test_sets_of_records_are_merged_as_they_are(tmp_path, sets, make_records):
    command = ("records", "--input", tmp_path / "one", tmp_path / "two")
    assert make_records(*command, "--output", tmp_path / "out", "--shards", 2)[0] == 0
    assert read_all(tmp_path / "out") == sets  # of two sources with one key both stay
    one = ("records", "--input", tmp_path / "one", tmp_path / "out")
    assert make_records(*one, "--output", tmp_path / "twice")[0] == 0
    assert read_all(tmp_path / "twice") == sets
    assert counts(summary_of(tmp_path / "twice")["dropped"]) == {"duplicate key": 4}


def test_records_are_selected_and_removed_by_key_or_address_and_what_is_not_found_is_told(
    tmp_path, sets, make_records
):
    command = ("records", "--input", tmp_path / "one", tmp_path / "two")
    (tmp_path / "keys.txt").write_text("same\none/1\nnowhere\n\n")
    given = ("--keys", tmp_path / "keys.txt", "--output", tmp_path / "out")
    code, _, said = make_records(*command, *given)
    assert code == 0 and "1 of 3 listed values of 'key' are in no record (nowhere)" in said
    assert (tmp_path / "out/train.unmatched.txt").read_text() == "nowhere\n"
    assert set(read_all(tmp_path / "out")) == {("one", "same"), ("two", "same"), ("one", "one/1")}
    assert counts(summary_of(tmp_path / "out")["dropped"]) == {"not in --keys": 5}
    (tmp_path / "keys.txt").write_text("same\n")
    code, _, said = make_records(*command, *given)
    assert code == 2 and "was begun with --keys" in said
    (tmp_path / "urls.txt").write_text("https://one/0\nhttps://two/2\n")
    given = ("--without", tmp_path / "urls.txt", "--by", "meta.url", "--output", tmp_path / "rest")
    code, _, said = make_records(*command, *given)
    assert code == 0 and "no record" not in said
    gone = {("one", "same"), ("two", "two/2")}
    assert set(read_all(tmp_path / "rest")) == set(sets) - gone


def test_records_are_filtered_by_a_number_and_those_without_it_are_counted(
    tmp_path, sets, make_records
):
    command = ("records", "--input", tmp_path / "one", "--output", tmp_path / "out")
    assert make_records(*command, "--min", "meta.score=1", "--max", "meta.score=1.5")[0] == 0
    assert set(read_all(tmp_path / "out")) == {("one", "one/1")}
    assert counts(summary_of(tmp_path / "out")["dropped"]) == {
        "below --min meta.score": 1, "above --max meta.score": 1, "no number 'meta.score'": 1
    }  # fmt: skip
