import logging

import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from webssl_jax.telemetry.profiler import Profiler

double = jax.jit(lambda x: x * 2)


def take(profiler, steps):
    for step in range(1, steps + 1):
        profiler.step_started(step, {"x": double(jnp.float32(step))}, look=True)
    profiler.stop()


def make(tmp_path, start_step=0, steps=2):
    return Profiler(tmp_path, ConfigDict({"start_step": start_step, "steps": steps}))


def traces(tmp_path):
    return [path for path in (tmp_path / "profile").rglob("*.xplane.pb") if path.stat().st_size]


@pytest.mark.parametrize("text, last", [("", 3), ("5\n", 6)])
def test_a_touched_file_asks_for_a_profile_and_is_removed(tmp_path, caplog, text, last):
    caplog.set_level(logging.INFO)
    (tmp_path / "PROFILE").write_text(text)
    take(make(tmp_path), 8)
    assert not (tmp_path / "PROFILE").exists() and len(traces(tmp_path)) == 1
    assert f"profiling steps 2 to {last}" in caplog.text
    assert f"xprof --logdir {tmp_path}/profile" in caplog.text


def test_a_window_that_the_run_does_not_reach_the_end_of_is_closed(tmp_path):
    take(make(tmp_path, start_step=2, steps=100), 3)
    assert len(traces(tmp_path)) == 1
    with jax.profiler.trace(tmp_path / "other"):  # so no trace is left open
        pass


def test_a_profile_that_fails_costs_one_line(tmp_path, caplog):
    (tmp_path / "PROFILE").write_text("three")
    take(make(tmp_path), 2)
    assert "holds 'three', not a number of steps" in caplog.text
    caplog.clear()
    with jax.profiler.trace(tmp_path / "another"):  # somebody else is tracing
        take(make(tmp_path, start_step=1), 3)
    assert len([r for r in caplog.records if r.levelno >= logging.WARNING]) == 1
    assert "no profile: " in caplog.text


@pytest.mark.parametrize("text", ["9" * 5000, "9" * 10])
def test_a_number_too_long_to_be_meant_costs_one_line(tmp_path, caplog, text):
    (tmp_path / "PROFILE").write_text(text)
    take(make(tmp_path), 2)
    assert "holds '9999999999" in caplog.text and "not a number of steps" in caplog.text
    assert not (tmp_path / "PROFILE").exists() and not (tmp_path / "profile").exists()


def test_nothing_is_traced_unless_asked_for(tmp_path):
    take(make(tmp_path), 3)
    assert not (tmp_path / "profile").exists()
