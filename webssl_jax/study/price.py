"""What the cells of a study take on a TPU slice, before anything is paid for: hours, chip-hours and
dollars, from the rates that the compiler's figures allow (docs/plan_table.json). They are a best
case: nothing is lost to input, checkpoints, evaluations or preemptions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from webssl_jax.config import UserError
from webssl_jax.sharding import slices

if TYPE_CHECKING:
    from webssl_jax.study.cells import Cell, Study

TABLE = Path(__file__).parent.parent.parent / "docs" / "plan_table.json"
Row = tuple[str, ...]
_OF_A_STEP = ("model.", "method.", "global_batch=")  # overrides that may make it another


def read_table(path: Path = TABLE) -> dict[str, dict[str, Any]]:
    """What tools/plan_table.py wrote: {``CONFIG.py:size=SIZE@SLICE``: its plan}.

    Raises:
      UserError: if it cannot be read.
    """
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"--plan-table {path}: cannot be read ({error}); it lies in docs/ of a checkout, and "
            "tools/plan_table.py writes one"
        ) from None


def plan_of(cell: Cell, slice_name: str, table: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """The plan of a cell's config at its size; what it is trained on and how long do not change a
    step. None where the table has none, as for other networks by overrides, or it does not fit."""
    if any(key.startswith(_OF_A_STEP) for key in cell.overrides):
        return None
    name, _, arg = cell.spec.partition(":")
    parts = [part for part in arg.split(",") if part.partition("=")[0] not in ("data", "images")]
    plan = table.get(f"{name.removesuffix('.py')}.py:{','.join(parts)}@{slice_name}")
    return plan if plan and plan["fits"] else None


def rows(study: Study, slice_name: str, price: float | None, path: Path = TABLE) -> list[Row]:
    """A line a cell, over its seeds, and their sum.

    Args:
      price: dollars a chip and hour; no dollars without.

    Raises:
      UserError: for a slice that there is not, or as :func:`read_table`.
    """
    table, chips = read_table(path), slices.find(slice_name).chips
    out: list[Row] = [
        ("cell", "images", "seeds", "images/s", "days a run", "chip-hours", "dollars")
    ]
    total, unknown = 0.0, 0
    for cell in study.cells:
        head = (cell.name, f"{cell.images:,}", str(len(cell.seeds)))
        plan = plan_of(cell, slice_name, table)
        if plan is None:
            unknown += 1
            out.append((*head, "not in the table", "-", "-", "-"))
            continue
        hours = cell.images / plan["images_per_s"] / 3600
        chip_hours = hours * chips * len(cell.seeds)
        total += chip_hours
        rate = f"{plan['images_per_s']:,.0f}"
        out.append((*head, rate, f"{hours / 24:.1f}", *_cost(chip_hours, price)))
    name = "all" if not unknown else f"all but {unknown} that are not in the table"
    out.append((name, "", "", "", "", *_cost(total, price)))
    return out


def _cost(chip_hours: float, price: float | None) -> tuple[str, str]:
    return f"{chip_hours:,.0f}", "-" if price is None else f"{chip_hours * price:,.0f}"
