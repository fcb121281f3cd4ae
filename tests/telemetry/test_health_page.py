"""The page of a run: with and without a reference, from the first row on, and by its tool."""

import importlib.util
import json

import numpy as np
import pytest

from tests.e2e.runner import ROOT
from webssl_jax import config as configs
from webssl_jax import methods
from webssl_jax.config import UserError
from webssl_jax.telemetry import health_page
from webssl_jax.telemetry.alarms import AlarmMonitor

_spec = importlib.util.spec_from_file_location("health_tool", ROOT / "tools" / "health.py")
health = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(health)
STEPS = 200
GREY, RED, GREEN = (185, 185, 194), (208, 28, 28), (44, 138, 87)
CONFIG = configs.load(
    "configs/web_dino.py:size=tiny", [f"total_steps={STEPS}", "optim.warmup_steps=20"]
)
VITALS = methods.create(CONFIG).vitals(CONFIG.global_batch)


def rows_of(steps=STEPS, sick_from=10**9):
    out = []
    for step in range(1, steps + 1):
        row = {sign.metric: sign.value(0.5 + 0.2 * np.sin(step / 30)) for sign in VITALS.signs}
        if step >= sick_from:
            row |= {"train/teacher_entropy": 0.0, "train/prototypes_used": 1}
        row |= {"optim/grad_norm": 1.0, "optim/grad_norm_encoder": 1.0 + 50 / step}
        row |= {"optim/update_norm_encoder": 1e-3, "optim/learning_rate": 1e-3, "train/loss": 1.0}
        out.append({"step": step} | row)
    return out


def draw(rows, reference=None):
    alarms = AlarmMonitor(VITALS, 20)
    alarms.update_all(rows)
    return health_page.page(rows, alarms, STEPS, "a run", reference)


def near(picture, colour):
    return int((np.abs(picture.astype(int) - np.array(colour)).max(-1) < 12).sum())


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """What a finished run leaves, as far as health is concerned; its method collapses at half."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "config.json").write_text(json.dumps(configs.resolved(CONFIG)))
    (folder / "environment.json").write_text(json.dumps({"git_revision": "abc"}))
    rows = rows_of(sick_from=STEPS // 2)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    path = tmp_path_factory.mktemp("reference") / "new" / "dino.json"
    health_page.write_reference(path, "the twin", rows_of(), VITALS, STEPS, {"git_revision": "abc"})
    return path


@pytest.mark.parametrize("rows", [[], rows_of(1), [{"step": 0, "eval/knn/top1": 0.2}]])
def test_a_run_that_has_hardly_begun_makes_a_page(rows):
    picture = draw(rows)
    assert picture.dtype == np.uint8 and picture.shape[1:] == (1500, 3)


def test_the_page_shows_the_reference_behind_and_the_alarm_over_the_curves(reference):
    well, sick = rows_of(), rows_of(sick_from=STEPS // 2)
    plain, beside = draw(well), draw(well, health_page.read_reference(reference))
    assert near(beside, GREY) > near(plain, GREY) + 3000
    # "No alarm." in green
    assert near(plain[:80], GREEN) > 20 > near(plain[:80], RED) and near(draw(sick)[:80], RED) > 20
    assert near(draw(sick), RED) > 1000


def test_a_reference_keeps_curves_as_shares_and_is_small(reference):
    stored = health_page.read_reference(reference)
    assert stored.name == "the twin" and set(stored.curves) == {s.metric for s in VITALS.signs}
    percent, shares = stored.curves["train/effective_rank"]
    assert (percent[0], percent[-1], len(percent)) == (0.5, 100.0, 50)
    np.testing.assert_allclose(shares, 0.5 + 0.2 * np.sin(percent * 2 / 30), atol=0.02)
    assert reference.stat().st_size < 10_000


def test_a_run_that_is_not_finished_is_no_reference(tmp_path):
    with pytest.raises(UserError, match="step 150 of 200; let it finish"):
        health_page.write_reference(tmp_path / "r.json", "x", rows_of(150), VITALS, STEPS, {})


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"name": "x", "percent": [1], "curves": 3}'])
def test_another_file_is_no_reference(tmp_path, text):
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(UserError, match="is not a reference that tools/health.py"):
        health_page.read_reference(path)
    with pytest.raises(UserError, match="missing.json"):
        health_page.read_reference(tmp_path / "missing.json")


def test_committed_references_can_be_read():
    for path in (ROOT / "webssl_jax" / "telemetry" / "reference").glob("*.json"):
        assert health_page.stored_reference(path.stem).curves
    assert health_page.stored_reference("no such method") is None


def test_the_tool_prints_the_alarm_and_makes_page_and_reference(workdir, tmp_path, capsys):
    out = tmp_path / "deep" / "page.png"
    arguments = ["--workdir", str(workdir), "--output", str(out)]
    saved = tmp_path / "dino.json"
    assert health.main([*arguments, "--save-reference", str(saved)]) == 0
    printed = capsys.readouterr().out
    assert "1 alarm(s)" in printed and "step 104: ALARM, the same few prototypes" in printed
    assert "It lasts." in printed and out.stat().st_size > 10_000
    assert health.main([*arguments, "--reference", str(saved)]) == 0
    assert "beside web_dino_tiny" in capsys.readouterr().out


def test_the_tool_names_what_is_wrong(workdir, tmp_path):
    with pytest.raises(UserError, match="give --output PNG or --save-reference"):
        health.main(["--workdir", str(workdir)])
    with pytest.raises(UserError, match="is not a run"):
        health.main(["--workdir", str(tmp_path), "--output", "x.png"])
    (tmp_path / "config.json").write_text((workdir / "config.json").read_text())
    with pytest.raises(UserError, match="has logged no step yet"):
        health.main(["--workdir", str(tmp_path), "--output", "x.png"])
