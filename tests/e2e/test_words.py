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
    "log.tensorboard": False,
    "pictures.kinds": "similarity,image_to_text,text_to_image",
    "pictures.candidates": 16,
    "data.threads": 2,
    "eval.test": "corpus:test",
    "eval.max_images": 32,
    "eval.batch": 16,
    "eval.zero_shot": "short",
    "eval.retrieval": "corpus:test",
    "eval.retrieval_images": 24,
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
    assert "step 2: zero-shot 0." in result.output and "image to text R@10 0." in result.output
    rows = [json.loads(line) for line in open(workdir / "metrics.jsonl")]
    measured = [row for row in rows if "eval/retrieval/text_to_image_r1" in row]
    assert [row["step"] for row in measured] == [0, 2] and "eval/zero_shot/top5" in measured[1]
    names = ("image_to_text", "similarity", "text_to_image")
    assert all((workdir / "pictures" / f"{name}_00000002.png").exists() for name in names)

    evaluate = ["-m", "webssl_jax.evaluate", "--workdir", workdir]
    first = workdir / "eval" / "00000000.json"
    stored = first.read_bytes()
    first.unlink()
    # of which there is no checkpoint
    result = runner.python(*evaluate, "--step", 0)
    assert result.code == 0 and first.read_bytes() == stored, result.output
    file = tmp_path / "templates.txt"
    file.write_text("a {}.\nan old {}.\n")
    result = runner.python(*evaluate, "--zero-shot", file, "--retrieval-images", 16)
    assert result.code == 0, result.output
    assert "2 templates" in result.output and "share of 16 images" in result.output
    file.write_text("a {}.\nan old one.\n")
    result = runner.python(*evaluate, "--zero-shot", file)
    assert result.code == 2 and "line 2: 'an old one.' has no {}" in result.output, result.output

    result = runner.python("tools/pictures.py", "--workdir", workdir, "--output", tmp_path / "out")
    assert result.code == 0, result.output
    drawn = {path.stem for path in (tmp_path / "out").iterdir()}
    assert {"pca", *names} <= drawn


def test_words_are_refused_of_a_method_without_texts(tmp_path):
    result = runner.train(tmp_path, {"eval.retrieval": "corpus:test"})
    assert result.code == 2 and "Traceback" not in result.output
    assert "config.eval.retrieval = corpus:test: MAE has no text tower" in result.output
