"""tools/compare.py: several seeds of one recipe, put together."""

import importlib.util
import json
import pathlib

import numpy as np
import pytest

from webssl_jax import config as configs
from webssl_jax.config import UserError
from webssl_jax.evaluators.base import Score, paired_difference
from webssl_jax.evaluators.frozen import Measurement
from webssl_jax.evaluators.seeds import read_seeds, table

ROOT = pathlib.Path(__file__).parent.parent.parent
_spec = importlib.util.spec_from_file_location("compare_tool", ROOT / "tools" / "compare.py")
compare = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(compare)
IMAGES = 400


def _measurement(step, accuracy, seed, data="same"):
    hits = np.random.default_rng([seed, step or 0]).random(IMAGES) < accuracy
    score = Score(hits, "cls", {})
    return Measurement(step, data, 100, 4, score, score)


@pytest.fixture
def run(tmp_path):
    """run(seed, **config) -> the folder of a run whose accuracy rises from 0.3 to 0.6."""

    def make(seed, data="same", steps=(0, 10, 20), **changes):
        folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        (folder / "eval").mkdir(parents=True)
        overrides = [f"seed={seed}", *(f"{key}={value}" for key, value in changes.items())]
        config = configs.load(str(ROOT / "configs/quickstart.py"), overrides)
        (folder / "config.json").write_text(json.dumps(configs.resolved(config)))
        for step in steps:
            row = _measurement(step, 0.3 + 0.015 * step, seed, data)
            (folder / "eval" / f"{step:08d}.json").write_text(json.dumps(row.to_json()))
        baselines = {"colour histogram": _measurement(None, 0.4, 99, data).to_json()}
        (folder / "eval" / "baselines.json").write_text(json.dumps(baselines))
        return str(folder)

    return make


def test_figures_are_means_over_seeds_and_one_seed_is_compared_as_the_report_does(run):
    group = read_seeds("mine", [run(0), run(1), run(2)])
    top1 = group.top1(20, "knn")
    assert list(top1) == [_measurement(20, 0.6, seed).knn.top1 for seed in range(3)]
    text = table(group)
    assert f"{top1.mean():.3f} ± {top1.std(ddof=1):.3f}" in text
    assert "step 10" in text and "mean of 3 seeds" in text
    above = group.above("knn", 0)
    assert above.value == pytest.approx(top1.mean() - group.top1(0, "knn").mean())

    alone = read_seeds("mine", [run(5)])
    theirs = paired_difference(
        _measurement(20, 0.6, 5).knn.correct, _measurement(None, 0.4, 99).knn.correct
    )
    ours = alone.above("knn", "colour histogram")
    assert (ours.value, ours.se) == (pytest.approx(theirs.value), pytest.approx(theirs.se))


def test_only_steps_that_all_seeds_have_are_compared(run):
    group = read_seeds("mine", [run(0), run(1, steps=(0, 20))])
    assert list(group.measured) == [0, 20]


def test_what_is_not_comparable_is_refused_by_name(run):
    first = run(0)
    with pytest.raises(UserError, match="config.total_images differs"):
        read_seeds("mine", [first, run(1, total_images=1000)])
    with pytest.raises(UserError, match="different images"):
        read_seeds("mine", [first, run(1, data="other")])
    with pytest.raises(UserError, match="no step was evaluated in all"):
        read_seeds("mine", [first, run(1, steps=(5,))])
    with pytest.raises(UserError, match="has no evaluation"):
        read_seeds("mine", [run(3, steps=())])
    with pytest.raises(UserError, match="write NAME=RUN"):
        compare.main([first])


def test_the_tool_prints_a_table_for_each_group_and_draws_them_together(run, tmp_path, capsys):
    picture = tmp_path / "compare.png"
    compare.main([f"a={run(0)},{run(1)}", f"b={run(0)}", "--output", str(picture)])
    printed = capsys.readouterr().out
    assert printed.count("above colour histogram") == 2
    assert picture.stat().st_size > 10_000
