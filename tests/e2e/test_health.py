"""A run that collapses says so, once, wherever one may look."""

import json

import numpy as np
import pytest
from PIL import Image

from tests.e2e import runner
from webssl_jax.telemetry.alarms import PATIENCE

# A weight decay that halves every matrix at each step: soon the decoder says grey.
DECAYING = {"optim.weight_decay": 500.0, "optim.warmup_steps": 0, "total_steps": 24}
SAID = "ALARM, the prediction is grey"


def _alarms(workdir):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["health/alarms"] for row in rows if "health/alarms" in row}


def test_a_collapse_is_in_the_log_the_progress_line_the_figures_and_the_pictures(tmp_path):
    settings = DECAYING | {"log.trackers": "tensorboard"}
    result = runner.train(tmp_path, settings)
    assert result.code == 0, result.output
    assert result.output.count(SAID) == 1 and "config.optim.lr" in result.output
    (start,) = (step for step in range(2, 25) if result.output.count(f"step {step}: ALARM"))
    assert f"ALARM since step {start}: the prediction is grey" in result.output
    counts = _alarms(tmp_path)
    assert PATIENCE <= start and list(counts.values()) == [0.0] * (start - 1) + [1.0] * (25 - start)
    assert any(SAID.encode() in path.read_bytes() for path in (tmp_path / "tensorboard").iterdir())
    with Image.open(tmp_path / "pictures" / "health.png") as picture:
        red = np.abs(np.asarray(picture).astype(int) - (208, 28, 28)).max(-1) < 12
    assert red.sum() > 100


@pytest.mark.slow
def test_a_run_that_was_killed_and_continued_says_it_once(tmp_path):
    process = runner.start(tmp_path, DECAYING)
    before = runner.kill_at(process, tmp_path / "metrics.jsonl", 20)
    assert before.count(SAID) == 1
    result = runner.train(tmp_path, DECAYING)
    assert result.code == 0 and "resuming at step" in result.output
    assert SAID not in result.output and "ALARM since step" in result.output
    assert set(list(_alarms(tmp_path).values())[-5:]) == {1.0}
