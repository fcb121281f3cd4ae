"""Writes figures and pictures: ``metrics.jsonl`` (one object for each logged step), PNG files, and
whatever trackers a run has.

Only process 0 writes. After a crash the rows after the restored step are removed, so the file reads
as if the run had never stopped.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from webssl_jax.config import UserError
from webssl_jax.files import write_text
from webssl_jax.telemetry.trackers import Tracker
from webssl_jax.visuals import save_png


def read_rows(path: str | os.PathLike) -> list[dict]:
    """Rows of a ``metrics.jsonl``. A last line that was not written completely, because the process
    was killed, is left out.

    Raises:
      UserError: if another line is no row, or the file cannot be read as text.
    """
    path = pathlib.Path(path)
    if not path.exists():
        return []
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UserError(
            f"{path}: cannot be read ({reason}); move it away and start again"
        ) from None
    # A complete line ends in a newline, so the last item is empty or incomplete.
    rows = []
    for number, line in enumerate(text.split("\n")[:-1], start=1):
        try:
            row = json.loads(line)
            row["step"]
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"{path}: line {number} is damaged; remove it and start again"
            ) from error
        rows.append(row)
    return rows


class MetricWriter:
    """Appends scalars and pictures of a run.

    Args:
      workdir: gets ``metrics.jsonl`` and ``pictures/``.
      step: the step that the run starts or resumes from. Later rows are removed.
      enabled: False on every process but the first: all calls do nothing.
      trackers: are given the same, after the files.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        *,
        step: int = 0,
        enabled: bool = True,
        trackers: Sequence[Tracker] = (),
    ):
        self._enabled, self._trackers = enabled, trackers
        if not enabled:
            return
        self._workdir = pathlib.Path(workdir)
        self._path = self._workdir / "metrics.jsonl"
        self._drop_rows_after(step)
        self._file = open(self._path, "a")

    def _drop_rows_after(self, step: int) -> None:
        rows = read_rows(self._path)
        kept = [row for row in rows if row["step"] <= step]
        text = "".join(json.dumps(row) + "\n" for row in kept)
        if not self._path.exists() or self._path.read_text() != text:
            write_text(self._path, text)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one row. NaN and infinity become ``NaN`` and ``Infinity``, as in Python's JSON."""
        if not self._enabled:
            return
        values = {name: float(value) for name, value in values.items()}
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for tracker in self._trackers:
            tracker.scalars(step, values)

    def text(self, step: int, name: str, text: str) -> None:
        """Gives a text to the trackers."""
        for tracker in self._trackers if self._enabled else ():
            tracker.text(step, name, text)

    def pictures(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Writes (H, W, 3) uint8 pictures to ``pictures/NAME_STEP.png``."""
        if not self._enabled:
            return
        for name, image in images.items():
            save_png(self._workdir / "pictures" / f"{name}_{step:08d}.png", image)
        for tracker in self._trackers:
            tracker.pictures(step, images)

    def flush(self) -> None:
        """Returns when everything is on disk."""
        if self._enabled:
            self._file.flush()
            os.fsync(self._file.fileno())
            for tracker in self._trackers:
                tracker.flush()

    def close(self) -> None:
        """Flushes and closes. Later calls do nothing."""
        if self._enabled:
            self.flush()
            self._file.close()
            for tracker in self._trackers:
                tracker.close()
            self._enabled = False
