"""The runs of a study on TPU slices: a babysitter a run (tools/tpu.py), one budget for all.

The study itself stays a process on a machine that sees the workdirs, which are in a bucket or on
NFS; what is done it tells from them. The budget is dealt out by what each run takes at best
(price.py), so that none of them starves another.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path

from webssl_jax.config import UserError
from webssl_jax.sharding import slices
from webssl_jax.study import price
from webssl_jax.study.cells import Run, Study

METER = "machine_hours.json"  # in the workdir of a run: what its slices have cost so far


def shares(
    study: Study, folder: Path, slice_name: str, dollars_an_hour: float, budget: float, table: Path
) -> dict[str, float]:
    """{run: its part of ``budget``}, in dollars.

    Args:
      dollars_an_hour: of a chip.
      table: of plans, price.TABLE.

    Raises:
      UserError: for a cell that the table does not have, two cells whose names make one of a slice,
        or a budget under the best case.
    """
    plans, chips = price.read_table(table), slices.find(slice_name).chips
    least: dict[str, float] = {}
    names: dict[str, Run] = {}
    for run in study.runs(folder):
        if (other := names.setdefault(_slice_of(study, run), run)) is not run:
            raise UserError(
                f"cells {other.cell.name} and {run.cell.name}: their slices would have one name, "
                f"{_slice_of(study, run)}; call one of them otherwise"
            )
        plan = price.plan_of(run.cell, slice_name, plans)
        if plan is None:
            raise UserError(
                f"cell {run.cell.name}: {run.cell.spec} on {slice_name} is not in {table} with "
                "these networks and batch, so its part of the budget is not known"
            )
        hours = run.cell.images / plan["images_per_s"] / 3600
        least[run.name] = hours * chips * dollars_an_hour
    whole = sum(least.values())
    if budget < whole:
        raise UserError(
            f"--max-dollars {budget:,.0f}: all runs take ${whole:,.0f} at best; leave cells out, "
            "or give more"
        )
    return {name: budget * part / whole for name, part in least.items()}


def command(
    study: Study, run: Run, slice_name: str, dollars_an_hour: float, budget: float, flags: list[str]
) -> list[str]:
    """What trains a run on a slice of its own. flags: of ``tpu babysit``: ``--zone``, ``--mount``,
    ``--tier`` and so on."""
    wanted: Mapping[str, str] = {
        "--slice": slice_name,
        "--price": f"{dollars_an_hour:g}",
        "--max-dollars": f"{budget:.2f}",
        "--meter": str(run.workdir / METER),
    }
    start = [sys.executable, "-m", "webssl_jax", "tpu", "babysit", _slice_of(study, run)]
    return [*start, *(x for pair in wanted.items() for x in pair), *flags, *run.arguments()]


def _slice_of(study: Study, run: Run) -> str:
    return re.sub("[^a-z0-9]+", "-", f"{study.name}-{run.cell.name}-{run.seed}".lower())
