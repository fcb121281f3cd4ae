"""Garbage at the same step, a limit to waiting, one folder for compiled programs."""

import gc
import subprocess
import sys

import jax
import pytest
from ml_collections import ConfigDict

from tests.e2e.runner import ROOT
from webssl_jax.telemetry import host
from webssl_jax.telemetry.host import CompileTimes, Watchdog, use_compilation_cache

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


@pytest.fixture
def told(monkeypatch):
    """What jax is told, with no cache of compiled programs set."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    updates = {}
    with monkeypatch.context() as patch:
        patch.setattr(jax.config, "update", updates.__setitem__)
        yield updates
    jax.config.update("jax_compilation_cache_dir", before)


def test_compiled_programs_go_to_the_configs_folder_or_nowhere(tmp_path, monkeypatch, told):
    monkeypatch.chdir(tmp_path)
    use_compilation_cache("programs")
    assert told == {"jax_compilation_cache_dir": str(tmp_path / "programs")}
    use_compilation_cache("none")
    assert told == {"jax_compilation_cache_dir": None}


def test_compiled_programs_go_to_a_folder_of_the_users_unless_jax_has_one(
    tmp_path, monkeypatch, told, caplog
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    use_compilation_cache("")
    (folder,) = (tmp_path / "webssl_jax" / "compiled").iterdir()
    assert told == {"jax_compilation_cache_dir": str(folder)}
    told.clear()
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/self")  # nothing can be written there
    use_compilation_cache("")
    assert not told and "compiled programs are not kept: /proc/self" in caplog.text
    monkeypatch.setattr(type(jax.config), "jax_compilation_cache_dir", "from jax", raising=False)
    use_compilation_cache("")
    assert not told


def test_the_time_of_a_compilation_is_known_at_the_next_start(tmp_path, monkeypatch):
    monkeypatch.setattr(type(jax.config), "jax_compilation_cache_dir", str(tmp_path), raising=False)
    assert CompileTimes().last("a on 8 TPU v5") is None
    CompileTimes().store("a on 8 TPU v5", 12.34)
    CompileTimes().store("b on 8 TPU v5", 2.0)
    assert CompileTimes().last("a on 8 TPU v5") == 12.3
    (tmp_path / "seconds.json").write_text("{")  # cut short: not known, and no error
    assert CompileTimes().last("a on 8 TPU v5") is None
