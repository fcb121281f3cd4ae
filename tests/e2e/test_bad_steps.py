"""Steps that go wrong in real runs: they are saved, and run again to the digit."""

import json

import numpy as np
import pytest

from tests.e2e import runner
from webssl_jax.data import records
from webssl_jax.data.sources import ArrayRecordSource

EXPLODING = {"optim.lr": 1e30, "total_steps": 4, "guard.save_bad_steps": 1}
# so tight that some steps of a healthy run are spikes
NERVOUS = {"guard.spike_factor": 1.02, "guard.spike_window_steps": 3, "guard.spike_max_skips": 1}


def _files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def _rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def _refused(workdir):
    counts = [0.0] + [row["train/skipped_steps"] for row in _rows(workdir)]
    return [step for step, (a, b) in enumerate(zip(counts, counts[1:]), start=1) if b > a]


def test_a_step_that_is_not_finite_is_saved_whole_and_its_replay_finds_the_same(tmp_path):
    """At a rate of 1e30 the second update makes the third loss NaN."""
    result = runner.train(tmp_path, EXPLODING)
    assert result.code == 0, result.output
    assert "step 3: not finite: the loss is nan" in result.output
    assert "step 4: not finite" in result.output and "not saved" in result.output
    (folder,) = (tmp_path / "bad_steps").iterdir()
    assert folder.name == "step-00000003"
    report = json.loads((folder / "report.json").read_text())
    assert (report["cause"], report["batch"], report["seed"]) == ("not finite", 2, 0)
    assert "train/loss" in report["not_finite"]["figures"]
    assert (folder / "views_image.png").stat().st_size > 1000
    with np.load(folder / "batch-00000.npz") as batch:
        assert batch["image"].shape == (16, 32, 32, 3) and batch["image"].dtype == np.uint8
        fed = batch["record"].tolist()
    images = json.loads((folder / "images-00000.json").read_text())
    assert [image["record"] for image in images] == fed
    source = ArrayRecordSource("corpus:train")
    assert [image["key"] for image in images] == [records.decode(source[i]).key for i in fed]

    before = _files(tmp_path)
    again = runner.train(tmp_path, EXPLODING, flags=["--replay", "3"])
    assert again.code == 0, again.output
    assert "not finite in the run, not finite now" in again.output
    assert "the same, digit for digit" in again.output
    odd = report["not_finite"]["gradients"]
    assert f"{len(odd)} of {len(report['grad_norms'])}, the first {odd[0]}" in again.output
    assert "16 of 16 not finite" in again.output and images[0]["key"] in again.output
    assert _files(tmp_path) == before

    other = runner.train(tmp_path, EXPLODING, flags=["--replay", "4"])
    assert other.code == 2 and "no such step; saved are 3" in other.output


def test_a_spike_is_run_again_to_the_digit_and_a_profile_is_taken(tmp_path):
    """The refused step's own loss and gradient come back only from the parameters, the images and
    the masks it had, though the run had started the next step when it noticed."""
    settings = NERVOUS | {"profile.start_step": 2, "profile.steps": 2}
    result = runner.train(tmp_path, settings)
    assert result.code == 0, result.output
    refused = _refused(tmp_path)
    assert 1 <= len(refused) <= 5 and refused[0] > 3
    for step in refused:
        assert f"step {step}: a spike" in result.output
        assert (tmp_path / "bad_steps" / f"step-{step:08d}" / "report.json").exists()
    assert "profiling steps 3 to 4" in result.output
    assert any(path.stat().st_size for path in (tmp_path / "profile").rglob("*.xplane.pb"))

    flags = ["--replay", str(refused[0])]
    again = runner.train(tmp_path, settings, flags=flags)
    assert "spike in the run, spike now" in again.output, again.output
    assert "the same, digit for digit" in again.output
    loss = _rows(tmp_path)[refused[0] - 1]["train/loss"]
    assert again.output.count(f"{loss:.9g}") >= 2


@pytest.mark.slow
def test_spikes_are_the_same_steps_after_a_resume_and_on_eight_devices(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert runner.train(whole, NERVOUS).code == 0
    process = runner.start(broken, NERVOUS)
    runner.kill_at(process, broken / "metrics.jsonl", _refused(whole)[0])
    result = runner.train(broken, NERVOUS, devices=8)
    assert result.code == 0 and "resuming at step" in result.output
    assert _refused(broken) == _refused(whole)
    for ours, theirs in zip(_rows(broken), _rows(whole), strict=True):
        assert ours["train/loss"] == pytest.approx(theirs["train/loss"], rel=2e-6)


@pytest.mark.slow
def test_a_finer_number_format_in_the_replay_is_said(tmp_path):
    coarse = EXPLODING | {"model.dtype": "bfloat16"}
    assert runner.train(tmp_path, coarse).code == 0
    again = runner.train(tmp_path, EXPLODING, flags=["--replay", "3"])
    assert again.code == 0, again.output
    assert "other than in the run: config.model.dtype = float32 (was bfloat16)" in again.output
