"""Garbage at the same step, a limit to waiting, one folder for compiled programs."""

import gc
import subprocess
import sys

import jax
import pytest
from ml_collections import ConfigDict

from tests.e2e.runner import ROOT
from webssl_jax.telemetry import host
from webssl_jax.telemetry.host import Watchdog, use_compilation_cache

LIMITLESS = {"gc_every_steps": 0, "stuck_minutes": 0.0, "stuck_pause_minutes": 0.0}
STUCK = """
import time
from ml_collections import ConfigDict
from webssl_jax.telemetry.host import Watchdog
limits = {"gc_every_steps": 0, "stuck_minutes": 0.05, "stuck_pause_minutes": PAUSE}
watchdog = Watchdog(ConfigDict(limits))
def at_the_start():
    time.sleep(4)
at_the_start()
watchdog.start()
for step in range(4):
    watchdog.step_started(step)
    time.sleep(0.2)
with watchdog.pause():
    time.sleep(4)
print("still here", flush=True)
def waiting_for_another_process():
    time.sleep(60)
waiting_for_another_process()
"""


def test_garbage_is_collected_at_multiples_of_the_step_and_not_otherwise(monkeypatch):
    collected = []
    monkeypatch.setattr(host.gc, "collect", lambda: collected.append(step))
    watchdog, step = Watchdog(ConfigDict(LIMITLESS | {"gc_every_steps": 3})), 0
    watchdog.start()
    try:
        assert not gc.isenabled()
        for step in range(5, 13):
            watchdog.step_started(step)
    finally:
        watchdog.stop()
    assert collected == [0, 6, 9, 12] and gc.isenabled()


@pytest.mark.parametrize(
    "pause, before, where",
    [(0, "still here\n", "waiting_for_another_process"), (0.05, "", "at_the_start")],
)
def test_what_takes_too_long_ends_the_process_with_its_stacks(pause, before, where):
    script = STUCK.replace("PAUSE", str(pause))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and done.stdout == before
    assert "Timeout" in done.stderr and f"in {where}" in done.stderr


@pytest.mark.parametrize("folder, used", [("", None), ("programs", "programs")])
def test_compiled_programs_go_to_the_configs_folder(tmp_path, monkeypatch, folder, used):
    monkeypatch.chdir(tmp_path)
    told = {}
    monkeypatch.setattr(jax.config, "update", told.__setitem__)
    use_compilation_cache(folder)
    wanted = {"jax_compilation_cache_dir": str(tmp_path / used)} if used else {}
    assert told == wanted
