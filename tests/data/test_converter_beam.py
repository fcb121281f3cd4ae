"""Claims about ``--runner beam`` of ``tools/make_records.py`` and ``tools/curate.py``.

apache-beam 2.77 asks for older pillow, protobuf, pyarrow and python-dateutil than
tools/constraints.txt pins, so that the test gives it an environment of its own.
"""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import gcs
from tests.data.conversions import read_shards
from tests.data.test_remote import seen
from tests.data.test_tar_reader import pack, samples

ROOT = Path(__file__).parents[2]
# What converting needs of the package's requirements, with the beam extra.
REQUIREMENTS = (
    "apache-beam==2.77.0 array_record==0.8.6 msgpack==1.2.4 ml_collections==1.1.0 "
    "numpy==2.4.6 cykooz.resizer simplejpeg scipy tenacity gcsfs matplotlib"
).split()


def environment():
    return {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}


def run(python, *args, tool=("make_records.py", "tar")):
    command = [python, ROOT / "tools" / tool[0], *tool[1:], *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=300)


def test_without_apache_beam_one_line_says_how_to_get_it(tmp_path):
    (tmp_path / "0.tar").write_bytes(pack(*samples(2)))
    script = (  # the tool, in an interpreter that has no apache_beam for sure
        "import sys, runpy; sys.modules['apache_beam'] = None; sys.argv = sys.argv[1:];"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    args = ["--input", tmp_path / "0.tar", "--output", tmp_path / "out", "--runner", "beam"]
    command = [sys.executable, "-c", script, ROOT / "tools/make_records.py", "tar", *args]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=60)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and last.startswith("error: --runner beam: apache-beam is not")
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_beams_direct_runner_writes_the_bytes_of_the_pool_and_continues(tmp_path):
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv/bin/python"
    subprocess.run([python, "-m", "pip", "install", "-q", *REQUIREMENTS], check=True, timeout=900)
    for i in range(5):  # with duplicates across tars, and one damage
        data = pack(*samples(10, first=8 * i))
        (tmp_path / f"{i}.tar").write_bytes(data[: len(data) // 2] if i == 3 else data)
    args = ("--input", tmp_path / "*.tar", "--runner")
    pool = run(python, *args, "pool", "--output", tmp_path / "pool")
    assert pool.returncode == 0, pool.stderr
    output = tmp_path / "beam"
    options = "--beam-options=--runner=DirectRunner --direct_num_workers=2"
    for again in range(2):
        beam = run(python, *args, "beam", "--output", output, options)
        assert beam.returncode == 0, beam.stderr
        assert "kB (100%)" in beam.stderr
        assert beam.stdout == pool.stdout and "duplicate" in beam.stdout
        shards = sorted(output.glob("*.arrayrecord"))
        assert [p.read_bytes() for p in shards] == [
            (tmp_path / "pool" / p.name).read_bytes() for p in shards
        ]
        assert len(shards) == 5 and len(read_shards(output)) > 30
        assert not list(output.glob("*.tmp"))
        if not again:  # as after a kill: two shards are missing, one of them staged
            shards[0].rename(output / ".plan/train-00000.staged")
            shards[3].unlink()
    bad = run(python, *args, "beam", "--output", tmp_path / "bad", "--beam-options=--runner=None1")
    assert bad.returncode == 2 and bad.stderr.splitlines()[-1].startswith("error: --beam-options")

    # From a bucket into a bucket, and a pass of curation over what is there.
    storage = gcs.of_this_process()
    for path in tmp_path.glob("*.tar"):
        storage._write("bucket", f"{tmp_path.name}/{path.name}", path.read_bytes())
    given = ("--input", f"gs://bucket/{tmp_path.name}/*.tar", "--output", "gs://bucket/beam")
    there = run(python, *given, "--runner", "beam", options)
    assert there.returncode == 0, there.stderr
    score = functools.partial(run, python, "--scorer", "statistics", tool=("curate.py", "score"))
    here = score("--input", tmp_path / "pool", "--output", tmp_path / "scores")
    assert here.returncode == 0, here.stderr
    beam = score(
        *("--input", "gs://bucket/beam", "--output", "gs://bucket/scores", "--runner", "beam"),
        options,
    )
    assert beam.returncode == 0, beam.stderr
    scorer = "--scorer", "text_boxes:model=none.onnx"  # refused by the workers
    given = "--input", tmp_path / "pool", "--output", tmp_path / "bad2", "--runner", "beam", options
    bad = run(python, *scorer, *given, tool=("curate.py", "score"))
    assert bad.returncode == 2, bad.stderr
    assert bad.stderr.splitlines()[-1].startswith("error: --scorer text_boxes: onnxruntime is not")
    for folder, name in ((tmp_path / "pool", "beam"), (tmp_path / "scores", "scores")):
        local = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        assert seen(storage, name) == local and len(local) > 5
