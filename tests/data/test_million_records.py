"""A million records: converted, loaded, resumed and verified in bounded memory, killed twice on the
way.

Also a command, which prints rates and memory: python tests/data/test_million_records.py 100000
"""

import dataclasses
import io
import json
import os
import pathlib
import re
import struct
import subprocess
import sys
import tarfile
import tempfile
import textwrap
import time
import zlib

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parent.parent.parent
PER_TAR = 10_000  # and so per shard
BATCH = 500


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def tiny_png(number):
    """1 to 8 pixels wide and high, of a colour that no other has. About 70 bytes."""
    width, height = 1 + number % 8, 1 + number // 8 % 8
    row = b"\0" + (number & 0xFFFFFF).to_bytes(3, "big") * width
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(row * height))
        + chunk(b"IEND", b"")
    )


def write_tars(folder, count, per_tar):
    """As img2dataset does: 0000012.png and 0000012.txt follow each other in 00000.tar."""
    folder.mkdir()
    for first in range(0, count, per_tar):
        with tarfile.open(folder / f"{first // per_tar:05d}.tar", "w") as tar:
            for number in range(first, min(first + per_tar, count)):
                for extension, data in (("png", tiny_png(number)), ("txt", b"number %d" % number)):
                    member = tarfile.TarInfo(f"{number:07d}.{extension}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


@dataclasses.dataclass
class Stage:
    """What a process took: seconds of the clock and of the CPU, and the most memory that it or any
    of its children held."""

    code: int
    output: str
    seconds: float
    cpu_seconds: float
    megabytes: float


def peak_megabytes(pid):
    """The most memory that the process or one of its children has held so far. Not ru_maxrss: that
    counts what the process which started it (pytest) holds."""
    try:
        status = pathlib.Path(f"/proc/{pid}/status").read_text()
        children = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:  # it has ended meanwhile
        return 0.0
    peak = re.search(r"VmHWM:\s+(\d+) kB", status)  # a process that has just ended has none
    own = int(peak[1]) / 1024 if peak else 0.0
    return max([own, *map(peak_megabytes, children)])


def run(command, until=None):
    """Runs a command; kills it (SIGKILL) as soon as ``until()`` is true."""
    began = time.monotonic()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            [sys.executable, *map(str, command)],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        peak = 0.0
        while (ended := os.wait4(process.pid, os.WNOHANG))[0] == 0:
            peak = max(peak, peak_megabytes(process.pid))
            if until is not None and until():
                process.kill()
            time.sleep(0.02)
        _, status, usage = ended
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        text = output.read()
    cpu = usage.ru_utime + usage.ru_stime
    return Stage(process.returncode, text, time.monotonic() - began, cpu, peak)


LOAD = textwrap.dedent(f"""
    import os, sys
    import numpy as np
    from webssl_jax.data.pipeline import TrainLoader
    from webssl_jax.data.sources import ArrayRecordSource
    from webssl_jax.data.views import RandomResizedCropView

    pattern, log = sys.argv[1:]
    source = ArrayRecordSource(pattern)
    with open(log, "ab") as file:
        done = file.tell() // (8 * {BATCH})
        file.truncate(done * 8 * {BATCH})
        view = RandomResizedCropView(8)
        with TrainLoader(
            source, view, global_batch={BATCH}, seed=7, start_step=done, threads=4
        ) as loader:
            for step in range(done, -(-len(source) // {BATCH})):
                batch = next(loader)
                assert batch["image"].shape == ({BATCH}, 8, 8, 3)
                assert not batch["substituted"].any()
                file.write(batch["record"].tobytes())
                file.flush()
    print("resumed at", done)
""")


def journey(folder, count):
    """{stage: :class:`Stage`}, after checking that nothing was lost."""
    per_tar = min(PER_TAR, count // 8)
    shards = -(-count // per_tar)
    stages = {}
    tars, output, log = folder / "tars", folder / "shards", folder / "records.i8"
    write_tars(tars, count, per_tar)

    convert = [ROOT / "tools" / "make_records.py", "tar", "--input", tars / "*.tar"]
    convert += ["--output", output, "--min-side", 1, "--workers", 2]

    def staged():
        """{shard number: when its records were written}. At the end they get their names."""
        waiting = {int(p.stem[-5:]): p for p in output.glob(".plan/*.staged")}
        named = {int(p.name.split("-")[1]): p for p in output.glob("*.arrayrecord")}
        return {number: p.stat().st_mtime_ns for number, p in (waiting | named).items()}

    stages["convert, killed"] = run(convert, until=lambda: len(staged()) > shards // 3)
    assert stages["convert, killed"].code == -9, stages["convert, killed"].output
    before = staged()
    assert 0 < len(before) < shards
    stages["convert, continued"] = run(convert)
    assert stages["convert, continued"].code == 0, stages["convert, continued"].output
    after = staged()
    assert len(after) == shards == len(list(output.glob("*.arrayrecord")))
    assert {number: after[number] for number in before} == before  # none was written again

    load = ["-c", LOAD, output, log]
    half = 8 * count // 2
    stages["load, killed"] = run(load, until=lambda: log.exists() and log.stat().st_size > half)
    assert stages["load, killed"].code == -9, stages["load, killed"].output
    stages["load, resumed"] = run(load)
    assert stages["load, resumed"].code == 0, stages["load, resumed"].output
    assert "resumed at 0" not in stages["load, resumed"].output
    seen = np.fromfile(log, np.int64)[:count]
    assert (np.sort(seen) == np.arange(count)).all()  # each once, as if nobody had disturbed it

    verify = [ROOT / "tools" / "inspect_records.py", output, "--verify", "--json", "--workers", 2]
    stages["verify"] = run(verify)
    assert stages["verify"].code == 0, stages["verify"].output
    text = stages["verify"].output
    facts = json.loads(text[text.index("\n{\n") :])
    assert facts["records"] == facts["whole"] == count and facts["damaged"] == 0
    assert facts["duplicate_keys"]["records"] == 0
    assert facts["duplicate_images"]["records"] == 0 and facts["captions"] == count
    return stages


@pytest.mark.parametrize("count", [8_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_records_convert_load_resume_and_verify_in_bounded_memory(tmp_path, count):
    stages = journey(tmp_path, count)
    for name, stage in stages.items():
        assert stage.megabytes < 1024, f"{name}: {stage.megabytes:.0f} MB"


if __name__ == "__main__":
    total = int(sys.argv[1])
    with tempfile.TemporaryDirectory() as name:
        for stage, took in journey(pathlib.Path(name), total).items():
            print(
                f"{stage:20} {took.seconds:7.1f} s, {took.cpu_seconds:7.1f} s of CPU, "
                f"at most {took.megabytes:6.0f} MB a process"
            )
