"""Trackers beside metrics.jsonl: each gets what the writer gets, none can stop or hold a run."""

import importlib.util
import logging
import sys
import threading
import types

import numpy as np
import pytest

from webssl_jax.config import UserError
from webssl_jax.telemetry.trackers import Detached, RunFacts, open_all
from webssl_jax.telemetry.writer import MetricWriter, read_rows

NAN = float("nan")


def facts_of(workdir, step=-1):
    return RunFacts(workdir, "a run", "abc123", step, {"optim": {"lr": 1e-3}, "seed": 7})


def report(workdir, asked, step=1):
    """What a run reports at a step, to its end."""
    writer = MetricWriter(workdir, step=step - 1, trackers=open_all(asked, facts_of(workdir)))
    writer.scalars(step, {"train/loss": step / 2, "train/odd": NAN})
    writer.text(step, "health/alarm", "ALARM")
    writer.pictures(step, {"crops": np.zeros((8, 8, 3), np.uint8)})
    writer.flush()
    writer.close()


def test_figures_texts_and_pictures_reach_tensorboard_and_files(tmp_path):
    report(tmp_path, "tensorboard")
    (events,) = (tmp_path / "tensorboard").iterdir()
    content = events.read_bytes()
    assert b"train/loss" in content and b"crops" in content and b"ALARM" in content
    assert (tmp_path / "pictures" / "crops_00000001.png").exists()
    assert np.isnan(read_rows(tmp_path / "metrics.jsonl")[0]["train/odd"])


def needs(package):
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"the extra {package} is not installed")


class FakeWandb(types.ModuleType):
    """The calls of W&B that are made, without its process."""

    def __init__(self):
        super().__init__("wandb")
        self.calls = []

    def __getattr__(self, name):
        def call(*arguments, **options):
            self.calls.append((name, *arguments, options))
            return self if name == "init" else (name, arguments)

        return call


def test_weights_and_biases_gets_them_in_one_run_with_steps_as_figures(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    report(tmp_path, "wandb")
    calls = [call for call in fake.calls if call[0] not in ("Settings", "Image")]
    start, metric, row, alert, pictures, end = calls
    asked = {"id": "abc123", "resume": "allow", "project": "mine", "name": "a run"}
    assert start[0] == "init" and start[1].items() >= asked.items()
    assert start[1]["config"] == {"optim": {"lr": 1e-3}, "seed": 7}
    # W&B's own step only rises, and a run that resumes takes some steps again.
    assert metric == ("define_metric", "*", {"step_metric": "step"})
    assert row[0] == "log" and row[1].items() >= {"step": 1, "train/loss": 0.5}.items()
    assert alert == ("alert", {"title": "health/alarm", "text": "step 1: ALARM"})
    assert pictures[1].keys() == {"step", "crops"} and end == ("finish", {})


@pytest.mark.slow  # its process may starve for minutes on a busy machine
@needs("wandb")
def test_they_reach_an_offline_run_of_the_real_weights_and_biases(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("CONFIG", "CACHE", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / name))
    report(tmp_path, "wandb")
    assert not warnings_of(caplog)
    (folder,) = (tmp_path / "wandb").glob("offline-run-*-abc123")
    (file,) = folder.glob("*.wandb")
    content = file.read_bytes()
    for known in (b"train/loss", b"crops", b"optim", b"a run", b"health/alarm"):
        assert known in content, known
    assert list(folder.rglob("crops_*.png"))


@needs("mlflow")
def test_they_reach_one_run_of_mlflow_also_after_a_resume(tmp_path, monkeypatch, caplog):
    from mlflow import MlflowClient

    uri = f"file:{tmp_path}/store"
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # else MLflow wants a database
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    for step in (1, 2):
        report(tmp_path, "mlflow", step)
    client = MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("webssl").experiment_id])
    assert run.data.params == {"optim.lr": "0.001", "seed": "7"} and run.info.run_name == "a run"
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert sorted((point.step, point.value) for point in history) == [(1, 0.5), (2, 1.0)]
    assert {item.path for item in client.list_artifacts(run.info.run_id)} == {"health", "images"}
    assert run.info.status == "FINISHED" and not warnings_of(caplog)


class Fake:
    """Notes its calls. One of a figure below 0 fails; all wait for ``gate``."""

    def __init__(self):
        self.steps, self.gate, self.closed = [], threading.Event(), False
        self.gate.set()

    def scalars(self, step, values):
        assert self.gate.wait(60)
        if values["x"] < 0:
            raise ConnectionError("the server is\ngone")
        self.steps.append(step)

    def close(self):
        self.closed = True


def warnings_of(caplog):
    return [record.message for record in caplog.records if record.levelno == logging.WARNING]


def test_a_tracker_that_fails_loses_that_report_says_so_once_and_is_counted(caplog):
    fake = Fake()
    tracker = Detached("fake", fake)
    for step, x in enumerate([1.0, -1.0, 1.0, -1.0, 1.0]):
        tracker.scalars(step, {"x": x})
    tracker.close()
    assert fake.steps == [0, 2, 4] and fake.closed
    assert warnings_of(caplog) == [
        "fake: reports are lost (ConnectionError: the server is gone); training goes on",
        "fake: 2 of 5 reports did not arrive; metrics.jsonl and pictures/ have them all",
    ]


def test_a_tracker_that_never_answers_holds_neither_the_run_nor_its_end(caplog):
    fake = Fake()
    fake.gate.clear()
    tracker = Detached("fake", fake, most=2, patience=0.01)
    for step in range(10):  # one is being sent, two wait
        tracker.scalars(step, {"x": 1.0})
    tracker.close()
    said = warnings_of(caplog)
    assert len(said) == 2 and "2 reports wait for it" in said[0]
    assert said[1].startswith("fake: 10 of 10 reports did not arrive")
    fake.gate.set()


def test_one_that_cannot_start_ends_the_run_before_it_begins_with_a_cure(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"wandb is not installed .*pip install .*\[wandb\]"):
        open_all("wandb", facts_of(tmp_path))
    (tmp_path / "tensorboard").write_text("a file")
    with pytest.raises(UserError, match="tensorboard cannot start .* be written"):
        open_all("tensorboard", facts_of(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    if importlib.util.find_spec("mlflow"):
        with pytest.raises(UserError, match="set MLFLOW_TRACKING_URI"):
            open_all("mlflow", facts_of(tmp_path))
