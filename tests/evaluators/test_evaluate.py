"""The command: a run and foreign weights in one table, by rows of a file or of the run's config."""

import pathlib
import shutil
import sys

import numpy as np
import pytest

from tests.evaluators import toy
from tests.evaluators.small_models import BATCH, broken, labelled_shard, save_run, small_mae
from webssl_jax import cli, cpu_memory, evaluate
from webssl_jax.config import UserError
from webssl_jax.evaluators import outcome


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run, two folders of weights, labelled shards, and a file of rows for them."""
    folder = tmp_path_factory.mktemp("evaluate")
    save_run(folder / "mine", steps=(3, 7))
    small_mae(1).save(folder / "of_transformers", "hf-vit")
    small_mae(1, seed=1).save(folder / "of_timm", "timm")
    shutil.copy(folder / "of_transformers" / "model.safetensors", folder / "bare.safetensors")
    pattern = labelled_shard(folder, "own", 24)
    (folder / "rows.py").write_text(
        "def get_config(arg=None):\n"
        "    from ml_collections import ConfigDict\n"
        f"    return ConfigDict({{'grey': {{'kind': 'my_module:Toy', 'test': {pattern!r}}}}})\n"
    )
    (folder / "my_module.py").write_text(pathlib.Path(toy.__file__).read_text())
    return folder


@pytest.fixture
def command(folder, monkeypatch):
    """command(*flags) on those rows."""
    monkeypatch.setattr(cli, "log_to_stderr", lambda *_: None)
    monkeypatch.setattr(cpu_memory, "keep", lambda: None)  # the process is pytest's
    monkeypatch.syspath_prepend(folder)
    monkeypatch.chdir(folder)
    yield lambda *flags: evaluate.main(["--evals", "rows.py", "--batch", str(BATCH), *flags])
    sys.modules.pop("my_module", None)


def test_a_run_and_two_foreign_folders_stand_in_one_table_paired_item_by_item(
    folder, command, capsys
):
    flags = ["--model", "of_transformers", "--model", "of_timm", "--model", "mine"]
    assert command(*flags, "--output", "results") == 0
    text = " ".join(capsys.readouterr().out.split())
    for name in ("of_transformers", "of_timm", "mine, step 7"):
        assert f"{name} " in text
    for verdict in ("of_timm clearly", "mine, step 7 clearly"):
        assert f"grey length: {verdict}" in text
    assert "paired item by item" in text and "not paired" not in text
    found = [
        outcome.read_rows(folder / place)["grey"]
        for place in ("results/of_transformers/eval", "results/of_timm/eval", "mine/eval")
    ]
    assert len({one.data for one in found}) == 1
    assert len({one.metrics["length"] for one in found}) == 3
    assert outcome.steps(folder / "mine/eval/grey") == [7]

    (ran,) = [sys.modules["my_module"].Toy.ran]
    assert len(ran) == 3
    assert command(*flags, "--output", "results") == 0 and len(ran) == 3  # all was there
    assert " ".join(capsys.readouterr().out.split()) == text

    command("--model", "of_timm", "--eval-size", "48", "--output", "larger")
    assert "Preprocess(size=48" in next((folder / "larger").rglob("*.json")).read_text()
    command("--model", "mine", "--step", "3", "--evals.grey.scale=2.0")
    doubled = outcome.read_rows(folder / "mine/eval", 3)["grey"]
    np.testing.assert_allclose(doubled.items["length"], 2 * found[2].items["length"], rtol=1e-6)


def test_what_a_weight_file_does_not_say_is_said_by_flags(folder, command):
    flags = ["--model", "bare.safetensors", "--model", "of_transformers", "--output", "said"]
    with pytest.raises(UserError, match="bare.safetensors: does not say .* .--heads N"):
        command(*flags)
    assert command(*flags, f"--heads={small_mae(1).encoder.heads}") == 0
    lengths = [
        outcome.read_rows(folder / f"said/{name}/eval")["grey"].items["length"]
        for name in ("bare.safetensors", "of_transformers")
    ]
    np.testing.assert_array_equal(*lengths)
    with pytest.raises(UserError, match="--heads: mine is a run, which knows that itself"):
        command("--model", "mine", "--heads=2")


def test_a_row_that_fails_is_named_in_the_table_and_ends_the_command(command, capsys, monkeypatch):
    monkeypatch.setattr(evaluate.models, "load", lambda *a, **k: broken(small_mae(1)))
    with pytest.raises(UserError, match="^small, grey: .*NaN or infinity in the features"):
        command("--model", "of_timm", "--output", "failing")
    assert "\nFAILED: small, grey: " in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--model", "nowhere"], "nowhere: no such file"),
        (["--model", "mine", "--model", "nowhere"], "nowhere: no such file"),
        (["--model", "of_timm", "--step", "3"], "--step 3: of_timm is no run"),
        (["--model", "of_timm", "--watch"], "--watch: follows one run"),
        (["--model", "mine", "--model", "mine"], "--model: the same path twice"),
        (["--model", "mine", "--model", "elsewhere/mine"], "--model: two are called mine;"),
        (["--model", "mine", "--step", "5"], "has no checkpoint of step 5; there are 3, 7"),
        (["--model", "mine", "--evals.grey=none"], "nothing to evaluate: give --evals"),
        (["--model", "mine", "--evals.gray=none"], "no such row; did you mean 'grey'"),
        (["--model", "mine", "--evals.grey.kind=kn"], "did you mean 'knn'"),
        (["--model", "mine", "--evals.grey.scal=3"], "did you mean 'scale'"),
        (["--model", "mine", "--evals.grey.scale=-1.0"], "scale = -1.0 must be positive"),
        (
            ["--model", "mine", "--evals.words.kind=retrieval", "--evals.words.pairs=own-*"],
            "evals.words: mine, step 7 has no text tower",
        ),
        (["--model", "mine", "--output", "there"], "--output there: results of a run lie in mine/"),
        (["--model", "mine", "--batch", "0"], "--batch 0: must be at least 1"),
        (["--model", "mine", "--eval-size", "32"], "--eval-size 32: mine is a run, whose figures"),
        (["--model", "of_timm", "--eval-size", "0"], "--eval-size 0: must be at least 1"),
        (
            ["--model", "of_timm", "--eval-size", "36"],
            "--eval-size 36: of_timm cannot take them: .*patches",
        ),
    ],
)
def test_what_cannot_be_evaluated_is_one_line(command, flags, says):
    with pytest.raises(UserError, match=says) as caught:
        command(*flags)
    assert "\n" not in str(caught.value)
