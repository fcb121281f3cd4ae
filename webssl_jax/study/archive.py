"""The outcomes of a study in one file, ``outcomes.zip``: all that its findings, tables and figures
are made of, so that a page can be made again without the runs.

In it lie ``runs.json`` (of every run its cell, seed and steps, its seconds, losses and machine) and
the outcome files of each run as they lie in its workdir (evaluators/outcome.py). Before the first
step nothing is compared item by item: those are without items. Trivial features are the same for
many runs, and have their items in the first of them.
"""

from __future__ import annotations

import dataclasses
import io
import json
import tempfile
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from webssl_jax.config import UserError
from webssl_jax.evaluators import outcome
from webssl_jax.evaluators.outcome import Outcome
from webssl_jax.files import write_bytes
from webssl_jax.study.cells import Run, Study
from webssl_jax.study.results import Group, Measured, grouped

_INDEX = "runs.json"
_MACHINE = ("cpu", "devices", "git_revision", "packages", "platform", "python")
_MOST_LOSSES = 500  # of a run: what a curve can show
_DATE = (1980, 1, 1, 0, 0, 0)  # so that the same outcomes make the same bytes


def write(path: Path, groups: Sequence[Group], known: Mapping[str, Mapping[str, Outcome]]) -> None:
    """Writes the outcomes of the runs that are done, and of the references.

    Raises:
      UserError: if it cannot be written.
    """
    index: dict[str, Any] = {"runs": [], "references": list(known)}
    files: dict[str, bytes] = {}
    stored: set[str] = set()
    for one in (run for group in groups for run in group.runs):
        index["runs"].append(_told(one))
        bare = {row: dataclasses.replace(found, items={}) for row, found in one.untrained.items()}
        files |= _encoded(f"cells/{one.run.name}", 0, bare, stored)
        files |= _encoded(f"cells/{one.run.name}", one.run.cell.steps, one.outcomes, stored)
    for number, rows in enumerate(known.values()):
        files |= _encoded(f"references/{number}", 0, rows, stored)
    files[_INDEX] = json.dumps(index).encode()
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as packed:
        for name, content in files.items():
            entry = zipfile.ZipInfo(name, _DATE)
            entry.external_attr = 0o644 << 16
            packed.writestr(entry, content, zipfile.ZIP_DEFLATED, 9)
    try:
        write_bytes(path, stream.getvalue())
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error


def _told(one: Measured) -> dict[str, Any]:
    run, (steps, losses) = one.run, one.losses
    kept = np.unique(np.linspace(0, max(len(steps) - 1, 0), _MOST_LOSSES).astype(int))[: len(steps)]
    told: dict[str, Any] = {"cell": run.cell.name, "seed": run.seed, "steps": run.cell.steps}
    told["environment"] = {x: one.environment[x] for x in _MACHINE if x in one.environment}
    told["losses"] = [np.asarray(x)[kept].tolist() for x in (steps, losses)]
    return told | {"seconds": one.seconds}


def _encoded(
    folder: str, step: int, rows: Mapping[str, Outcome], stored: set[str]
) -> dict[str, bytes]:
    """{path: content}. stored: trivial features that have their items elsewhere, or from now on."""
    files: dict[str, bytes] = {}
    for name, row in rows.items():
        features = {}
        for key, one in row.baselines.items():
            which = json.dumps([name, row.data, key, one.metrics])
            known = which in stored or not row.items
            features[key] = dataclasses.replace(one, items={}) if known else one
            stored |= set() if known else {which}
        text, arrays = dataclasses.replace(row, baselines=features).encoded()
        path = outcome.step_path(Path(folder) / name, step)
        files |= {str(path): text, str(path.with_suffix(".npz")): arrays}
    return files


def read(study: Study, path: Path) -> tuple[list[Group], dict[str, Mapping[str, Outcome]]]:
    """The cells of which at least one run is stored, and the references, as they were read when
    :func:`write` stored them; runs of ``study`` in a folder that is not there.

    Raises:
      UserError: if the file is missing or damaged, or of other cells than ``study`` has.
    """
    cells = {cell.name: cell for cell in study.cells}
    found: dict[str, list[Measured]] = {name: [] for name in cells}
    try:
        with tempfile.TemporaryDirectory() as made, zipfile.ZipFile(path) as file:
            folder = Path(made)
            file.extractall(folder)  # names that lead out of the folder are cut by zipfile
            index = json.loads((folder / _INDEX).read_text())
            for told in index["runs"]:
                cell = cells.get(told["cell"])
                if cell is None or cell.steps != told["steps"]:
                    raise UserError(
                        f"{path}: has a cell {told['cell']} of {told['steps']} steps, which the "
                        f"study {study.name} has not; give the study with the arguments it had"
                    )
                run = Run(cell, told["seed"], Path("cells") / cell.name / f"seed{told['seed']}")
                steps, losses = (np.asarray(x) for x in told["losses"])
                own = folder / "cells" / run.name
                last, first = (outcome.read_rows(own, step) for step in (cell.steps, 0))
                rest = told["seconds"], (steps, losses), told["environment"]
                found[cell.name].append(Measured(run, last, first, *rest))
            known = {
                name: outcome.read_rows(folder / "references" / str(number), 0)
                for number, name in enumerate(index["references"])
            }
    except (OSError, zipfile.BadZipFile, zlib.error, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: cannot be read ({type(error).__name__}: {error}); it must be the "
            "outcomes.zip that a study left"
        ) from error
    return grouped(study, found), {name: rows for name, rows in known.items() if rows}
