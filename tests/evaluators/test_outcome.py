"""Outcomes: what is written is read again, damage is one line, and differences follow their
formulas."""

import math

import numpy as np
import pytest

from webssl_jax.config import UserError
from webssl_jax.evaluators import outcome
from webssl_jax.evaluators.outcome import Difference, Outcome, difference, paired_difference, scored


def an_outcome(hits, data="d", **changes):
    """Of one figure, ``top1``."""
    metrics, items = scored("top1", hits)
    return Outcome(("top1",), metrics, items, data, **changes)


def same(a, b):
    """Whether all but the pictures is equal."""
    plain = all(
        getattr(a, name) == getattr(b, name)
        for name in ("headline", "metrics", "data", "meaning", "chosen", "chance")
    )
    items = a.items.keys() == b.items.keys() and all(
        x.dtype == b.items[name].dtype and (x == b.items[name]).all() for name, x in a.items.items()
    )
    rest = a.baselines.keys() == b.baselines.keys()
    return plain and items and rest and all(same(x, b.baselines[n]) for n, x in a.baselines.items())


def test_an_outcome_is_read_as_it_was_written_with_its_baselines_and_items(tmp_path):
    rng = np.random.default_rng(0)
    made = an_outcome(
        rng.random(50) < 0.7,
        meaning="what it is.",
        chosen={"top1": "cls, k = 20"},
        chance={"top1": 0.25},
        baselines={
            "majority class": an_outcome(rng.random(50) < 0.3, chosen={"top1": "always 'bee'"}),
            "raw pixels": an_outcome(rng.random(50) < 0.4),
        },
        pictures={"confusion": np.full((6, 5, 3), 9, np.uint8)},
    )
    path = outcome.step_path(tmp_path / "eval" / "knn", 30)
    made.write(path, {"weights": "abc", "row": {"kind": "knn"}})
    assert same(outcome.read(path), made)
    assert outcome.read_known(path) == {"weights": "abc", "row": {"kind": "knn"}}
    assert sorted(x.name for x in path.parent.iterdir()) == [
        "00000030.confusion.png", "00000030.json", "00000030.npz"
    ]  # fmt: skip
    assert not same(made, an_outcome(rng.random(50) < 0.7))


def test_figures_are_logged_by_row_and_name():
    made = an_outcome(np.array([True, False, True, True]))
    assert made.named("knn") == {"eval/knn/top1": 0.75, "eval/knn/top1_se": made.se("top1")}
    assert made.se("top5") is None


@pytest.mark.parametrize("text", ["{", "[]", '{"headline": ["top1"], "known": {}}', '"text"'])
def test_a_damaged_outcome_is_one_line_that_names_the_file(tmp_path, text):
    path = outcome.step_path(tmp_path, 3)
    an_outcome(np.ones(3)).write(path)
    path.write_text(text)
    with pytest.raises(UserError, match="00000003.json: cannot be read .*; remove it") as caught:
        outcome.read(path)
    assert "\n" not in str(caught.value)


def test_lost_and_damaged_items_are_one_line(tmp_path):
    path = outcome.step_path(tmp_path, 3)
    an_outcome(np.ones(3)).write(path)
    path.with_suffix(".npz").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(UserError, match="00000003.json: cannot be read"):
        outcome.read(path)
    path.with_suffix(".npz").unlink()
    with pytest.raises(UserError, match="00000003.json: cannot be read"):
        outcome.read(path)


def test_what_is_known_of_an_outcome_is_nothing_where_none_is_and_one_line_where_it_is_damaged(
    tmp_path,
):
    path = outcome.step_path(tmp_path, 0)
    assert outcome.read_known(path) is None
    for text in ("{", "[]", "{}"):
        path.write_text(text)
        with pytest.raises(UserError, match="00000000.json: cannot be read .*; remove it"):
            outcome.read_known(path)


def test_a_kill_before_the_end_leaves_no_outcome(tmp_path, monkeypatch):
    path = outcome.step_path(tmp_path / "knn", 0)

    def killed(path, content):
        if path.suffix == ".json":
            raise KeyboardInterrupt
        path.write_bytes(content)

    monkeypatch.setattr(outcome, "write_bytes", killed)
    with pytest.raises(KeyboardInterrupt):
        an_outcome(np.ones(3)).write(path)
    assert outcome.read_known(path) is None and outcome.read_rows(tmp_path) == {}


def test_rows_are_read_at_a_step_or_their_newest(tmp_path):
    for row, step, hits in (("knn", 0, 1), ("knn", 20, 2), ("probe", 0, 3)):
        an_outcome(np.arange(4) < hits).write(outcome.step_path(tmp_path / row, step))
    (tmp_path / ".cache").mkdir()
    assert outcome.steps(tmp_path / "knn") == [0, 20]
    top1 = lambda found: {row: one.metrics["top1"] for row, one in found.items()}  # noqa: E731
    assert top1(outcome.read_rows(tmp_path)) == {"knn": 0.5, "probe": 0.75}
    assert top1(outcome.read_rows(tmp_path, 20)) == {"knn": 0.5}
    assert top1(outcome.read_rows(tmp_path, 0)) == {"knn": 0.25, "probe": 0.75}
    assert outcome.read_rows(tmp_path / "nowhere") == {}


def test_standard_errors_follow_their_formulas():
    hits = np.arange(700) < 210
    metrics, items = scored("top1", hits)
    assert metrics["top1"] == pytest.approx(0.3)
    assert metrics["top1_se"] == pytest.approx(math.sqrt(0.3 * 0.7 / 700))
    assert items["top1"].dtype == np.float32 and items["top1"].mean() == pytest.approx(0.3)
    rng = np.random.default_rng(0)
    distances = rng.random(300)
    assert scored("error", distances)[0]["error_se"] == pytest.approx(
        distances.std() / math.sqrt(300), rel=1e-5
    )
    a, b = rng.random(500) < 0.6, rng.random(500) < 0.5
    found = paired_difference(a, b)
    per_item = a.astype(float) - b
    assert found.value == pytest.approx(per_item.mean())
    assert found.se == pytest.approx(per_item.std() / math.sqrt(500))
    assert paired_difference(a, a) == (0.0, 0.0, True) and not paired_difference(a, a).clear


def test_pairing_is_sharper_than_independence_and_refuses_other_items():
    hard = np.random.default_rng(0).random(400)
    a, b = hard < 0.5, hard < 0.46
    errors = [scored("x", hits)[0]["x_se"] for hits in (a, b)]
    assert paired_difference(a, b).se < math.hypot(*errors) / 2
    with pytest.raises(ValueError, match="not the same items"):
        paired_difference(a, b[:-1])


def test_outcomes_are_paired_on_the_same_items_and_independent_on_others():
    a, b = np.arange(400) < 240, np.arange(400) < 236
    paired = difference(an_outcome(a), an_outcome(b), "top1")
    assert paired == paired_difference(a, b) and paired.paired
    apart = difference(an_outcome(a), an_outcome(b, data="other"), "top1")
    errors = [an_outcome(hits).se("top1") for hits in (a, b)]
    assert apart == Difference(pytest.approx(0.01), pytest.approx(math.hypot(*errors)), False)
    assert difference(an_outcome(a), an_outcome(b), "top5") is None
    bare = Outcome(("top1",), {"top1": 0.5}, {}, "other")
    assert difference(an_outcome(a), bare, "top1") is None  # nobody knows its error
