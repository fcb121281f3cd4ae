"""What an evaluation found: figures, one value an item behind each, and what they stand beside.

Everything that shows results (tables, curves, comparisons over seeds and models, cards) reads
outcomes and knows no evaluation by name. They lie in ``eval/NAME/STEP.json``, with the values of
items in ``STEP.npz`` beside it.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import pathlib
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from webssl_jax.config import UserError
from webssl_jax.files import write_bytes
from webssl_jax.visuals import save_png

_BASELINE = "baselines"
_DAMAGE: tuple[type[Exception], ...] = (
    *(OSError, ValueError, KeyError, TypeError, AttributeError, EOFError),
    *(zipfile.BadZipFile, zlib.error),
)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One evaluation of one model, or of trivial features.

    headline: the names of the metrics that stand for all of them, in tables.
    metrics: {name: value}. ``NAME_se``, where there is one, is the standard error of ``NAME`` over
      items.
    items: {name of a metric: (n,) float32}, one value an image or question, whose mean is the
      metric; two outcomes of the same ``data`` are compared item by item.
    data: a fingerprint of the items and of the rules they were judged by.
    meaning: what the figures are, in sentences for somebody who reads the table.
    chosen: {name of a metric: what was chosen for it on training items, in words}.
    chance: {metric: what guessing gives}.
    baselines: {name: outcome} of features that need no training.
    pictures: {name: (H, W, 3) uint8}.
    """

    headline: tuple[str, ...]
    metrics: dict[str, float]
    items: dict[str, np.ndarray]
    data: str
    meaning: str = ""
    chosen: dict[str, str] = dataclasses.field(default_factory=dict)
    chance: dict[str, float] = dataclasses.field(default_factory=dict)
    baselines: dict[str, Outcome] = dataclasses.field(default_factory=dict)
    pictures: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def se(self, metric: str) -> float | None:
        """The standard error of a metric; None where there is none."""
        return self.metrics.get(f"{metric}_se")

    def named(self, row: str) -> dict[str, float]:
        """The metrics as they are logged: ``eval/ROW/METRIC``."""
        return {f"eval/{row}/{name}": value for name, value in self.metrics.items()}

    def write(self, path: pathlib.Path, known: Mapping[str, Any] | None = None) -> None:
        """Writes ``path`` (.json), the arrays beside it (.npz) and the pictures (.NAME.png).

        The JSON comes last: where it is, the outcome is whole. known: what else is to be read back
        by :func:`read_known`.

        Raises:
          UserError: if they cannot be written.
        """
        try:
            self._write(path, known or {})
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error

    def _write(self, path: pathlib.Path, known: Mapping[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        text, arrays = self.encoded(known)
        write_bytes(path.with_suffix(".npz"), arrays)
        for name, picture in self.pictures.items():
            save_png(path.with_suffix(f".{name}.png"), picture)
        write_bytes(path, text)

    def encoded(self, known: Mapping[str, Any] | None = None) -> tuple[bytes, bytes]:
        """What :meth:`write` writes as ``.json`` and as ``.npz``."""
        arrays = dict(self.items)
        for name, baseline in self.baselines.items():
            arrays |= {f"{_BASELINE}/{name}/{key}": x for key, x in baseline.items.items()}
        stream = io.BytesIO()
        np.savez_compressed(stream, allow_pickle=False, **arrays)
        row = self._plain() | {"known": dict(known or {})}
        return f"{json.dumps(row, indent=1)}\n".encode(), stream.getvalue()

    def _plain(self) -> dict[str, Any]:
        row = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        row["headline"] = list(self.headline)
        row["pictures"] = sorted(self.pictures)
        row["items"] = sorted(self.items)
        row["baselines"] = {name: one._plain() for name, one in self.baselines.items()}
        return row


def read(path: pathlib.Path) -> Outcome:
    """Inverse of :meth:`Outcome.write`, without the pictures.

    Raises:
      UserError: if a file is missing or damaged.
    """
    try:
        row = json.loads(path.read_text())
        with np.load(path.with_suffix(".npz")) as stored:
            arrays = {name: stored[name] for name in stored.files}
        return _from_plain(row, arrays, "")
    except _DAMAGE as error:
        raise UserError(
            f"{path}: cannot be read ({type(error).__name__}: {error}); remove it and run python "
            "-m webssl_jax.evaluate again"
        ) from error


def read_known(path: pathlib.Path) -> dict[str, Any] | None:
    """What :meth:`Outcome.write` was given as ``known``; None where no whole outcome lies."""
    try:
        return dict(json.loads(path.read_text())["known"])
    except FileNotFoundError:
        return None
    except _DAMAGE as error:
        raise UserError(
            f"{path}: cannot be read ({type(error).__name__}: {error}); remove it"
        ) from error


def steps(folder: pathlib.Path) -> list[int]:
    """The steps of which outcomes lie in ``eval/NAME``, rising."""
    return sorted(int(path.stem) for path in folder.glob("[0-9]*.json"))


def row_steps(folder: pathlib.Path) -> list[int]:
    """The steps of which any row in a run's folder ``eval`` has an outcome, rising."""
    rows = folder.iterdir() if folder.is_dir() else ()
    return sorted({step for row in rows for step in steps(row)})


def step_path(folder: pathlib.Path, step: int) -> pathlib.Path:
    """Where in ``eval/NAME`` the outcome of a step lies."""
    return folder / f"{step:08d}.json"


def read_rows(folder: pathlib.Path, step: int | None = None) -> dict[str, Outcome]:
    """{row: its outcome at ``step``, or the newest}, of a run's folder ``eval``; without the rows
    that have none."""
    found = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        there = steps(path)
        if there and (step is None or step in there):
            found[path.name] = read(step_path(path, there[-1] if step is None else step))
    return found


def scored(name: str, values: np.ndarray) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """(metrics, items) of one value an item: its mean and its standard error std / sqrt(n), which
    for hits (0 or 1) is the binomial sqrt(p (1 - p) / n)."""
    values = np.asarray(values, np.float32)
    mean, se = values.mean(dtype=np.float64), values.std(dtype=np.float64) / math.sqrt(len(values))
    return {name: float(mean), f"{name}_se": float(se)}, {name: values}


class Difference(NamedTuple):
    """``value`` = mean of a minus mean of b; ``se`` its standard error; paired: item by item."""

    value: float
    se: float
    paired: bool = True

    @property
    def clear(self) -> bool:
        """More than two standard errors above zero."""
        return self.value > 2 * self.se and self.value > 0


def paired_difference(a: np.ndarray, b: np.ndarray) -> Difference:
    """Compares two models on the same items: mean(a - b) and std(a - b) / sqrt(n).

    For hits and misses that is McNemar's comparison (1947): items on which both agree say nothing,
    so it is sharper than treating the two means as independent.

    Raises:
      ValueError: if the two are not (n,) of the same items.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise ValueError(f"not the same items: {a.shape} against {b.shape}")
    gap = a - b
    return Difference(float(gap.mean()), float(gap.std() / math.sqrt(len(gap))))


def difference(a: Outcome, b: Outcome, metric: str) -> Difference | None:
    """``a`` minus ``b``: paired where both judged the same items, else with standard errors added
    in quadrature; None where one of them lacks the metric."""
    if metric not in a.metrics or metric not in b.metrics:
        return None
    if a.data == b.data and metric in a.items and metric in b.items:
        return paired_difference(a.items[metric], b.items[metric])
    ours, theirs = a.se(metric), b.se(metric)
    if ours is None or theirs is None:
        return None
    return Difference(a.metrics[metric] - b.metrics[metric], math.hypot(ours, theirs), False)


def _from_plain(row: Mapping[str, Any], arrays: Mapping[str, np.ndarray], prefix: str) -> Outcome:
    return Outcome(
        headline=tuple(row["headline"]),
        metrics=dict(row["metrics"]),
        items={name: arrays[prefix + name] for name in row["items"]},
        data=row["data"],
        meaning=row["meaning"],
        chosen=dict(row["chosen"]),
        chance=dict(row["chance"]),
        baselines={
            name: _from_plain(one, arrays, f"{_BASELINE}/{name}/")
            for name, one in row["baselines"].items()
        },
    )
