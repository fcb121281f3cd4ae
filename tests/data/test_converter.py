"""Claims about the engine in webssl_jax.data.converter, its folder reader and
tools/make_records.py."""

import functools
import io
import json
import os
import resource
import runpy
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from array_record.python import array_record_module
from PIL import Image

from tests.data.conversions import DyingReader, read_shards, run_engine
from webssl_jax.config import UserError
from webssl_jax.data import records
from webssl_jax.data.converter import items, plan, runners, work
from webssl_jax.data.converter.folder_reader import FolderReader, key_of, list_folder

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools/make_records.py"


def picture(width, height, seed=0, fmt="PNG", **options):
    """Bytes of an image of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, fmt, **options)
    return file.getvalue()


def make_tree(root, images=60, side=40):
    """``images`` PNGs in three folders."""
    for i in range(images):
        path = root / f"class{i % 3}" / f"image_{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(side, side + i % 7, seed=i))
    return root


def command(*args):
    return [sys.executable, str(TOOL), "folder", *map(str, args)]


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}


def run(*args):
    return subprocess.run(
        command(*args), capture_output=True, text=True, env=ENVIRONMENT, timeout=120
    )


@pytest.fixture
def invoke(monkeypatch, capsys):
    """The tool in this process: (exit code, lines on stderr)."""

    def call(*args):
        monkeypatch.setattr(sys, "argv", [str(TOOL), "folder", *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(TOOL), run_name="__main__")
        return stop.value.code, capsys.readouterr().err.splitlines()

    return call


def shard_bytes(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.arrayrecord"))}


def convert(root, output, rules=None, shards=1, **reader):
    """The engine in this process, without the pool."""
    return run_engine(
        output, FolderReader(str(root), "test", **reader), list_folder(root), rules, shards
    )


def test_every_image_becomes_one_record_with_its_own_bytes_size_and_label(tmp_path):
    root = make_tree(tmp_path / "in", images=9)
    (root / "at_the_root.jpg").write_bytes(picture(50, 40, 99, "JPEG"))
    stats = convert(root, tmp_path / "out", shards=3, label_from="folder")
    found = read_shards(tmp_path / "out")
    assert stats["kept"] == len(found) == 10
    for key, record in found.items():
        assert record.image == (root / key).read_bytes()
        with Image.open(io.BytesIO(record.image)) as image:
            assert image.size == (record.width, record.height)
        assert record.label == (key.split("/")[0] if "/" in key else None)
        assert record.source == "test"
    assert stats["labels"] == {"class0": 3, "class1": 3, "class2": 3}


def test_drop_counts_are_exact_and_name_the_reason(tmp_path):
    root = make_tree(tmp_path / "in", images=6)
    good = (root / "class0/image_000.png").read_bytes()
    jpeg = picture(64, 64, 7, "JPEG")
    bad = {
        "bad/tiny.png": picture(31, 200),
        "bad/thin.png": picture(32, 300),
        "bad/truncated.jpg": jpeg[: len(jpeg) // 2],
        "bad/corrupt.png": good[:60] + bytes(40) + good[100:],
        "bad/page.jpg": b"<!DOCTYPE html><html><body>404</body></html>",
        "bad/empty.jpg": b"",
        "zz/duplicate.png": good,
        "zz/duplicate_again.png": good,
        "bad/notes.txt": b"not an image by name: not an input",
    }
    for name, data in bad.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(data)
    for side in (12_000, 60_000):  # a header that promises these pixels
        header = b"IHDR" + struct.pack(">II", side, side) + good[24:29]
        data = good[:12] + header + struct.pack(">I", zlib.crc32(header)) + good[33:]
        (root / f"bad/bomb{side}.png").write_bytes(data)
    (root / "bad/gone.jpg").symlink_to(root / "nowhere.jpg")
    os.mkfifo(root / "bad/pipe.jpg")
    stats = convert(root, tmp_path / "out", shards=2)
    counts = {reason: row["count"] for reason, row in stats["dropped"].items()}
    assert counts == {
        "undecodable": 3,
        "duplicate": 2,
        "more pixels than the limit": 2,
        "unreadable": 2,
        "empty file": 1,
        "too small": 1,
        "too thin": 1,
    }
    assert (stats["inputs"], stats["kept"]) == (18, 6)
    assert stats["dropped"]["duplicate"]["examples"] == [
        "zz/duplicate.png",
        "zz/duplicate_again.png",
    ]
    assert set(read_shards(tmp_path / "out")) == {
        f"class{i % 3}/image_{i:03d}.png" for i in range(6)
    }


def test_larger_images_are_shrunk_upright_and_others_keep_their_bytes(tmp_path):
    root = tmp_path / "in"
    root.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    (root / "large.jpg").write_bytes(picture(400, 200, 1, "JPEG", exif=exif))
    (root / "small.jpg").write_bytes(picture(100, 50, 2, "JPEG", exif=exif))
    stats = convert(root, tmp_path / "out", items.Rules(max_side=128))
    found = read_shards(tmp_path / "out")
    assert (found["large.jpg"].width, found["large.jpg"].height) == (64, 128)
    with Image.open(io.BytesIO(found["large.jpg"].image)) as image:
        assert image.size == (64, 128) and image.format == "JPEG"
    assert (found["small.jpg"].width, found["small.jpg"].height) == (50, 100)
    assert found["small.jpg"].image == (root / "small.jpg").read_bytes()
    assert stats["reencoded"] == 1


def test_captions_come_from_the_text_beside_or_from_the_name(tmp_path):
    root = tmp_path / "in"
    root.mkdir()
    (root / "brown_dog-02.png").write_bytes(picture(40, 40))
    (root / "brown_dog-02.txt").write_text("A dog.\n\n Ein Hund, größer \n", "utf-8")
    (root / "Ünïcode 図.png").write_bytes(picture(40, 41))
    convert(root, tmp_path / "text", captions="sidecar-txt")
    convert(root, tmp_path / "name", captions="filename")
    by_text, by_name = read_shards(tmp_path / "text"), read_shards(tmp_path / "name")
    assert by_text["brown_dog-02.png"].captions == ("A dog.", "Ein Hund, größer")
    assert by_text["Ünïcode 図.png"].captions == ()
    assert by_name["brown_dog-02.png"].captions == ("brown dog 02",)
    assert by_name["Ünïcode 図.png"].captions == ("Ünïcode 図",)


def test_names_that_are_not_unicode_get_valid_and_different_keys(tmp_path):
    root = tmp_path / "in"
    root.mkdir()
    for i, name in enumerate((b"caf\xe9.png", b"caf\xe8.png")):
        (root / os.fsdecode(name)).write_bytes(picture(40, 40 + i))
    convert(root, tmp_path / "out")
    assert len(read_shards(tmp_path / "out")) == 2
    assert key_of("plain/é.jpg") == "plain/é.jpg"


def test_links_are_followed_and_loops_are_not(tmp_path):
    root = make_tree(tmp_path / "in", images=3)
    elsewhere = make_tree(tmp_path / "elsewhere", images=6, side=50)
    (root / "loop").symlink_to(root)
    (root / "class0/up").symlink_to(root)
    (root / "linked").symlink_to(elsewhere)
    paths = [unit["path"] for unit in list_folder(root)]
    assert len(paths) == 9
    assert sum(path.startswith("linked/") for path in paths) == 6


def test_the_plan_is_sorted_and_deals_everything_once():
    units = [{"path": str(i)} for i in range(17)]
    for shards in (1, 2, 5, 17):
        parts = plan.deal(units, shards)
        assert [unit for part in parts for unit in part] == units
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_shard_is_a_pure_function_of_its_plan(tmp_path):
    root = make_tree(tmp_path / "in", images=8)
    for name in ("a", "b"):
        convert(root, tmp_path / name, shards=2)
    assert shard_bytes(tmp_path / "a") == shard_bytes(tmp_path / "b")


def test_a_writer_that_fails_leaves_nothing_under_the_final_name(tmp_path, monkeypatch):
    root = make_tree(tmp_path / "in", images=4)

    class FullDisk(array_record_module.ArrayRecordWriter):
        def close(self):
            raise RuntimeError("Flush failed: No space left on device; writing")

    monkeypatch.setattr(work.array_record_module, "ArrayRecordWriter", FullDisk)
    with pytest.raises(OSError, match="No space left"):
        convert(root, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*record*"))


def test_killed_at_any_moment_the_same_command_finishes_with_the_same_bytes(tmp_path):
    root = make_tree(tmp_path / "test", images=200, side=150)
    args = ("--input", root, "--shards", 20, "--workers", 2, "--label-from", "folder")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    stats = convert(root, whole, shards=20, label_from="folder")
    stamps, kills = {}, 0
    for wanted in (0, 6):  # shards that are finished at the moment of the kill
        process = subprocess.Popen(
            command(*args, "--output", killed),
            env=ENVIRONMENT,
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            begun = list(killed.glob("*.tmp"))
            if begun and len(list(killed.glob(".plan/*.staged"))) >= wanted:
                break
            time.sleep(0.002)
        kills += process.poll() is None
        os.kill(process.pid, signal.SIGKILL)  # the parent alone: its workers must follow it
        process.wait()
        _wait_until_nobody_works(killed)
        for path in killed.glob(".plan/*.staged"):
            stamps.setdefault(path.stem, path.stat().st_mtime_ns)
    assert kills and stamps
    (killed / f"{records.shard_name('train', 19, 20)}.123.tmp").write_bytes(b"half a shard")
    last = run(*args, "--output", killed)
    assert last.returncode == 0, last.stderr
    assert shard_bytes(killed) == shard_bytes(whole)
    assert not list(killed.glob("*.tmp"))
    for index in range(20):  # renamed, not written again
        path = killed / records.shard_name("train", index, 20)
        assert path.stat().st_mtime_ns == stamps.get(f"train-{index:05d}", path.stat().st_mtime_ns)
    summary = json.loads((killed / "train.summary.json").read_text())
    del stats["listed"]  # values of lists of the user's: never in the file
    assert summary == {"split": "train", "shards": 20, **stats}


def _wait_until_nobody_works(output, seconds=10):
    """Until no process names the folder in its open files: orphans give up within half a second."""

    def busy():
        for handle in Path("/proc").glob("[0-9]*/fd/*"):
            try:
                if str(output) in os.readlink(handle):
                    return True
            except OSError:
                continue
        return False

    deadline = time.monotonic() + seconds
    while busy():
        assert time.monotonic() < deadline, "an orphan goes on working"
        time.sleep(0.1)


def test_workers_do_not_change_a_byte_and_a_finished_run_touches_nothing(tmp_path, invoke):
    root = make_tree(tmp_path / "in", images=30)
    outputs = [tmp_path / "one", tmp_path / "three"]
    args = ("--input", root, "--images-per-shard", 7, "--test-fraction", 0.3)
    for output, workers in zip(outputs, (1, 3), strict=True):
        assert invoke(*args, "--output", output, "--workers", workers)[0] == 0
    assert shard_bytes(outputs[0]) == shard_bytes(outputs[1])
    summaries = [(output / "train.summary.json").read_bytes() for output in outputs]
    assert summaries[0] == summaries[1]
    train, test = read_shards(outputs[0]), read_shards(outputs[0], "test")
    assert len(train) + len(test) == 30 and not set(train) & set(test)
    before = {path: path.stat().st_mtime_ns for path in outputs[0].glob("*.arrayrecord")}
    code, errors = invoke(*args, "--output", outputs[0])
    assert code == 0 and any("continuing" in line for line in errors)
    # Files that come later are not in the plan: finished shards would have to change.
    (root / "class0/new.png").write_bytes(picture(40, 40, 1000))
    (root / "class0/new.md").touch()
    code, errors = invoke(*args, "--output", outputs[0])
    assert code == 2 and "30 inputs; now there are 1 new (class0/new.png);" in errors[-1]
    assert before == {path: path.stat().st_mtime_ns for path in outputs[0].glob("*.arrayrecord")}
    summary = json.loads(summaries[0])
    assert summary["kept"] == len(train) and summary["shards"] == -(-summary["inputs"] // 7)


def test_an_interrupt_stops_cleanly_and_says_that_the_command_continues(tmp_path):
    root = tmp_path / "in"
    root.mkdir()
    data = picture(600, 600)
    for i in range(120):  # bytes behind the end of a PNG are none of its pixels
        (root / f"{i}.png").write_bytes(data + bytes([i]))
    args = ("--input", root, "--output", tmp_path / "out", "--shards", 60, "--workers", 1)
    process = subprocess.Popen(command(*args), env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    while not list((tmp_path / "out").glob(".plan/*.staged")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130 and "the same command continues" in errors
    assert "Traceback" not in errors
    assert not list((tmp_path / "out").glob("*.tmp"))


def test_a_full_disk_is_one_line_and_what_is_finished_stays(tmp_path, invoke):
    root = make_tree(tmp_path / "in", images=8)
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (300, 300, 3), dtype=np.uint8)
    for i in range(8):  # the last shard is larger than the limit
        Image.fromarray(np.roll(pixels, i, axis=0)).save(root / f"class2/zz{i}.png")
    args = command("--input", root, "--output", tmp_path / "out", "--shards", 2, "--workers", 1)
    limit = (700_000, 700_000)  # a write beyond it fails as on a full disk
    done = subprocess.run(
        args,
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit),
    )
    assert done.returncode == 2, done.stderr
    assert "No space left" in done.stderr.splitlines()[-1]
    assert "1 of 2 shards are done and stay" in done.stderr.splitlines()[-1]
    final = [path.name for path in (tmp_path / "out").glob("*record*")]
    assert final == [records.shard_name("train", 0, 2)]  # it did not wait for the second
    assert invoke(*args[3:])[0] == 0


def test_a_worker_that_dies_is_one_line(tmp_path):
    plan.prepare(tmp_path, {}, lambda: ({}, {"train": [[{}]]}))
    runner = functools.partial(runners.pool, 1)
    with pytest.raises(UserError, match=r"a worker process died.*0 of 1 shards are done"):
        runners.convert(tmp_path, DyingReader(), items.Rules(), runner)


def test_bad_commands_are_refused_with_one_line(tmp_path, invoke):
    def refused(*args):
        code, lines = invoke(*args)
        lines = [line for line in lines if not line.startswith("listing")]
        assert code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
        return lines[0]

    root = make_tree(tmp_path / "in", images=3)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    out = tmp_path / "out"
    assert "no such folder" in refused("--input", tmp_path / "nowhere", "--output", out)
    assert "not a folder" in refused("--input", tmp_path / "file", "--output", out)
    assert "cannot be written" in refused("--input", root, "--output", tmp_path / "file/out")
    assert "no image files" in refused("--input", tmp_path / "empty", "--output", tmp_path / "o2")
    assert "'--shards'" in refused("--input", root, "--output", out, "--shrads", 3)
    assert "--max-aspect" in refused("--input", root, "--output", out, "--max-aspect", 0.5)
    assert "--split" in refused("--input", root, "--output", out, "--split", "a/b")
    assert "too few" in refused(
        "--input", root, "--output", tmp_path / "o3", "--test-fraction", 0.0001
    )
    for name in ("nowhere", "out", "o2", "o3"):
        assert not (tmp_path / name).exists()


def test_the_command_itself_refuses_with_exit_code_2(tmp_path):
    done = run("--input", tmp_path / "nowhere", "--output", tmp_path / "out")
    assert done.returncode == 2
    assert done.stderr == f"error: --input {tmp_path}/nowhere: no such folder\n"


def test_other_arguments_in_a_begun_folder_are_refused_by_name(tmp_path):
    root = make_tree(tmp_path / "in", images=3)
    settings = {"input": str(root), "label_from": "none"}
    plan.prepare(tmp_path / "out", settings | {"label_from": "folder"}, lambda: ({}, {}))
    with pytest.raises(UserError, match="--label-from folder, now none"):
        plan.prepare(tmp_path / "out", settings, dict)


def test_shards_from_elsewhere_are_not_overwritten(tmp_path):
    shard = tmp_path / records.shard_name("train", 0, 1)
    shard.write_bytes(b"someone's")
    with pytest.raises(UserError, match="from elsewhere"):
        plan.prepare(tmp_path, {}, dict)
    assert shard.read_bytes() == b"someone's"


def test_two_conversions_into_one_folder_exclude_each_other(tmp_path):
    root = make_tree(tmp_path / "in", images=3)
    convert(root, tmp_path / "out")
    with plan.lock(tmp_path / "out"):
        with pytest.raises(UserError, match="another conversion"):
            runners.convert(
                tmp_path / "out",
                FolderReader(str(root), "test"),
                items.Rules(),
                functools.partial(runners.pool, 1),
            )


def test_a_second_command_does_not_touch_a_plan_that_is_being_made(tmp_path):
    def make():
        with pytest.raises(UserError, match="another conversion"):
            plan.prepare(tmp_path, {"other": 1}, lambda: ({}, {"train": []}))
        return {"mine": 1}, {"train": [[{}]]}

    assert plan.prepare(tmp_path, {}, make) == ({"mine": 1}, False)
