"""The pages under docs/study: what they say follows from the outcomes that lie beside them."""

import json
import pathlib

import pytest

from webssl_jax.study import archive, cells, findings, results, tables
from webssl_jax.visuals import pages

PAGES = sorted((pathlib.Path(__file__).parents[2] / "docs" / "study").glob("*/"))


@pytest.mark.parametrize("folder", PAGES, ids=lambda folder: folder.name)
def test_every_sentence_and_table_of_a_committed_page_follows_from_its_outcomes(folder):
    study = cells.load(folder.name)
    groups, known = archive.read(study, folder / "outcomes.zip")
    page = (folder / "index.html").read_text()
    stated = findings.state(study, groups)
    stored = json.loads((folder / "findings.json").read_text())
    assert [one.text for one in stated] == [one["text"] for one in stored]
    for one, row in zip(stated, stored, strict=True):
        assert one.verdict == row["verdict"]
        if one.verdict != findings.MISSING:
            given = (row[key] for key in ("value", "low", "high"))
            figures = [float("nan") if x is None else x for x in given]  # no interval
            assert [one.value, one.low, one.high] == pytest.approx(figures, abs=1e-9, nan_ok=True)
    assert pages.wide_table(*tables.answers(study, stated)) in page
    assert pages.table(*tables.categories(study, groups, known)) in page or not study.categories
    assert pages.table(*tables.cells(groups, known)) in page
    assert pages.table(*tables.cost(groups)) in page
    assert (folder / "runs.csv").read_text() == results.as_csv(results.rows(groups))
