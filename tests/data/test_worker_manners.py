"""Claims about worker processes: who answers Ctrl-C, and when they end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = """
import multiprocessing, os, sys, time
from concurrent import futures
from pathlib import Path
from webssl_jax.data import processes

def task(folder):
    (Path(folder) / str(os.getpid())).touch()
    try:
        time.sleep(300)
    except KeyboardInterrupt:
        print("a worker was interrupted", file=sys.stderr, flush=True)

if __name__ == "__main__":
    pool = futures.ProcessPoolExecutor(
        2, multiprocessing.get_context("spawn"), initializer=processes.start_worker
    )
    try:
        futures.wait([pool.submit(task, sys.argv[1]) for _ in range(3)])
    except KeyboardInterrupt:
        time.sleep(1)  # time for the workers to say something
        processes.end_workers(pool)
        sys.exit(7)
"""


@pytest.fixture
def parent(tmp_path):
    """A process of its own group whose two workers are busy for five minutes, and their ids."""
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "ids").mkdir()
    process = subprocess.Popen(
        [sys.executable, tmp_path / "script.py", tmp_path / "ids"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "ids").iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    yield process, [int(path.name) for path in (tmp_path / "ids").iterdir()]
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def still_running(pids, seconds):
    """Those that have not ended when the seconds are over."""
    deadline = time.monotonic() + seconds
    while (alive := [pid for pid in pids if _runs(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return alive


def _runs(pid):
    try:  # an orphan that nobody reaps is a zombie
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_ctrl_c_is_answered_by_the_parent_alone_which_ends_busy_workers(parent):
    process, workers = parent
    assert len(workers) == 2
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 7 and errors == ""
    assert not still_running(workers, 0)


def test_busy_workers_end_with_a_killed_parent(parent):
    process, workers = parent
    assert len(workers) == 2
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not still_running(workers, 20)
