"""The inspection tells what is in a set of records, names all damage, and draws fairly."""

import collections
import dataclasses
import importlib.util
import io
import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tests.data.image_shards import encode_image, smooth_image, write_shard
from webssl_jax.config import UserError
from webssl_jax.data import annotations, inspection, processes, records
from webssl_jax.data.sources import ArrayRecordSource

ROOT = pathlib.Path(__file__).parent.parent.parent
SOURCES = ("crawl", "crawl", "crawl", "books", "maps")


def run_tool(*arguments):
    return subprocess.run(
        [sys.executable, ROOT / "tools" / "inspect_records.py", *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def collection():
    """60 records of 3 sources and 3 formats; 20, 21 and 22 show one image, 7 and 40 have one
    key."""
    rng = np.random.default_rng(0)
    made = []
    for number in range(60):
        width, height = 20 + number, 90 - number
        fmt = ("JPEG", "PNG", "WEBP")[number % 3]
        made.append(
            records.Record(
                image=encode_image(smooth_image(rng, width, height), fmt),
                captions=("a text of 20 letters",) * (number % 4),
                key=f"k{number}",
                width=width,
                height=height,
                source=SOURCES[number % 5],
                label=("ant", "bee", None)[number % 3],
            )
        )
    for number in (21, 22):
        image, width, height = made[20].image, made[20].width, made[20].height
        made[number] = dataclasses.replace(made[number], image=image, width=width, height=height)
    made[40] = dataclasses.replace(made[40], key="k7")
    return made


def write_set(folder, items):
    folder.mkdir(exist_ok=True)
    for shard in range(3):
        name = records.shard_name("train", shard, 3)
        write_shard(folder / name, items[20 * shard : 20 * (shard + 1)])
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory, collection):
    folder = tmp_path_factory.mktemp("whole")
    return write_set(folder, [records.encode(r) for r in collection])


@pytest.fixture(scope="module")
def damaged(tmp_path_factory, collection):
    """3 has a flipped byte, 15 is no record, 33 no image, 34 half an image, 50 a wrong size."""
    items = [records.encode(r) for r in collection]
    noise = np.random.default_rng(0).integers(0, 256, (30, 30, 3), dtype=np.uint8)

    def change(number, **fields):
        items[number] = records.encode(dataclasses.replace(collection[number], **fields))

    change(3, image=encode_image(noise), width=30, height=30)  # shards do not shrink noise
    items[15] = b"junk"
    change(33, image=b"<html>")
    change(34, image=collection[34].image[: len(collection[34].image) // 2])
    change(50, width=999)
    folder = write_set(tmp_path_factory.mktemp("damaged"), items)
    first = folder / records.shard_name("train", 0, 3)
    contents = bytearray(first.read_bytes())
    contents[contents.index(items[3][2000:2020])] ^= 0xFF
    first.write_bytes(contents)
    return folder


def test_the_tool_tells_all_there_is_to_tell_as_json(whole, collection, tmp_path):
    sheet = tmp_path / "sheet.png"
    done = run_tool(whole, "--json", "--verify", "--workers", 2, "--sheet", sheet, "--sample", 9)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["shards"] == 3 and facts["records"] == facts["whole"] == 60
    assert facts["damaged"] == 0 and facts["damages"] == []
    assert facts["image_bytes"] == sum(len(r.image) for r in collection)
    assert facts["largest_image_bytes"] == max(len(r.image) for r in collection)
    assert facts["width"] == {"min": 20, "max": 79} and facts["height"] == {"min": 31, "max": 90}
    shorter = [min(r.width, r.height) for r in collection]
    small, middle = sum(s <= 32 for s in shorter), sum(32 < s <= 64 for s in shorter)
    assert facts["shorter_side"] == {"<= 32": small, "<= 64": middle}
    formats = collections.Counter(Image.open(io.BytesIO(r.image)).format for r in collection)
    assert facts["formats"] == formats
    assert facts["captions"] == 90 and facts["caption_characters"] == {"<= 32": 90}
    assert facts["captions_per_image"] == {"<= 0": 15, "<= 1": 15, "<= 2": 15, "<= 3": 15}
    assert facts["sources"] == {"crawl": 36, "books": 12, "maps": 12}
    assert facts["labels"] == {"ant": 20, "bee": 20} and facts["unlabelled"] == 20
    for what, expected in (("keys", [[7, 40]]), ("images", [[20, 21, 22]])):
        found = facts[f"duplicate_{what}"]
        assert found["records"] == len(expected[0]) - 1
        shard_size = 20
        assert [
            [shard_size * int(p["shard"][-23:-21]) + p["record"] for p in group]
            for group in found["examples"]
        ] == expected
    assert Image.open(sheet).mode == "RGB" and "sheet of 9 images" in done.stderr
    assert "60/60 records (100%)" in done.stderr


def test_verify_names_every_damaged_record_and_fails(damaged):
    done = run_tool(damaged, "--verify", "--workers", 1)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("damaged: ")]
    expected = [
        (0, "record 3: ", "hash mismatch"),
        (0, "record 15: ", "not a record"),
        (1, "record 13 (key 'k33'): ", "not an image of a known format"),
        (1, "record 14 (key 'k34'): ", "."),
        (2, "record 10 (key 'k50'): ", "the record says 999 x 40 pixels, its image has 70 x 40"),
    ]
    assert len(lines) == len(expected)
    for line, (shard, place, reason) in zip(lines, expected, strict=True):
        name = records.shard_name("train", shard, 3)
        assert line.startswith(f"damaged: {damaged}/{name} {place}")
        assert reason in line
    assert "60 records in 3 shards: 55 whole, 5 damaged" in done.stdout


@pytest.fixture(scope="module")
def annotated(tmp_path_factory, collection):
    """Every second record has labels, every third a mask, the last one notes. The masks of 6 and 9
    are not of their image's size, and those of 12 no whole file; 20 has labels that are none."""
    made = []
    for number, record in enumerate(collection):
        found = {}
        if number % 2 == 0:
            found["labels"] = annotations.encode_json([number])
        if number % 3 == 0:
            size = (record.height, record.width + (number in (6, 9)))
            found["mask"] = annotations.encode_mask(np.zeros(size, np.uint8))
        made.append(dataclasses.replace(record, annotations=found))
    truncated = {"mask": made[12].annotations["mask"][:60], "labels": b"[12]"}
    made[12] = dataclasses.replace(made[12], annotations=truncated)
    made[20] = dataclasses.replace(made[20], annotations={"labels": b"[2"})
    made[59] = dataclasses.replace(made[59], annotations={"notes": b"n" * 99})
    return write_set(tmp_path_factory.mktemp("annotated"), [records.encode(r) for r in made])


def test_annotations_are_told_by_name_with_shares_sizes_and_formats(annotated):
    found = inspection.inspect(ArrayRecordSource(str(annotated)))
    facts = found.to_json(ArrayRecordSource(str(annotated)))["annotations"]
    assert list(facts) == ["labels", "mask", "notes"]
    labels = [b"[2" if n == 20 else b"[%d]" % n for n in range(0, 60, 2)]
    assert facts["labels"] == {
        "records": 30,
        "share": 0.5,
        "bytes": sum(map(len, labels)),
        "largest_bytes": 4,
        "formats": {"JSON": 29, "other": 1},
    }
    assert facts["mask"]["records"] == 20 and facts["mask"]["formats"] == {"PNG": 20}
    assert facts["notes"]["largest_bytes"] == 99
    done = run_tool(annotated, "--workers", 2)
    assert done.returncode == 0, done.stderr
    assert "  annotation    labels: 30 (50.0% of records), JSON 29, other 1; on av" in done.stdout
    assert "  annotation    notes: 1 (1.7% of records), other 1; on average 99 by" in done.stdout


def test_verify_reads_annotations_and_compares_masks_with_their_images(annotated):
    places = []
    source = ArrayRecordSource(str(annotated))
    report = inspection.inspect(source, verify=True, on_damage=places.append)
    assert [place.index for place in places] == [6, 9, 12, 20] and report.damaged == 4
    assert str(places[0]).endswith(
        "record 6 (key 'k6'): annotation 'mask': 27 x 84 pixels, its image has 26 x 84"
    )
    assert "annotation 'mask': damaged PNG: " in places[2].reason
    assert "annotation 'labels': not JSON: " in places[3].reason
    facts = report.to_json(source)["annotations"]
    assert facts["labels"]["records"] == 30 - 3 and facts["mask"]["records"] == 20 - 3


def test_shards_that_are_lost_are_named_and_the_others_are_inspected(whole, tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("tool", ROOT / "tools" / "inspect_records.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    folder = shutil.copytree(whole, tmp_path / "set")
    (folder / records.shard_name("train", 0, 3)).unlink()
    (folder / records.shard_name("train", 2, 3)).write_bytes(b"<html>404</html>")
    assert tool.main([str(folder), "--workers=1"]) == 2
    printed = capsys.readouterr().out
    lost = [line for line in printed.splitlines() if line.startswith("lost: ")]
    assert "train-00000-of-00003.arrayrecord: this shard is missing" in lost[0]
    assert "train-00002-of-00003.arrayrecord: the shard cannot be read" in lost[1]
    assert "20 records in 3 shards, of which 2 cannot be read: 20 whole, 0 damaged" in printed
    (folder / records.shard_name("train", 1, 3)).unlink()
    with pytest.raises(UserError, match="the shard cannot be read"):  # nothing is left
        tool.main([str(folder / records.shard_name("train", 2, 3))])


def test_without_verify_only_what_cannot_be_read_is_damage(damaged):
    places = []
    report = inspection.inspect(ArrayRecordSource(str(damaged)), on_damage=places.append)
    assert [place.index for place in places] == [3, 15] and report.damaged == 2
    assert report.tally.count == 58


@pytest.mark.parametrize("shards", ["damaged", "annotated"])
def test_spans_and_processes_change_nothing(request, shards, monkeypatch):
    source = ArrayRecordSource(str(request.getfixturevalue(shards)))
    reports = []
    for span, workers in ((2048, 1), (7, 1), (7, 2)):
        monkeypatch.setattr(inspection, "SPAN", span)
        places, read = [], []
        report = inspection.inspect(
            source, verify=True, workers=workers, on_damage=places.append, progress=read.append
        )
        assert sum(read) == 60
        reports.append((report.to_json(source), places))
    assert reports[0] == reports[1] == reports[2]


def test_a_sample_is_drawn_evenly_over_the_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(inspection, "SPAN", 11)
    image = encode_image(np.zeros((4, 4, 3), np.uint8))
    names = ["many"] * 90 + ["few"] * 5 + ["one"]
    items = [records.Record(image, (), f"{i}", 4, 4, name) for i, name in enumerate(names)]
    write_shard(tmp_path / "a.arrayrecord", [records.encode(item) for item in items])
    source = ArrayRecordSource(str(tmp_path))

    def drawn(sample, seed=0, workers=1):
        options = {"sample": sample, "seed": seed, "workers": workers}
        return inspection.draw(inspection.inspect(source, **options).tally, sample)

    def counts(sample):
        return collections.Counter(names[i] for i in drawn(sample))

    assert counts(3) == {"many": 1, "few": 1, "one": 1}
    assert counts(13) == {"many": 7, "few": 5, "one": 1}
    assert counts(200) == {"many": 90, "few": 5, "one": 1}
    assert drawn(13) == drawn(13, workers=2) and len(set(drawn(13))) == 13
    assert drawn(13) != drawn(13, seed=1)
    # From everywhere in the shard, not from its beginning.
    assert max(i for i in drawn(20) if names[i] == "many") > 45


def test_names_beyond_a_bound_are_counted_together(tmp_path, monkeypatch):
    monkeypatch.setattr(inspection, "MAX_NAMES", 4)
    items = [
        records.Record(b"", (), f"{i}", 4, 4, f"s{i}", f"l{i}", {f"a{i}": b"x"}) for i in range(10)
    ]
    write_shard(tmp_path / "a.arrayrecord", [records.encode(item) for item in items])
    tally = inspection.inspect(ArrayRecordSource(str(tmp_path)), sample=3).tally
    assert tally.sources == {"s0": 1, "s1": 1, "s2": 1, "s3": 1, inspection.OTHERS: 6}
    assert tally.labels[inspection.OTHERS] == 6 and len(tally.drawn) == 5
    assert tally.annotations[inspection.OTHERS].count == 6 and len(tally.annotations) == 5


def test_duplicates_are_counted_beyond_the_first_and_shown_in_groups():
    digests = np.array([5, 1, 5, 2, 1, 5, 9, 9], np.uint64)
    whole = np.array([1, 1, 1, 1, 1, 1, 1, 0], bool)
    assert inspection._duplicates(digests, whole) == (3, [[0, 2, 5], [1, 4]])
    assert inspection._duplicates(digests[:1], whole[:1]) == (0, [])
    assert inspection._duplicates(digests, ~whole) == (0, [])
    nothing = np.zeros(0, bool)
    assert inspection._duplicates(digests[:0], nothing) == (0, [])
    same = np.full(1000, 7, np.uint64)
    count, groups = inspection._duplicates(same, np.ones(1000, bool))
    assert count == 999 and groups == [list(range(inspection.EXAMPLES))]


def test_a_worker_that_dies_is_one_line():
    with pytest.raises(UserError, match="a worker process died"):
        list(processes.in_order(os._exit, iter([9]), 2))


def test_bad_arguments_are_one_line(whole, tmp_path):
    for arguments, says in [
        ((tmp_path / "none",), "no such file or folder"),
        ((whole, "--verfy"), "did you mean '--verify'?"),
        ((whole, "--sheet", "/dev/null/x.png"), "/dev/null/x.png: cannot be written"),
    ]:
        done = run_tool(*arguments, "--workers", 1)
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert done.returncode == 2 and len(errors) == 1 and says in errors[0], done.stderr
