"""Studies: what is run, what is not run again, and what the figures allow to be said."""

import csv
import dataclasses
import json
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from webssl_jax.configs.studies.methods import BATCH, ENCODER, RATES
from webssl_jax.configs.studies.mini import METRICS

from tests.e2e import runner as runner_of_tests
from tests.study import fake
from webssl_jax import config_files, methods
from webssl_jax.config import ConfigError, UserError
from webssl_jax.evaluators import outcome
from webssl_jax.methods import METHODS
from webssl_jax.study import (
    archive,
    cells,
    findings,
    on_slices,
    page,
    price,
    references,
    results,
    runner,
    tables,
)
from webssl_jax.tools import study as tool
from webssl_jax.tools import tpu
from webssl_jax.visuals import save_png
from webssl_jax.weights import networks

FAKE = pathlib.Path(fake.__file__)
WIDTHS = {"small": 32, "middle": 64, "large": 96}
FINDINGS = {
    "size": {"kind": "slope", "x": "parameters", "metric": "knn/top1", "cells": "*"},
    "step": {"kind": "gain", "x": "parameters", "metric": "knn/top1", "cells": ["s*", "middle"]},
    "pair": {"kind": "difference", "a": "small", "b": "large", "metric": "knn/top1"},
    "same": {"kind": "difference", "a": "large", "b": "large", "metric": "knn/top1"},
    "colour": {
        "kind": "above",
        "cells": ["small", "middle"],
        "metric": "knn/top1",
        "baseline": "colour histogram",
    },
}

SOME_OF_PAPER = """from webssl_jax.configs.studies import paper

def get_config(arg=None):
    study = paper.get_config()
    for name in [*study.cells]:
        if name not in ("web_mae_1b", "clip_1b", "web_dino_7b"):
            del study.cells[name]
    return study
"""


def write(path, widths=WIDTHS, seeds=2, asked=FINDINGS, rate=None, **more):
    rows = {
        name: {
            "config": "web_mae:size=tiny",
            "overrides": {"model": {"width": width, "heads": 2}},
            "labels": {"method": "Web-MAE"},
            "images_per_s": rate,
        }
        for name, width in widths.items()
    }
    shared = {"total_images": 640, "evals": {"knn": {"kind": "knn", "train": "a", "test": "b"}}}
    shared |= {"optim": {"warmup_images": 64}}
    given = {"title": "A < B", "cells": rows, "overrides": shared, "seeds": seeds} | more
    path.write_text(
        "from ml_collections import ConfigDict\n\n\ndef get_config(arg=None):\n"
        f"    return ConfigDict({given | {'findings': asked}!r})\n"
    )
    return str(path)


def start(run):
    return [sys.executable, str(FAKE), *run.arguments()]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A study all of whose runs were left by :mod:`tests.study.fake`, in this process."""
    folder = tmp_path_factory.mktemp("study")
    study = cells.load(write(folder / "asked.py"))
    for run in study.runs(folder):
        config = run.cell.config.copy_and_resolve_references()
        with config.unlocked():
            config.seed = run.seed
        fake.leave(run.workdir, config, config.model.width / 128)
    return study, folder


def test_figures_and_intervals_are_those_of_the_plain_formulas(done):
    study, folder = done
    groups = results.read(study, folder)[0]
    means = [group.figures("knn/top1").mean() for group in groups]  # large, middle, small
    x = np.log10([group.cell.parameters for group in groups])
    stated = {one.name: one for one in findings.state(study, groups)}
    assert stated["size"].value == pytest.approx(np.polyfit(x, means, 1)[0], abs=1e-12)
    assert stated["pair"].value == pytest.approx(means[2] - means[0], abs=1e-12)
    # of one cell's hits, 0.25 and 0.75 of the same 400 items: McNemar's error, times 1.96
    half = (stated["pair"].high - stated["pair"].low) / 2
    assert half == pytest.approx(1.96 * np.sqrt(0.5 * 0.5 / 400), rel=0.1)
    # a trivial feature that hits nearly the same items: paired, too, besides what two seeds do
    assert stated["colour"].high - stated["colour"].low < 0.6 * 2 * half
    assert stated["same"].value == 0
    verdicts = {name: one.verdict for name, one in stated.items()}
    assert verdicts == {
        "size": findings.RISES,
        "step": findings.RISES,
        "pair": findings.FALLS,
        "same": findings.UNCLEAR,
        "colour": findings.UNCLEAR,
    }
    assert stated["pair"].text.startswith("Cell small is below cell large by 0.47")
    assert "2 seeds" in stated["size"].text and "3 cells" in stated["size"].text


@pytest.mark.parametrize("of", ["items", "seeds"])
def test_noise_alone_is_called_a_rise_no_more_often_than_the_interval_says(done, monkeypatch, of):
    study, folder = done
    study = dataclasses.replace(study, findings={"size": FINDINGS["size"]})
    monkeypatch.setattr(findings, "DRAWS", 200)
    rng = np.random.default_rng(5)
    groups = results.read(study, folder)[0]
    wrong = 0
    for _ in range(60):
        for group in groups:
            for one in group.runs:
                hits = (rng.random(fake.ITEMS) < 0.5).astype(np.float32)
                knn = one.outcomes["knn"]
                knn.items.update({"top1": hits} if of == "items" else {})
                knn.metrics["top1"] = float(hits.mean() if of == "items" else rng.normal())
                if of == "seeds":
                    knn.items.clear()
        wrong += findings.state(study, groups)[0].verdict != findings.UNCLEAR
    assert wrong <= 8  # 3 expected; 9 or more have a probability of 0.002


def test_what_the_figures_do_not_allow_is_not_said(done):
    study, folder = done
    alone = [dataclasses.replace(x, runs=x.runs[:1]) for x in results.read(study, folder)[0]]
    pair = FINDINGS["pair"]
    above = {**FINDINGS["colour"], "lower_is_better": True}
    asked = {"pair": pair, "misspelt": pair | {"metric": "knn/top"}, "lower": above}
    asked["best"] = FINDINGS["colour"] | {"baseline": "best", "cells": "large"}
    study = dataclasses.replace(study, findings=asked | {"step": FINDINGS["step"]})
    for group in alone:
        known = group.runs[0].outcomes["knn"].baselines
        known["raw pixels"] = dataclasses.replace(known["colour histogram"], metrics={"top1": 0.9})
    stated = {one.name: one for one in findings.state(study, alone)}
    assert stated["best"].text.startswith("Cell large is below the raw pixels by 0.1")
    assert "best of its trivial features: chosen on these items" in stated["best"].text
    assert "one seed, so only of the items" in stated["pair"].text
    assert "knn measures top1, top1_se" in stated["misspelt"].text
    assert stated["lower"].text.startswith("The best cell, small, is below the colour histogram")
    assert "lower is better, so better" in stated["lower"].text
    for group in alone:
        group.runs[0].outcomes["knn"].items.clear()
    same = dataclasses.replace(alone[1], cell=dataclasses.replace(alone[1].cell, name="small_too"))
    more = dataclasses.replace(study, cells=(*study.cells, same.cell))
    stated = {one.name: one for one in findings.state(more, [*alone, same])}
    assert stated["pair"].verdict == findings.UNCLEAR
    assert "no interval; one seed)" in stated["pair"].text
    assert stated["step"].verdict == findings.MISSING  # which of two cells is the last step?
    assert "one cell at each of its largest parameters" in stated["step"].text


def test_the_page_holds_every_figure_and_what_is_missing(done, tmp_path):
    study, folder = done
    drawn = outcome.step_path(folder / "cells/large/seed0/eval/knn", 10).with_suffix(".map.png")
    save_png(drawn, np.zeros((4, 4, 3), np.uint8))
    stated, _ = page.write(study, folder)
    text = (folder / "index.html").read_text()
    assert 'alt="large: knn"' in text and "2 x cpu, EPYC &lt;1&gt; (6 runs)" in text
    assert "<title>A &lt; B</title>" in text and "6 of 6 runs of 3 cells are done" in text
    for one in stated:
        assert one.text.replace("<", "&lt;") in text
    untrained = [fake.judged(fake.UNTRAINED, seed).metrics["top1"] for seed in (0, 1)]
    assert text.count(f"{np.mean(untrained):.3f} ± {np.std(untrained, ddof=1):.3f}") == 3
    assert "<svg" in text and "currentColor" in text and "http://" not in text.split("<svg")[0]
    with open(folder / "runs.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["cell"] for row in rows] == ["large"] * 2 + ["middle"] * 2 + ["small"] * 2
    known = json.loads((folder / "runs.json").read_text())
    assert [float(row["knn/top1"]) for row in rows] == [row["knn/top1"] for row in known]
    assert json.loads((folder / "findings.json").read_text())[0]["verdict"] == stated[0].verdict
    assert text.count("<svg") == 3 and (folder / "differences.png").exists()
    drawn = text.split("<h2>Differences")[1].split("<h2>")[0]
    assert (
        all(f">{name}<" in drawn for name in ("pair", "same", "colour")) and ">size<" not in drawn
    )
    alone = dataclasses.replace(study, findings={"pair": FINDINGS["pair"]})
    page.write(alone, folder)
    text = (folder / "index.html").read_text()
    assert "<h2>Differences" in text and "<h2>Figures" not in text and "Nothing is" not in text
    empty, _ = page.write(study, tmp_path)
    told = json.loads((tmp_path / "findings.json").read_text(), parse_constant=pytest.fail)
    assert told[0]["value"] is None
    assert {one.verdict for one in empty} == {findings.MISSING}
    assert "Nothing is measured yet" in (tmp_path / "index.html").read_text()


def test_a_page_is_made_again_of_its_stored_outcomes_without_the_runs(done, tmp_path):
    study, folder = done
    known = {"half": {"knn": fake.judged(0.5, 0)}}
    groups = results.read(study, folder)[0]
    stored = tmp_path / "outcomes.zip"
    archive.write(stored, groups, known)
    again, level = archive.read(study, stored)
    assert findings.state(study, again) == findings.state(study, groups)
    assert results.rows(again) == results.rows(groups)
    assert tables.cells(again, level) == tables.cells(groups, known)
    assert tables.cost(again) == tables.cost(groups)
    first, second = (each[0].runs[0] for each in (groups, again))
    np.testing.assert_array_equal(first.losses, second.losses)
    archive.write(tmp_path / "same.zip", again, level)
    assert stored.read_bytes() == (tmp_path / "same.zip").read_bytes()
    file = write(tmp_path / "asked.py")
    arguments = ["--workdir", str(tmp_path / "new"), "--outcomes"]
    assert tool.main([file, *arguments, str(stored)]) == 0
    assert "6 of 6 runs of 3 cells are done" in (tmp_path / "new" / "index.html").read_text()
    with pytest.raises(UserError, match=r"--workdir .*same\.zip: no folder can be made there"):
        tool.main([file, "--workdir", str(tmp_path / "same.zip"), "--outcomes", str(stored)])
    with pytest.raises(UserError, match="cannot be read"):
        tool.main([file, "--workdir", str(tmp_path / "none"), "--outcomes", file])
    assert not (tmp_path / "none").exists()
    other = cells.load(write(tmp_path / "other.py", {"small": 32}))
    with pytest.raises(UserError, match="has a cell large of 10 steps, which the study other has"):
        archive.read(other, stored)
    stored.write_bytes(stored.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"outcomes\.zip: cannot be read \(BadZipFile"):
        archive.read(study, stored)


def test_tables_have_means_of_categories_answers_by_question_and_what_it_cost(done):
    study, folder = done
    groups = results.read(study, folder)[0]
    for group in groups:
        for run in group.runs:
            run.outcomes["grey"] = fake.judged(0.3, run.run.seed)
    both = ["knn/top1", "grey/top1"]
    asked = {f"MAE and size, {metric}": FINDINGS["size"] | {"metric": metric} for metric in both}
    asked = {
        "pair": FINDINGS["pair"],
        "MAE and size, knn": asked.pop("MAE and size, knn/top1"),
    } | asked
    topics = {"topics": both, "reading": ["knn/top1", "words/top1"]}
    study = dataclasses.replace(study, categories=topics, findings=asked)
    known = {"half": {"knn": fake.judged(0.5, 0)}}
    heads, lines = tables.categories(study, groups, known)
    assert heads[-2:] == ["topics", "reading"]
    shares = [
        [one.outcomes[row].metrics["top1"] for row in ("knn", "grey")] for one in groups[0].runs
    ]
    each = np.mean(shares, axis=1)
    by_name = {line[0]: line[-2:] for line in lines}
    assert by_name["large"] == [f"{each.mean():.3f} ± {each.std(ddof=1):.3f}", ""]
    level = fake.judged(0.5, 0).baselines["colour histogram"].metrics["top1"]
    assert by_name["colour histogram"] == [f"{level:.3f}", ""] and "half" not in by_name
    stated = findings.state(study, groups)
    heads, lines = tables.answers(study, stated)
    assert (heads, [line[0] for line in lines]) == (["", *both], ["MAE and size", "pair"])
    slope = next(one for one in stated if one.name == "MAE and size, knn")
    assert lines[0][1] == f"▲ {slope.value:+.3f}\n{slope.low:+.3f} to {slope.high:+.3f}"
    assert lines[1][1].startswith("▼ -0.47") and lines[1][2] == ""
    # ten seconds of steps on two devices and five of evaluation, two runs of 640 images each
    by_name = {line[0]: line[1:] for line in tables.cost(groups)[1]}
    assert by_name["small"] == ["2", "1,280", "40", "32", "10s", "30s"]
    assert by_name["all"] == ["6", "3,840", "120", "32", "30s", "1:30"]


def test_cells_run_in_the_order_that_is_given_the_first_seed_of_all_first(tmp_path):
    study = cells.load(write(tmp_path / "asked.py", order=["small", "*e"]))
    names = [run.name for run in study.runs(tmp_path)]
    assert names == [f"{name}/seed{i}" for i in (0, 1) for name in ("small", "large", "middle")]


def test_a_reference_is_judged_once_and_stands_beside_the_cells(
    done, tmp_path, monkeypatch, capsys
):
    _, folder = done
    weights = tmp_path / "dinov2-s"
    weights.mkdir()
    asked = {"size": {**FINDINGS["size"], "published": "5.63 points a decade"}}
    given = {"dino": {"model": str(weights), "name": "DINOv2 <S>", "eval_size": 98}}
    study = cells.load(write(tmp_path / "asked.py", asked=asked, references=given))
    calls = []

    def judge(command, stdout, stderr, check):
        calls.append(command)
        output = pathlib.Path(command[command.index("--output") + 1])
        path = outcome.step_path(output / "dinov2-s" / "eval" / "knn", 0)
        fake.judged(0.9, 0).write(path)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(references.subprocess, "run", judge)
    out = tmp_path / "out"
    shutil.copytree(folder / "cells", out / "cells")
    for _ in range(2):
        assert references.judge(study, out, print) == {}
    assert len(calls) == 1
    nearer = dataclasses.replace(study.references[0], eval_size=70)
    other = dataclasses.replace(study, references=(nearer,))
    assert references.read(study, out) and references.read(other, out) == {}
    said = " ".join(calls[0])
    assert "--eval-size 98" in said and "--evals.knn.kind=knn --evals.knn.test=b" in said
    page.write(study, out)
    text = (out / "index.html").read_text()
    assert text.count("DINOv2 &lt;S&gt;") == 2  # the level and the line of the table
    assert "Published: 5.63 points a decade." in text and "How they learned" in text
    tool.main([str(tmp_path / "asked.py"), "--workdir", str(out), "--dry-run"])
    assert shlex.join(calls[0][3:]) in capsys.readouterr().out


def test_what_fails_is_named_what_asks_is_started_again_and_what_is_done_is_left(tmp_path):
    widths = {"bad": 32, "tired": 64, "good": 96}
    study = cells.load(write(tmp_path / "asked.py", widths, seeds=1, asked={}))
    said = []
    progress = runner.run_all(study, tmp_path / "out", 2, said.append, start)
    assert sorted(progress.done) == ["good/seed0", "tired/seed0"]
    assert progress.failed == {"bad/seed0": "exit code 2: error: config.optim.lr: is not good"}
    runner.run_all(study, tmp_path / "out", 2, said.append, start)
    starts = {name: tmp_path / "out" / "cells" / name / "seed0" / "starts" for name in widths}
    assert {name: file.read_text() for name, file in starts.items()} == {
        "bad": "xx",
        "tired": "xxx",
        "good": "x",
    }
    # the same name with another width is another experiment
    other = cells.load(write(tmp_path / "asked2.py", {"good": 128}, seeds=1, asked={}))
    progress = runner.run_all(other, tmp_path / "out", 1, said.append, start)
    words = "was made with other settings (config.model.width: 96 -> 128)"
    assert words in progress.failed["good/seed0"]
    page.write(other, tmp_path / "out")
    text = (tmp_path / "out" / "index.html").read_text()
    assert "0 of 1 runs of 1 cells are done. 1 are left out: of other settings" in text
    tired = tmp_path / "out" / "cells" / "tired" / "seed0" / "eval" / "knn"
    outcome.step_path(tired, study.cells[0].steps).write_text("{")
    (good,), left_out = results.read(study, tmp_path / "out")
    assert good.cell.name == "good" and "cannot be read" in left_out["tired/seed0"]


def test_a_killed_study_leaves_no_run_behind(tmp_path):
    file = write(tmp_path / "asked.py", {"slow": 32}, seeds=1, asked={})
    script = (
        "import pathlib, sys; from tests.study import test_study as t; from webssl_jax.study import"
        " cells, runner; runner.run_all(cells.load(sys.argv[1]), pathlib.Path(sys.argv[2]), 1,"
        " print, t.start)"
    )
    command = [sys.executable, "-c", script, file, str(tmp_path / "out")]
    study = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    marker = tmp_path / "out" / "cells" / "slow" / "seed0" / "starts"
    deadline = time.monotonic() + 120
    while not marker.exists():
        assert time.monotonic() < deadline and study.poll() is None
        time.sleep(0.05)
    (child,) = subprocess.run(
        ["pgrep", "--parent", str(study.pid)], capture_output=True, check=True
    ).stdout.split()
    study.send_signal(signal.SIGKILL)
    study.wait()
    while pathlib.Path(f"/proc/{int(child)}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_smoke_ends_with_its_page_whatever_killed_it(tmp_path):
    out = tmp_path / "out"
    arguments = ["tools/study.py", "smoke:images=384,seeds=1,max_images=200", "--workdir", out]
    study = runner_of_tests.start_program(*arguments)
    saved = out / "cells" / "narrow" / "seed0" / "checkpoints"
    deadline = time.monotonic() + 240
    while not any(saved.glob("[0-9]*")):
        assert time.monotonic() < deadline and study.poll() is None
        time.sleep(0.05)
    study.kill()
    study.communicate(timeout=60)
    done = runner_of_tests.python(*arguments)
    assert done.code == 0, done.output
    log = (out / "cells" / "narrow" / "seed0" / "train.log").read_text()
    assert "resuming at step 5 of 6" in log or "finished: step 6 of 6" in log, log
    rows = json.loads((out / "runs.json").read_text())
    assert [row["cell"] for row in rows] == ["narrow", "wide"]
    assert "2 of 2 runs of 2 cells are done" in (out / "index.html").read_text()
    assert "colour: " in done.output
    caches = [out / "cells" / name / "seed0/eval/.cache/outcomes" for name in ("narrow", "wide")]
    assert os.path.samefile(*caches) and [*caches[0].glob("*.json")]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"cells": {}}, "has no cells"),
        ({"cells": ["small"]}, r"asked\.py: cells = \['small'\]: must be a group of keys"),
        ({"cells": {"a/b": {}}}, r"cells\.a/b: a folder gets its name"),
        ({"order": "small"}, r"order = 'small': must be a list of texts"),
        ({"rate": "fast"}, r"cells\.large\.images_per_s = 'fast': must be a number above 0"),
        ({"asked": {"x": "slope"}}, r"findings\.x = 'slope': must be a group of keys"),
        ({"asked": {"x": {**FINDINGS["size"], "cells": 3}}}, r"cells = 3: must be a name, a pat"),
        ({"asked": {"x": {**FINDINGS["pair"], "a": "*"}}}, r"a = \*: is more than one cell"),
        ({"asked": {"x": {**FINDINGS["pair"], "metric": "knn"}}}, "write ROW/METRIC, as knn/top1"),
        ({"categories": {"a": "knn/top1"}}, r"categories\.a = 'knn/top1': must be a list of"),
        ({"cels": {}}, r"asked\.py: cels: did you mean 'cells'"),
        ({"seeds": 0}, r"seeds = 0: must be a whole number, at least 1"),
        ({"references": {"a": {"modl": "b"}}}, r"references\.a\.modl: did you mean 'model'"),
        ({"references": {"a": {"model": "/no"}}}, r"references\.a\.model = /no: no such file"),
        ({"overrides": {"optim": {"lrr": 1}}}, r"cells\.large: --config\.optim\.lrr: no such key"),
        ({"asked": {"x": {"kind": "slop"}}}, r"findings\.x\.kind = slop: did you mean 'slope'"),
        (
            {"asked": {"x": {**FINDINGS["pair"], "a": "smal"}}},
            r"findings\.x\.a = smal: did you mean",
        ),
        ({"asked": {"x": {**FINDINGS["pair"], "metric": "nn/top1"}}}, "did you mean 'knn'"),
        ({"order": ["smal"]}, r"order = smal: did you mean 'small'"),
        ({"categories": {"a": ["nn/top1"]}}, r"categories\.a = nn/top1: did you mean 'knn'"),
        ({"asked": {"x": {**FINDINGS["size"], "x": "size"}}}, r"findings\.x\.x = size"),
    ],
)
def test_what_a_study_cannot_mean_is_named_before_anything_runs(tmp_path, change, says):
    with pytest.raises(ConfigError, match=says):
        tool.main([write(tmp_path / "asked.py", **change), "--workdir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_every_shipped_study_loads_with_findings_that_can_be():
    names = config_files.names("--study")
    assert {"mini", "paper", "smoke", "text_rich"} <= {*names}
    for name in names:
        if name != "paper":  # below
            findings.check(cells.load(name))
    mini = cells.load("mini")
    judged = {metric.partition("/")[0] for metric in METRICS}
    assert judged < {*references.shared_rows(mini)}
    shapes = {c.name: networks.Networks.of(methods.create(c.config)).encoder for c in mini.cells}
    assert {(x.image_size, x.patch_size) for x in shapes.values()} == {(64, 8)}
    assert shapes["mae_s"] == shapes["mae_heavy_chosen"] == shapes["mae_light_random"]
    hours = [c.images * len(c.seeds) / c.images_per_s / 3600 for c in mini.cells]
    assert 4 < sum(hours) < 8  # with evaluations it stays below 10
    closer = cells.load("text_rich:zoom=2,seeds=1")
    views = {cell.name: cell.config.method.view for cell in closer.cells}
    assert views["mae_heavy_chosen"].scale_max == 0.25
    assert tuple(views["dino_heavy_random"].global_scale) == (0.1, 0.25)


def test_the_papers_runs_have_their_price_and_published_figures():
    study = cells.load("paper")
    assert len(study.cells) == 25
    by_name = {cell.name: cell for cell in study.cells}
    assert by_name["web_dino_7b"].labels["published"] == "53.87"
    assert by_name["web_dino_2b_heavy"].labels["data"] == "MC-2B, text-filtered (heavy)"
    priced = {row[0]: row for row in price.rows(study, "v5p-512", 2.0)}
    plan = price.read_table()["web_dino.py:size=7b@v5p-512"]
    assert priced["web_dino_7b"][5] == f"{plan['chip_hours']:,.0f}"  # both of 2 billion images
    whole = [float(priced[name][5].replace(",", "")) for name in by_name]
    assert float(priced["all"][5].replace(",", "")) == pytest.approx(sum(whole), abs=len(whole))
    dollars = float(priced["all"][6].replace(",", ""))
    assert dollars == pytest.approx(2 * sum(whole), abs=2 * len(whole))
    wider = cells.Cell("x", "web_dino:size=7b", ("model.width=64",), (0,), {})
    assert price.plan_of(wider, "v5p-512", price.read_table()) is None
    with pytest.raises(UserError, match="--plan-table /nowhere: cannot be read"):
        price.read_table(pathlib.Path("/nowhere"))


def test_the_study_of_methods_has_all_of_them_with_one_network_and_equal_time():
    study = cells.load("methods:minutes=1")
    configs = [cell.config for cell in study.cells]
    assert {config.method.name for config in configs} == set(METHODS) - {"vqa", "distill"}
    assert len(configs) == len(METHODS) - 1  # DINOv3 is a config of DINO
    for config in configs:
        shape = {key: config.model[key] for key in ENCODER}
        side = config.method.view.get("image_size") or config.method.view.global_size
        assert (shape, side, config.global_batch) == (ENCODER, 32, BATCH)
    for cell in study.cells:
        assert cell.images == pytest.approx(60 * RATES[cell.name], abs=BATCH / 2)


def test_runs_on_slices_share_one_budget_and_have_a_babysitter_each(tmp_path, monkeypatch, capsys):
    file, out = tmp_path / "paper.py", tmp_path / "out"
    file.write_text(SOME_OF_PAPER)
    study = cells.load(str(file))
    arguments = [
        str(file),
        "--workdir",
        str(out),
        "--dry-run",
        "--slice",
        "v5p-512",
        "--price",
        "2",
    ]
    flags = f"--zone z --project p --mount bucket={tmp_path}"
    assert tool.main([*arguments, "--max-dollars", "2000000", "--tpu", flags]) == 0
    lines = [x for x in capsys.readouterr().out.splitlines() if " tpu babysit " in x]
    commands = [shlex.split(line) for line in lines]
    dollars = [float(c[c.index("--max-dollars") + 1]) for c in commands]
    assert len(lines) == len(study.cells) and sum(dollars) == pytest.approx(2e6, abs=1)
    assert dollars[0] != dollars[-1] and all(f"{out}/cells/" in line for line in lines)
    (mae,) = (c for c in commands if "paper-web-mae-1b-0" in c)
    start = mae.index("babysit")
    assert tpu.main([*mae[start:], "--dry-run"]) == 0  # its flags and config are good
    assert "queued-resources create paper-web-mae-1b-0" in capsys.readouterr().out
    with pytest.raises(UserError, match="all runs take .* at best"):
        tool.main([*arguments, "--max-dollars", "1000"])
    twins = [dataclasses.replace(study.cells[0], name=name) for name in ("a_b", "a-b")]
    study = dataclasses.replace(study, cells=tuple(twins))
    with pytest.raises(UserError, match="cells a_b and a-b: their slices would have one name"):
        on_slices.shares(study, out, "v5p-512", 2.0, 1e6, price.TABLE)


def test_a_dry_run_prints_each_command_and_starts_none(tmp_path, capsys):
    file = write(tmp_path / "asked.py", seeds=1, rate=0.5)
    assert tool.main([file, "--workdir", str(tmp_path / "out"), "--dry-run"]) == 0
    said = capsys.readouterr().out.splitlines()
    hours = {line.split()[0]: line.split()[-1] for line in said[2:6]}
    assert (hours["small"], hours["all"]) == ("0.36", "1.07")
    lines = [line for line in said if "webssl_jax.train" in line]
    assert len(lines) == 3 and "--config.model.width=96 " in lines[0]
    assert not (tmp_path / "out").exists()
    os.mkdir(tmp_path / "out")
    assert tool.main([file, "--workdir", str(tmp_path / "out"), "--page-only"]) == 0
