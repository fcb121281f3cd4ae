"""Models that a study does not train, as levels beside its cells: weights of any known family,
judged by the rows that all cells share. They lie in ``DIR/references``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from webssl_jax import config as configs
from webssl_jax.config import ConfigError
from webssl_jax.evaluators import outcome
from webssl_jax.evaluators.outcome import Outcome
from webssl_jax.files import write_json
from webssl_jax.study.cells import Reference, Study
from webssl_jax.study.runner import end_with_parent, share_cache

_JUDGED = "judged.json"  # the settings of its outcomes


def shared_rows(study: Study) -> list[str]:
    """The rows that are the same in every cell, by name."""
    rows = [{name: _asked(row) for name, row in c.config.evals.items()} for c in study.cells]
    return [name for name in rows[0] if all(rows[0][name] == own.get(name) for own in rows)]


def _asked(row: ConfigDict) -> dict[str, Any]:
    return {key: value for key, value in configs.leaves(row) if key != "every_steps"}


def command(study: Study, reference: Reference, folder: Path) -> list[str]:
    """What judges a reference. What is known of it is not judged again."""
    where = ["--output", str(_output(reference, folder)), "--batch", "64"]
    program = [sys.executable, "-m", "webssl_jax.evaluate"]
    return [*program, *where, *_settings(study, reference)]


def _settings(study: Study, reference: Reference) -> list[str]:
    """The flags that say what is judged, and by what."""
    rows = study.cells[0].config.evals
    size = ["--eval-size", str(reference.eval_size)] if reference.eval_size else []
    flags = [
        f"--evals.{row}.{key}={value}"
        for row in shared_rows(study)
        for key, value in _asked(rows[row]).items()
    ]
    return ["--model", reference.model, *size, *flags]


def judge(study: Study, folder: Path, say: Callable[[str], None]) -> dict[str, str]:
    """Judges those that are not, or were with other settings, one after the other. Returns
    {name: last words} of what failed."""
    failed = {}
    for reference in study.references:
        if len(_outcomes(study, reference, folder)) == len(shared_rows(study)):
            continue
        say(f"reference {reference.name}: judged by {', '.join(shared_rows(study))}")
        _output(reference, folder).mkdir(parents=True, exist_ok=True)
        share_cache(eval_folder(reference, folder) / ".cache", folder)
        log = _output(reference, folder) / "evaluate.log"
        with open(log, "ab") as file:
            program = end_with_parent(command(study, reference, folder))
            code = subprocess.run(program, stdout=file, stderr=file, check=False).returncode
        if code:
            lines: Sequence[str] = log.read_text("utf-8", "replace").splitlines() or [""]
            words = next((line for line in lines[::-1] if line.startswith("error: ")), lines[-1])
            failed[reference.name] = f"exit code {code}: {words}"
        else:
            write_json(_output(reference, folder) / _JUDGED, _settings(study, reference))
    return failed


def read(study: Study, folder: Path) -> dict[str, Mapping[str, Outcome]]:
    """{name: {row: outcome}} of what was judged.

    Raises:
      UserError: for an outcome that cannot be read.
    """
    found = {one.name: _outcomes(study, one, folder) for one in study.references}
    return {name: rows for name, rows in found.items() if rows}


def _output(reference: Reference, folder: Path) -> Path:
    return folder / "references" / reference.key


def eval_folder(reference: Reference, folder: Path) -> Path:
    """Where its outcomes lie, a folder a row."""
    return _output(reference, folder) / Path(reference.model).resolve().name / "eval"


def _outcomes(study: Study, reference: Reference, folder: Path) -> dict[str, Outcome]:
    try:
        judged = json.loads((_output(reference, folder) / _JUDGED).read_text())
    except (OSError, ValueError):  # of a study that did not write it, or of one that was cut
        judged = _settings(study, reference)
    if judged != _settings(study, reference):
        return {}
    rows = outcome.read_rows(eval_folder(reference, folder), 0)
    return {row: one for row, one in rows.items() if row in shared_rows(study)}


def check(study: Study) -> None:
    """Refuses what cannot be judged, before anything is run.

    Raises:
      ConfigError: naming it.
    """
    for reference in study.references:
        if not os.path.exists(reference.model):
            raise ConfigError(
                f"references.{reference.key}.model = {reference.model}: no such file or folder"
            )
    if study.references and not shared_rows(study):
        raise ConfigError("references: the cells have no row in common to judge them by")
