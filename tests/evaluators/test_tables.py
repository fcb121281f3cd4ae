"""Tables of outcomes: what beats what, for any number of models and evaluations that nothing here
knows."""

import math

import numpy as np
import pytest

from tests.evaluators.test_outcome import an_outcome
from webssl_jax.evaluators import tables
from webssl_jax.evaluators.outcome import Outcome, scored


def hits(right, n=400):
    return np.arange(n) < right


def trivial(of):
    """Outcomes of features that need no training."""
    return {
        "majority class": of(hits(130)),
        "raw pixels": of(hits(180)),
        "colour histogram": of(hits(238)),
    }


def probe(right, data="d", **changes):
    changes = {"meaning": "probe: share of 400 test images.", **changes}
    return an_outcome(hits(right), data, **changes)


def flat(text):
    return " ".join(text.split())


def test_the_report_says_what_beats_what():
    beside = trivial(lambda x: an_outcome(x))

    def measured(right):
        shared = {"chance": {"top1": 0.25}, "baselines": beside}
        return {
            "knn": probe(right, meaning="knn: votes.", **shared),
            "probe": probe(right, **shared),
        }

    models = {"run, step 0 (untrained)": measured(300), "run, step 817": measured(240)}
    text = tables.report(models)
    lines = text.splitlines()
    assert lines[0].split() == ["knn", "top1", "probe", "top1"]
    cells = {line[:25].strip(): line[25:].split("  ") for line in lines[2:8]}
    assert list(cells) == [
        "chance", *beside, "run, step 0 (untrained)", "run, step 817"
    ]  # fmt: skip
    assert cells["chance"][0].strip() == "0.250"
    assert cells["run, step 817"] == ["0.600 ± 0.024", "0.600 ± 0.024"]
    found = flat(text)
    assert "probe top1: run, step 817 clearly above raw pixels: +0.150 ± 0.018" in found
    assert "run, step 817 not clearly different from colour histogram: +0.005 ± 0.004" in found
    assert "knn top1: run, step 817 clearly below run, step 0 (untrained): -0.150 ± 0.018" in found
    assert "paired item by item" in found and "not paired" not in found
    panels = tables.panels(models)  # the same as bars
    assert [(panel.title, panel.chance) for panel in panels] == [
        ("knn top1", 0.25),
        ("probe top1", 0.25),
    ]
    assert [bar.name for bar in panels[0].bars] == [*beside, *models]
    assert [bar.trivial for bar in panels[0].bars] == [True] * 3 + [False] * 2
    assert panels[1].bars[-1].value == pytest.approx(0.6)
    assert panels[1].bars[-1].se == pytest.approx(math.sqrt(0.24 / 400))
    assert "majority class:" not in found  # it is beaten by all that learns anything
    assert found.count("probe: share of 400 test images.") == 1 and "knn: votes." in found
    assert max(map(len, lines)) <= 100


def test_several_models_stand_in_one_table_each_compared_with_those_before_it():
    models = {name: {"probe": probe(right)} for name, right in (("a", 200), ("b", 260), ("c", 240))}
    text = tables.report(models)
    head = text.splitlines()[:5]
    assert [line.split()[0] for line in head[2:]] == ["a", "b", "c"]
    found = flat(text)
    for verdict in ("b clearly above a: +0.150", "c clearly above a: +0.100", "c clearly below b"):
        assert f"probe top1: {verdict}" in found
    assert "a clearly" not in found


def test_models_that_were_judged_on_other_items_are_compared_without_pairing():
    text = flat(tables.report({"a": {"probe": probe(236, "other")}, "b": {"probe": probe(240)}}))
    errors = [an_outcome(hits(right)).se("top1") for right in (240, 236)]
    wanted = f"+0.010 ± {math.hypot(*errors):.3f} (of other items: not paired)"
    assert wanted in text


def test_an_evaluation_that_nobody_here_knows_is_shown_like_any_other():
    metrics, items = scored("rank_error", np.linspace(0, 4, 50))
    depth = Outcome(("rank_error", "delta_2"), metrics | {"delta_2": 0.5}, items, "x", "depth: m.")
    models = {"a": {"probe": probe(200)}, "b": {"nyu_v2": depth}}
    assert tables.columns(models) == [
        ("probe", "top1"), ("nyu_v2", "rank_error"), ("nyu_v2", "delta_2")
    ]  # fmt: skip
    text = tables.report(models)
    assert flat(text).startswith("probe top1 nyu_v2 rank error nyu_v2 delta 2 -")
    row = next(line for line in text.splitlines() if line.startswith("b "))
    assert row.split()[1:] == ["-", "2.000", "±", "0.167", "0.500"]  # no error is known of the last
    assert "depth: m." in text and "clearly" not in text  # no two have the same row
    assert tables.line({"nyu_v2": depth}) == (
        "nyu_v2 rank error 2.000 ± 0.167, nyu_v2 delta 2 0.500"
    )


def test_what_was_chosen_on_training_items_is_said_for_each_model():
    models = {
        name: {"knn": probe(200, chosen={"top1": words})}
        for name, words in (("a", "cls, k = 20"), ("b", "patches, k = 20"))
    }
    text = flat(tables.report(models))
    assert "Chosen for a: knn top1: cls, k = 20." in text
    assert "Chosen for b: knn top1: patches, k = 20." in text


def test_chance_and_trivial_features_are_of_the_first_model_that_was_measured_so():
    models = {
        "a": {"knn": probe(200)},
        "b": {"probe": probe(200, chance={"top1": 0.1}, baselines={"raw pixels": probe(40)})},
    }
    found = tables.beside(models, tables.columns(models))
    assert found == {"chance": ["-", "0.100"], "raw pixels": ["-", "0.100 ± 0.015"]}


def test_rows_of_unequal_length_are_no_table():
    with pytest.raises(ValueError):
        tables.aligned([("a", "b"), ("c",)])
    assert tables.aligned([("", "x"), ("long", "1")]) == ["      x", "-------", "long  1"]
