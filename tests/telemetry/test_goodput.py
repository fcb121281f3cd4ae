"""Where the time of a run went, over its starts; of real ones in tests/multihost."""

import json

from webssl_jax.telemetry.goodput import Goodput, totals


class Clock:
    def __init__(self, now=1000.0):
        self.now = now

    def __call__(self):
        return self.now


def _start(workdir, clock, step=0, **kwargs):
    goodput = Goodput(workdir, clock.now, clock=clock, **kwargs)
    goodput.begin(step)
    return goodput


def test_every_second_belongs_to_one_kind(tmp_path):
    clock = Clock()
    goodput = _start(tmp_path, clock)
    clock.now += 5
    with goodput.of("compile"):
        clock.now += 40
    clock.now += 1
    goodput.enter("step")
    clock.now += 100
    goodput.step_done(10, wait_seconds=30.0)
    with goodput.of("evaluation"):
        clock.now += 20
    with goodput.of("checkpoint"):
        clock.now += 4
    clock.now += 50
    goodput.step_done(20, wait_seconds=30.0)
    assert goodput.totals() == {
        "step": 120.0,
        "data": 30.0,
        "compile": 40.0,
        "checkpoint": 4.0,
        "evaluation": 20.0,
        "init": 6.0,
        "lost": 0.0,
    }
    assert sum(goodput.totals().values()) == clock.now - 1000
    assert goodput.fraction() == 120 / 220
    assert goodput.report().startswith("goodput 54.5% of 3:40 in 1 start(s): step 54.5%, data 13.6")


def test_steps_that_are_taken_again_are_lost(tmp_path):
    """Killed at step 30, continued from 20, killed at 25, continued from 20 again."""
    clock = Clock()
    for begins, ends in ((0, 30), (20, 25), (20, 40)):
        goodput = _start(tmp_path, clock, begins)
        goodput.enter("step")
        clock.now += 10.0 * (ends - begins)
        goodput.step_done(ends, 0.0)
        clock.now += 1000  # nobody runs
    assert goodput.totals()["step"] == 10.0 * 40 + 1000  # the last goes on
    assert goodput.totals()["lost"] == 10.0 * (10 + 5)


def test_a_start_from_an_earlier_checkpoint_loses_what_several_starts_did():
    """0 to 100, 50 to 70, and past a damaged checkpoint 20 to 120: 100 steps were taken again."""
    starts = [
        {"start_step": begun, "step": step, "seconds": {"step": float(step - begun)}}
        for begun, step in ((0, 100), (50, 70), (20, 120))
    ]
    found = totals(starts)
    assert (found["step"], found["lost"]) == (120.0, 100.0)


def test_a_start_that_saved_no_checkpoint_is_lost_whole(tmp_path):
    clock = Clock()
    first = _start(tmp_path, clock)
    first.enter("step")
    clock.now += 70
    first.step_done(7, 0.0)
    second = _start(tmp_path, clock)
    assert second.totals()["lost"] == 70 and second.totals()["step"] == 0


def test_only_the_first_process_writes_and_a_damaged_record_costs_nothing(tmp_path):
    clock = Clock()
    _start(tmp_path, clock, enabled=False).save()
    path = tmp_path / "goodput.json"
    assert not path.exists()
    for text in ("", "[1]", '{"a": 1}', '[{"step": 1}]'):
        path.write_text(text)
        goodput = _start(tmp_path, clock)
        goodput.save()
        assert len(json.loads(path.read_text())) == 1


def test_a_record_that_cannot_be_written_stops_nothing(tmp_path, caplog):
    goodput = _start(tmp_path / "not there", Clock())
    for _ in range(2):
        goodput.save()
    assert len(caplog.records) == 1 and "is not kept any more" in caplog.text
