"""tools/compare.py: several seeds of one recipe, put together."""

import importlib.util
import json
import pathlib

import numpy as np
import pytest

from webssl_jax import config as configs
from webssl_jax.config import UserError
from webssl_jax.evaluators import outcome
from webssl_jax.evaluators.outcome import Outcome, paired_difference, scored
from webssl_jax.evaluators.seeds import read_seeds, summary, table
from webssl_jax.evaluators.tables import Column

ROOT = pathlib.Path(__file__).parent.parent.parent
_spec = importlib.util.spec_from_file_location("compare_tool", ROOT / "tools" / "compare.py")
compare = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(compare)
IMAGES = 400
KNN = Column("knn", "top1")


def hits(step, accuracy, seed):
    return np.random.default_rng([seed, step or 0]).random(IMAGES) < accuracy


def measured(step, accuracy, seed, data="same"):
    metrics, items = scored("top1", hits(step, accuracy, seed))
    trivial = {}
    for name, right in (("majority class", 0.2), ("colour histogram", 0.4)):
        trivial[name] = Outcome(("top1",), *scored("top1", hits(0, right, 99)), data)
    return Outcome(("top1",), metrics, items, data, baselines=trivial)


def retrieved(step):
    """Of 100 images ranked 0, 1, 2, ... at step 0 and 0 ... 0, 1 ... 1, ... by 21 at step 20; the
    same of 200 texts."""
    metrics, items = {}, {}
    for way, n in (("image_to_text", 100), ("text_to_image", 200)):
        found = scored(f"{way}_r10", np.arange(n) // (1 + step) < 10)
        metrics, items = metrics | found[0], items | found[1]
    return Outcome(tuple(items), metrics, items, "same", chance={"text_to_image_r10": 0.1})


@pytest.fixture
def run(tmp_path):
    """run(seed, **config) -> the folder of a run whose accuracy rises from 0.3 to 0.6."""

    def make(seed, data="same", steps=(0, 10, 20), texts=(), names=("knn", "probe"), **changes):
        folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        (folder / "eval").mkdir(parents=True)
        overrides = [f"seed={seed}", *(f"{key}={value}" for key, value in changes.items())]
        config = configs.load(str(ROOT / "configs/quickstart.py"), overrides)
        (folder / "config.json").write_text(json.dumps(configs.resolved(config)))
        for step in steps:
            rows = {name: measured(step, 0.3 + 0.015 * step, seed, data) for name in names}
            if step in texts:
                rows["retrieval"] = retrieved(step)
            for name, one in rows.items():
                one.write(outcome.step_path(folder / "eval" / name, step))
        return str(folder)

    return make


def test_figures_are_means_over_seeds_and_one_seed_is_compared_as_the_report_does(run):
    group = read_seeds("mine", [run(0), run(1), run(2)])
    top1 = group.values(20, KNN)
    assert list(top1) == [hits(20, 0.6, seed).mean() for seed in range(3)]
    text = table(group)
    assert f"{top1.mean():.3f} ± {top1.std(ddof=1):.3f}" in text
    assert "step 10" in text and "mean of 3 seeds" in text
    assert "above colour histogram" in text and "above majority" not in text
    above = group.above(KNN, 0)
    assert above.value == pytest.approx(top1.mean() - group.values(0, KNN).mean())

    alone = read_seeds("mine", [run(5)])
    theirs = paired_difference(hits(20, 0.6, 5), hits(0, 0.4, 99))
    ours = alone.above(KNN, "colour histogram")
    assert (ours.value, ours.se) == (pytest.approx(theirs.value), pytest.approx(theirs.se))


def test_runs_with_other_rows_stand_in_one_table(run):
    """See :func:`retrieved`."""
    clip = read_seeds("CLIP", [run(0, texts=(0, 20)), run(1, texts=(0, 20))])
    lines = table(clip).splitlines()
    cells = {line[:23].strip(): line[23:].split() for line in lines}
    assert lines[0].split("  ")[-2:] == [
        "retrieval image to text r10",
        "retrieval text to image r10",
    ]
    assert cells["chance"] == ["-", "-", "-", "0.100"]
    assert cells["step 0"][-6:] == ["0.100", "±", "0.000", "0.050", "±", "0.000"]
    assert cells["step 10"][-2:] == ["-", "-"] and cells["colour histogram"][-2:] == ["-", "-"]
    assert cells["above step 0"][4] == "+0.900" and cells["above step 10"][-2:] == ["-", "-"]

    mae = read_seeds("MAE", [run(0, steps=(10, 20))])
    lines = summary([clip, mae]).splitlines()
    titles = [
        "knn top1",
        "probe top1",
        "retrieval image to text r10",
        "retrieval text to image r10",
    ]
    assert lines[0].split() == ["images", "seen", *" ".join(titles).split()]
    assert [line.split("  ")[0] for line in lines[2:5]] == ["CLIP, untrained", "CLIP", "MAE"]
    ends = [line.split()[-3:] for line in lines[2:5]]
    assert ends[:2] == [["0.050", "±", "0.000"], ["1.000", "±", "0.000"]]
    assert lines[4].split()[-2:] == ["-", "-"]
    images = 20 * configs.load(str(ROOT / "configs/quickstart.py")).global_batch
    assert "NOT COMPARABLE" not in "".join(lines)
    assert lines[3].split()[1] == lines[4].split()[1] == f"{images:,}"


def test_a_table_of_figures_of_other_items_says_so(run):
    groups = [read_seeds("a", [run(0)]), read_seeds("b", [run(0)])]
    assert "NOT COMPARABLE" not in summary(groups)
    groups[1] = read_seeds("b", [run(0, data="other")])
    assert "NOT COMPARABLE: knn of the groups is of different items" in summary(groups)


def test_only_steps_that_all_seeds_have_are_compared(run):
    group = read_seeds("mine", [run(0), run(1, steps=(0, 20))])
    assert list(group.measured) == [0, 20]


def test_where_checkpoints_lie_and_when_lines_are_written_is_no_difference(run):
    elsewhere = {"checkpoint.folder": "gs://b/two", "log.every_steps": 7, "host.stuck_minutes": 9}
    assert read_seeds("mine", [run(0), run(1, **elsewhere)]).last == 20


def test_what_is_not_comparable_is_refused_by_name(run):
    first = run(0)
    with pytest.raises(UserError, match="another seed: config.total_images: "):
        read_seeds("mine", [first, run(1, total_images=1000)])
    with pytest.raises(UserError, match="different items"):
        read_seeds("mine", [first, run(1, data="other")])
    with pytest.raises(UserError, match="no step was evaluated in all"):
        read_seeds("mine", [first, run(1, steps=(5,))])
    with pytest.raises(UserError, match="has no evaluation"):
        read_seeds("mine", [run(3, steps=())])
    with pytest.raises(UserError, match="00000020.json: cannot be read"):
        damaged = run(3)
        pathlib.Path(damaged, "eval/knn/00000020.json").write_text("{")
        read_seeds("mine", [damaged])
    with pytest.raises(UserError, match="write NAME=RUN"):
        compare.main([first])


def test_the_tool_prints_a_table_for_each_group_and_draws_them_together(run, tmp_path, capsys):
    picture = tmp_path / "compare.png"
    compare.main([f"a={run(0)},{run(1)}", f"b={run(0)}", "--output", str(picture)])
    printed = capsys.readouterr().out
    assert printed.count("above colour histogram") == 2
    assert "\na, untrained  0 " in printed and "\nb " in printed
    assert picture.stat().st_size > 10_000
