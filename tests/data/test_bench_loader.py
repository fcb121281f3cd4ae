"""The loader benchmark counts what it says it counts."""

import importlib.util
import io
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from webssl_jax.config import UserError

TOOL = pathlib.Path(__file__).parents[2] / "tools" / "bench_loader.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_loader", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_made_photos_cost_what_photographs_cost(bench):
    for seed in range(3):
        data = bench._photo(np.random.default_rng(seed))
        assert Image.open(io.BytesIO(data)).size == (500, 375)
        assert 0.9 < len(data) / 37_000 < 1.1


def test_cpu_time_and_rest_are_those_of_a_process_and_its_children(bench):
    # A parent that only waits, and a child that works half a CPU second and then sleeps.
    child = "import time\nwhile time.process_time() < 0.5: pass\nprint(flush=True); time.sleep(60)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    process = subprocess.Popen(
        [sys.executable, "-c", parent], stdout=subprocess.PIPE, start_new_session=True
    )

    def wait_until(running: bool) -> int:
        deadline = time.monotonic() + 60
        while (found := bench._activity(process.pid))[1] != running:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return found[0]

    try:
        wait_until(running=True)
        process.stdout.readline()
        ticks = wait_until(running=False)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert 0.5 <= ticks / os.sysconf("SC_CLK_TCK") < 1.5


def test_a_missing_torchvision_is_one_line_before_any_work(bench, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench_loader.py"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="the torch side needs torch"):
        bench.main()
