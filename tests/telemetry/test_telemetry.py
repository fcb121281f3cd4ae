import importlib
import io
import json
import types

import pytest

from webssl_jax.config import UserError
from webssl_jax.telemetry.progress import Progress, format_seconds
from webssl_jax.telemetry.throughput import Throughput
from webssl_jax.telemetry.writer import MetricWriter, read_rows


@pytest.fixture
def clock(monkeypatch):
    """A clock that only its own sleep moves: a busy machine sleeps longer than it is asked to."""

    class Clock:
        now = 100.0

        def read(self):
            return self.now

        def sleep(self, seconds):
            self.now += seconds

    made = Clock()
    for name in ("progress", "throughput"):
        module = importlib.import_module(f"webssl_jax.telemetry.{name}")
        stand_in = types.SimpleNamespace(
            monotonic=made.read, perf_counter=made.read, strftime=lambda form: "NOW "
        )
        monkeypatch.setattr(module, "time", stand_in)
    return made


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_seconds_are_readable():
    assert [format_seconds(s) for s in (59, 725, 11525, 184325)] == [
        "59s",
        "12:05",
        "3:12:05",
        "2d 03:12",
    ]


def test_a_terminal_gets_one_line_that_is_rewritten():
    stream = Terminal()
    progress = Progress(4, "train", "steps", stream)
    for _ in range(4):
        progress.update(1, "loss 0.5", force=True)
    progress.close("loss 0.5")
    text = stream.getvalue()
    assert text.count("\n") == 1 and text.endswith("\n") and text.count("\r") == 5
    assert "train 4/4 steps (100%)" in text.split("\r")[-1] and "loss 0.5" in text


def test_a_log_file_gets_plain_lines_now_and_then(clock):
    stream = io.StringIO()
    progress = Progress(100, "train", "steps", stream, plain_every_seconds=0.05)
    for _ in range(100):
        progress.update()
        clock.sleep(0.002)
    lines = stream.getvalue().splitlines()
    assert 4 <= len(lines) <= 5 and "\r" not in stream.getvalue()
    assert all("steps" in line for line in lines)


def test_a_slow_rate_reads_as_seconds_a_step_and_the_last_line_comes_once(clock):
    stream = io.StringIO()
    progress = Progress(5, "train", "steps", stream, timed=True)
    for _ in range(2):
        clock.sleep(4)
        progress.update(force=True)
    progress.close()
    lines = stream.getvalue().splitlines()
    assert lines == [
        "NOW train 1/5 steps (20%) | 4.0 s/step | 16s left",
        "NOW train 2/5 steps (40%) | 4.0 s/step | 12s left",
    ]


def test_the_rate_follows_the_work_and_not_the_pauses(clock):
    progress = Progress(1000, "train", "steps", io.StringIO(), window=10)
    clock.sleep(0.3)  # an evaluation, say
    progress.resume()
    for _ in range(10):
        clock.sleep(0.01)
        progress.update()
    assert progress.rate == pytest.approx(100)
    assert progress.seconds_left == pytest.approx(990 / progress.rate, rel=0.01)


def test_throughput_counts_images_waiting_and_mfu(clock):
    meter = Throughput(100, train_flops=1e9, device_kind="TPU v4", num_devices=2)
    meter.restart(wait_seconds=5.0)
    clock.sleep(0.1)
    figures = meter.report(steps=2, wait_seconds=5.05)
    assert figures["perf/images_per_s"] == pytest.approx(2000)
    assert figures["data/wait_fraction"] == pytest.approx(0.5)
    assert figures["perf/mfu"] == pytest.approx(2000 * 1e9 / (2 * 275e12))
    assert "perf/mfu" not in Throughput(100, 1e9, "cpu", 1).report(1, 0.0)


def test_rows_after_the_restored_step_and_half_rows_are_dropped(tmp_path):
    with open(tmp_path / "metrics.jsonl", "w") as file:
        for step in range(5):
            file.write(json.dumps({"step": step, "train/loss": step / 10}) + "\n")
        file.write('{"step": 5, "train/lo')  # the process was killed here
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3, 4]
    writer = MetricWriter(tmp_path, step=3)
    writer.scalars(4, {"train/loss": 9.0})
    writer.close()
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4] and rows[-1]["train/loss"] == 9.0


def test_a_file_of_metrics_that_is_none_ends_in_words(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 1, "a": "\xff"}\n')
    with pytest.raises(UserError, match="metrics.jsonl: cannot be read .it is not UTF-8.; move it"):
        MetricWriter(tmp_path, step=1)
    file.unlink()
    file.mkdir()
    with pytest.raises(UserError, match="metrics.jsonl: cannot be read .Is a directory.; move it"):
        MetricWriter(tmp_path, step=1)


def test_a_process_that_is_not_the_first_writes_nothing(tmp_path):
    writer = MetricWriter(tmp_path / "none", enabled=False)
    writer.scalars(1, {"a": 1.0})
    writer.text(1, "a", "b")
    writer.close()
    assert not (tmp_path / "none").exists()
