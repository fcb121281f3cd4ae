"""Zero-shot and retrieval of a CLIP: in training by cadence, and by commands from its
checkpoint."""

import json

import pytest

from tests.e2e import runner

SPEC = "configs/clip.py:size=tiny"
SETTINGS = {
    "model.size": "micro",
    "method.view.image_size": 32,
    "global_batch": 16,
    "total_steps": 2,
    "optim.warmup_steps": 1,
    "sharding.max_unsharded_fraction": 1.0,
    "log.trackers": "none",
    "pictures.kinds": "similarity,image_to_text,text_to_image",
    "pictures.candidates": 16,
    "data.threads": 2,
    "eval_batch": 16,
    "evals.words.kind": "zero_shot",
    "evals.words.test": "corpus:test",
    "evals.words.max_images": 64,
    "evals.pairs.kind": "retrieval",
    "evals.pairs.pairs": "corpus:test",
    "evals.pairs.max_images": 48,
}


def train(workdir, **changes):
    settings = SETTINGS | {key.replace("__", "."): value for key, value in changes.items()}
    flags = [f"--config.{key}={value}" for key, value in settings.items()]
    command = ["-m", "webssl_jax.train", "--config", SPEC, "--workdir", workdir]
    return runner.python(*command, *flags)


@pytest.mark.slow
def test_words_are_measured_in_training_and_from_a_checkpoint(tmp_path):
    workdir = tmp_path / "run"
    result = train(workdir)
    assert result.code == 0, result.output
    assert "step 2: words top1 0." in result.output
    assert "pairs image to text r10 0." in result.output
    rows = [json.loads(line) for line in open(workdir / "metrics.jsonl")]
    measured = [row for row in rows if "eval/pairs/text_to_image_r1" in row]
    assert [row["step"] for row in measured] == [0, 2] and "eval/words/top5" in measured[1]
    names = ("image_to_text", "similarity", "text_to_image")
    assert all((workdir / "pictures" / f"{name}_00000002.png").exists() for name in names)

    evaluate = ["-m", "webssl_jax.evaluate", "--model", workdir]
    first = workdir / "eval" / "pairs" / "00000000.json"
    stored = json.loads(first.read_text())
    first.unlink()
    # of which there is no checkpoint
    result = runner.python(*evaluate, "--step", 0)
    assert result.code == 0 and json.loads(first.read_text()) == stored, result.output
    file = tmp_path / "templates.txt"
    file.write_text("a {}.\nan old {}.\n")
    changed = [f"--evals.words.templates={file}", "--evals.pairs.max_images=40"]
    result = runner.python(*evaluate, *changed)
    assert result.code == 0, result.output
    assert "2 templates" in result.output and "retrieval: share of" in result.output
    file.write_text("a {}.\nan old one.\n")
    result = runner.python(*evaluate, *changed)
    assert result.code == 2 and "line 2: 'an old one.' has no {}" in result.output, result.output

    result = runner.python("tools/pictures.py", "--workdir", workdir, "--output", tmp_path / "out")
    assert result.code == 0, result.output
    drawn = {path.stem for path in (tmp_path / "out").iterdir()}
    assert {"pca", *names} <= drawn
