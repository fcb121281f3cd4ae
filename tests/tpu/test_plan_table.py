import json
import math
import pathlib
import subprocess

import pytest

from webssl_jax import params
from webssl_jax.config import UserError
from webssl_jax.language import decoder
from webssl_jax.tools import calibrate_plan, plan_table

ROOT = pathlib.Path(__file__).parent.parent.parent


# A plan in no time: the figures of --json, the fits of the second config refused.
PLAN = """
import json, sys
fits = "1b" not in " ".join(sys.argv)
figures = dict.fromkeys({keys!r}, 0.5) | {{"fits": fits, "global_batch": 3072}}
figures["limits"] = [
    {{"category": "products", "modelled_s": 3.0, "lost_s": 1.0}},
    {{"category": "norms", "modelled_s": 7.0, "lost_s": 2.0}},
]
print(json.dumps(figures))
sys.exit(0 if fits else 3)
"""


@pytest.fixture
def table(monkeypatch, tmp_path):
    monkeypatch.setattr(plan_table, "FIGURES", tmp_path / "plan_table.json")
    monkeypatch.setattr(plan_table, "PAGE", tmp_path / "plan_table.md")
    script = tmp_path / "plan.py"
    script.write_text(PLAN.format(keys=list(plan_table.KEPT)))
    monkeypatch.setattr(plan_table, "PLAN", [str(script)])

    def run(*argv):
        monkeypatch.setattr("sys.argv", ["plan_table.py", *argv])
        return plan_table.main()

    return run


def test_rows_are_added_one_by_one_and_the_others_are_said_to_be_missing(table, tmp_path):
    assert table("--row", "web_dino.py:size=7b@v5p-512", "web_dino.py:size=1b@2xv5p-256") == 0
    assert table("--next", "1") == 0
    figures = json.loads((tmp_path / "plan_table.json").read_text())
    assert list(figures) == sorted(
        [
            "web_dino.py:size=1b@2xv5p-256",
            "web_dino.py:size=1b@v5p-512",  # the first that was missing
            "web_dino.py:size=7b@v5p-512",
        ]
    )
    row = figures["web_dino.py:size=1b@2xv5p-256"]
    assert row["command"].endswith(
        "--config configs/web_dino.py:size=1b,preset=2xv5p-256 --slice v5p-256 --slices 2"
    )
    page = (tmp_path / "plan_table.md").read_text()
    assert "| web_dino 7b | 3,072 | 0.5 (0.5) |" in page and "| norms 20% |" in page
    assert "| web_dino 1b | 3,072 | does not fit: 0.5 (0.5) |" in page
    assert page.count("not compiled yet") == len(plan_table.rows()) - 3


def test_a_plan_that_fails_adds_no_row_and_is_an_exit_code(table, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(plan_table, "PLAN", ["-c", "import sys; sys.exit(2)"])
    assert table("--row", "web_dino.py:size=7b@v5p-512") == 1
    assert "exit code 2" in capfd.readouterr().err
    assert not (tmp_path / "plan_table.json").exists()


@pytest.mark.parametrize("row", ["web_dino.py:size=7b", "web_dino.py@v5p-500", "a@yxv5p-256"])
def test_a_row_of_no_such_place_is_refused_before_anything_compiles(table, row):
    with pytest.raises(UserError, match="--row|--slice"):
        table("--row", "web_dino.py:size=7b@v5p-512", row)


def test_every_row_has_a_command():
    rows = plan_table.rows()
    assert len(set(rows)) == len(rows) > len(plan_table.SLICES) * len(plan_table.CONFIGS)
    for row in rows:
        assert plan_table.command(row)[0] == "--config"


def test_the_committed_page_has_all_rows_and_says_what_the_committed_figures_say():
    docs = ROOT / "docs"
    figures = json.loads((docs / "plan_table.json").read_text())
    calibration = json.loads((docs / "plan_calibration.json").read_text())
    assert (docs / "plan_table.md").read_text() == plan_table.page(figures, calibration)
    assert set(figures) == set(plan_table.rows())


def test_the_committed_factors_follow_from_the_committed_measurements():
    figures = json.loads(plan_table.CALIBRATION.read_text())
    text = (ROOT / "docs" / "plan.md").read_text()
    assert calibrate_plan.table(figures) in text
    assert calibrate_plan.summary(figures) in text
    assert sum(r["fits"] for r in figures.values()) >= 6
    for name, r in figures.items():
        row = calibrate_plan.ROWS[name]
        assert r["mfu_measured"] == row.mfu
        if r["fits"]:
            step_s = row.mfu / r["factor"] / r["mfu_with_exposed_ici"]
            step_s = (r["compute_s"] + r["exposed_ici_s"]) / step_s + r["skipped_s"]
            assert step_s == pytest.approx(r["compute_s"] + r["exposed_ici_s"])
            assert 0 < r["skipped_s"] < 0.1 * step_s
            assert {k: r[k] for k in ("skipped_s", "factor")} == calibrate_plan.compared(row, r)
            assert r["mfu_attainable"] > row.mfu  # the docs say that none was above it


def test_flops_of_a_measured_row_are_those_that_maxtext_printed():
    """Its log of Llama 3.1 8B on a v6e-256: 417.397 TFLOP/s and 7207.336 tokens/s a device."""
    row = calibrate_plan.ROWS["llama-3.1-8b@v6e-256"]
    parameters = params.count(decoder.template(row.network))
    assert row.flops(1, parameters) / row.tokens == pytest.approx(417.397e12 / 7207.336, rel=1e-4)
    assert 417.397e12 / 918e12 == pytest.approx(row.mfu, abs=2e-4)


def test_a_factor_is_a_mean_with_the_interval_of_one_more_program():
    def row(factor, fits=True):
        return {"factor": factor, "fits": fits}

    rows = {"a@v5e-256": row(0.8), "b@v5e-256": row(1.25), "c@v5p-128": row(1.0)}
    rows["d@v5p-128"] = row(7.0, fits=False)
    low, middle, high, count = plan_table.factor(rows)
    assert (middle, count) == (pytest.approx(1.0), 3)
    # by hand: ln 1.25 = 0.22314 is the standard deviation, too; Student's t of 2 degrees 2.91999
    assert high == pytest.approx(math.exp(2.91999 * 0.22314 * math.sqrt(4 / 3)), rel=1e-4)
    assert low == pytest.approx(1 / high)
    assert plan_table.factor(rows, "v5e").count == 2
    rows |= {f"{i}@v5p-128": row(1 + i / 100) for i in range(2)} | {"e@v5e-256": row(1.0)}
    every, wide = plan_table.factor(rows), plan_table.factor(rows, "v5e")
    assert every.high / every.low < wide.high / wide.low
    places = ("v5p-512", "2xv5p-256", "v5e-256", "v6e-256")  # no row is of v6e
    assert [plan_table.factor_at(rows, x) for x in places] == [every, every, wide, wide]
    assert plan_table.Factor(0.5, 0.9, 3.0, 3).of(0.4, 0.7) == "36% (20 to 70)"


def test_the_revision_is_of_the_code_and_not_of_the_table_that_grows(monkeypatch, tmp_path):
    monkeypatch.setattr(plan_table, "ROOT", tmp_path)

    def git(*arguments):
        me = ["-c", "user.name=n", "-c", "user.email=e"]
        subprocess.run(["git", *me, *arguments], cwd=tmp_path, check=True, capture_output=True)

    (tmp_path / "docs").mkdir()
    for name in ("code.py", "docs/plan_table.json"):
        (tmp_path / name).write_text("1")
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    clean = plan_table.revision()
    assert clean and not clean.endswith("+")
    (tmp_path / "docs/plan_table.json").write_text("2")
    assert plan_table.revision() == clean
    (tmp_path / "code.py").write_text("2")
    assert plan_table.revision() == clean + "+"
