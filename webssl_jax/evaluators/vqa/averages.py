"""Sixteen figures as five: four categories of four benchmarks, and the mean of all.

``published()`` has the paper's own rows, to put beside ours.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from webssl_jax.errors import UserError
from webssl_jax.evaluators.vqa.task import CATEGORIES
from webssl_jax.evaluators.vqa.tasks import SIXTEEN

AVERAGE = "average"
_MME_POINTS = 20  # a percent: the paper divides by it before it averages, whatever MME's sum is of
CATEGORY_OF = {task.name: task.category for task in SIXTEEN}


def percent(name: str, headline: float) -> float:
    """The headline of a benchmark in percent, as averages take it."""
    return headline / _MME_POINTS if name == "mme" else headline


def weights() -> dict[str, dict[str, float]]:
    """{``general`` ... ``average``: {benchmark: what its headline is multiplied by}}."""
    shares = {
        category: {
            name: percent(name, 1.0) / list(CATEGORY_OF.values()).count(category)
            for name, its in CATEGORY_OF.items()
            if its == category
        }
        for category in CATEGORIES
    }
    shares[AVERAGE] = {name: percent(name, 1.0) / len(CATEGORY_OF) for name in CATEGORY_OF}
    return shares


def averages(headlines: Mapping[str, float]) -> dict[str, float]:
    """{``general``, ``knowledge``, ``chart_ocr``, ``vision_centric``, ``average``: percent}. Of a
    category that is not whole there is none, and no average without all sixteen.

    Raises:
      UserError: if a name is none of the sixteen.
    """
    unknown = sorted(set(headlines) - set(CATEGORY_OF))
    if unknown:
        raise UserError(f"{', '.join(unknown)}: not in the averages; they are of the sixteen")
    return {
        name: sum(share * headlines[task] for task, share in shares.items())
        for name, shares in weights().items()
        if shares.keys() <= headlines.keys()
    }


@dataclasses.dataclass(frozen=True)
class Published:
    """A row of the paper's tables.

    parameters: of the encoder; None where the table has a name instead. images: seen in
      pretraining; None where the paper does not say. tables: where it is printed. average: as it is
      printed. scores: {benchmark: figure}, in percent, MME in points.
    """

    model: str
    method: str
    parameters: int | None
    data: str
    images: int | None
    resolution: int
    tables: tuple[int, ...]
    average: float
    scores: dict[str, float]


def published() -> list[Published]:
    """The 37 encoders of Tables 6, 8 and 10 to 15 (one is printed in two of them)."""
    rows: list[dict[str, Any]] = _file()["rows"]
    return [Published(**row | {"tables": tuple(row["tables"])}) for row in rows]


def _file() -> Any:
    return json.loads((pathlib.Path(__file__).parent / "published.json").read_text("utf-8"))
