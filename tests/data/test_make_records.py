"""Claims about tools/make_records.py that hold for every kind of input."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.conversions import read_shards
from tests.data.own_pictures import OwnPictures
from tests.data.own_pictures import image as tfds_image
from tests.data.test_tar_reader import image, pack, samples

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools/make_records.py"


def make_tars(folder, count, each=10):
    """Tars of which each repeats two images of the one before."""
    folder.mkdir()
    for i in range(count):
        (folder / f"{i:05d}.tar").write_bytes(pack(*samples(each, first=(each - 2) * i)))
    return folder


def test_tar_and_metaclip_commands_convert_continue_and_summarise(tmp_path, invoke):
    tars = make_tars(tmp_path / "in", 3)
    args = ("tar", "--input", tars / "*.tar", "--output", tmp_path / "out", "--workers", 1)
    code, out, err = invoke(*args)
    assert code == 0 and "kB (100%)" in err and "images/s" in err
    assert out.startswith("train: 26 of 30 images kept in 3 shards") and "duplicate: 00001/" in out
    assert {record.source for record in read_shards(tmp_path / "out").values()} == {"in"}
    before = (tmp_path / "out/train.summary.json").read_bytes()
    for path in tars.iterdir():
        path.unlink()
    assert invoke(*args)[0] == 0  # everything is done: the input is not needed any more
    assert (tmp_path / "out/train.summary.json").read_bytes() == before
    code, _, err = invoke(*args, "--require-caption")
    assert code == 2 and "begun with --require-caption False, now True" in err

    shard = tmp_path / "mc/1/101.tar"
    shard.parent.mkdir(parents=True)
    shard.write_bytes(pack(("a.json", b'{"texts": [["alt", "A text"]]}'), ("a.jpeg", image(1))))
    args = ("metaclip", "--input", tmp_path / "mc", "--output", tmp_path / "mc-out")
    code, out, err = invoke(*args, "--first", 101, "--last", 102, "--source", "mc400m")
    assert code == 0 and "shard missing: 2/102.tar" in out
    assert err.splitlines()[-1].startswith(
        "1 input (or part of one) damaged, missing or empty; see"
    )
    (record,) = read_shards(tmp_path / "mc-out").values()
    assert record.captions == ("A text",) and record.source == "mc400m"


def test_the_parquet_command_takes_its_columns_by_name_and_deals_row_groups(tmp_path, invoke):
    table = pa.table(
        {"jpg": [image(i) for i in range(9)], "a": ["x"] * 9, "b": ["y"] * 9, "l": ["z"] * 9}
    )
    pq.write_table(table, tmp_path / "p.parquet", row_group_size=2)
    args = ("parquet", "--input", tmp_path / "p.parquet", "--output", tmp_path / "out")
    code, _, err = invoke(*args)
    assert code == 2 and "no column 'image'" in err and len(err.splitlines()) == 1
    columns = ("--image-column", "jpg", "--caption-column", "a", "b", "--label-column", "l")
    code, out, _ = invoke(*args, *columns, "--images-per-shard", 4, "--workers", 2)
    assert code == 0 and out.startswith("train: 9 of 9 images kept in 3 shards")
    found = read_shards(tmp_path / "out")
    assert list(found) == [f"p/{i:08d}" for i in range(9)]
    assert {(r.captions, r.label) for r in found.values()} == {(("x", "y"), "z")}


def test_the_tfds_command_needs_only_the_folder(tmp_path, invoke):
    builder = OwnPictures(data_dir=tmp_path / "tfds", file_format="array_record")
    builder.download_and_prepare()
    args = ("tfds", "--input", builder.data_dir, "--tfds-split", "test", "--split", "val")
    code, out, err = invoke(*args, "--output", tmp_path / "out", "--workers", 1)
    assert code == 0 and out.startswith("val: 3 of 3 images kept") and "examples (100%)" in err
    found = read_shards(tmp_path / "out", "val")
    assert {r.image for r in found.values()} == {tfds_image(i) for i in (7, 8, 9)}
    assert {r.label for r in found.values()} == {"cat", "dog"}


def test_nothing_usable_is_one_line_and_exit_2(tmp_path, invoke):
    (tmp_path / "0.tar").write_bytes(b"<html>404</html>")
    args = ("tar", "--input", tmp_path / "0.tar", "--output", tmp_path / "out", "--workers", 1)
    code, out, err = invoke(*args)
    assert code == 2 and "no usable image" in err.splitlines()[-1] and "Traceback" not in err
    assert "damaged tar: what lies behind is lost: 0.tar at byte" in out


def test_damage_beside_whole_inputs_is_the_last_line_and_exit_0(tmp_path, invoke):
    tars = make_tars(tmp_path / "in", 3)
    for name in ("00000.tar", "00002.tar"):
        data = (tars / name).read_bytes()
        (tars / name).write_bytes(data[: len(data) // 2 - 100])
    args = ("tar", "--input", tars / "*.tar", "--output", tmp_path / "out", "--workers", 1)
    for _ in range(2):  # a finished conversion says it, too
        code, _, err = invoke(*args)
        where = tmp_path / "out/train.summary.json"
        line = f'2 inputs (or parts) damaged, missing or empty; see "notes" in {where}'
        assert code == 0 and err.splitlines()[-1] == line
    whole = ("tar", "--input", tars / "00001.tar", "--output", tmp_path / "whole")
    code, out, err = invoke(*whole, "--workers", 1)
    assert code == 0 and "damaged" not in err and "kept in 1 shard, " in out


def test_a_failed_listing_leaves_the_output_as_it_was(tmp_path, invoke):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/mine.txt").write_text("x")
    for output in (tmp_path / "new", tmp_path / "kept"):
        code, _, err = invoke("tar", "--input", tmp_path / "*.tar", "--output", output)
        assert code == 2 and "no file matches" in err
    (tmp_path / "kept/x.arrayrecord").write_bytes(b"")
    code, _, err = invoke("tar", "--input", tmp_path / "*.tar", "--output", tmp_path / "kept")
    assert code == 2 and "holds x.arrayrecord from elsewhere" in err
    assert {path.name for path in tmp_path.rglob("*")} == {"kept", "mine.txt", "x.arrayrecord"}


@pytest.mark.slow
def test_tars_with_duplicates_killed_at_any_moment_come_out_with_the_same_bytes(tmp_path):
    tars = make_tars(tmp_path / "in", 30, each=20)
    command = [sys.executable, TOOL, "tar", "--input", tars / "*.tar", "--workers", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}

    def start(output):
        return subprocess.Popen(
            [*command, "--output", output],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(whole).communicate(timeout=120) and (whole / "train.summary.json").exists()
    kills = 0
    for pattern, wanted in ((".plan/*.staged", 3), ("*.arrayrecord", 1)):  # in each of the passes
        process = start(killed)
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if len(list(killed.glob(pattern))) >= wanted:
                break
            time.sleep(0.001)
        kills += process.poll() is None
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    assert kills
    time.sleep(1.0)  # orphans give up within half a second
    last = start(killed)
    assert "continuing" in last.communicate(timeout=120)[1] and last.returncode == 0
    names = sorted(path.name for path in whole.glob("*.arrayrecord"))
    assert len(names) == 30
    for name in (*names, "train.summary.json"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
    assert sorted(path.name for path in killed.glob("*.arrayrecord")) == names
    assert not list(killed.glob("*.tmp"))
    summary = json.loads((whole / "train.summary.json").read_text())
    assert summary["dropped"]["duplicate"]["count"] == 58
