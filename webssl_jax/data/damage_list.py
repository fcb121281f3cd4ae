"""A file that names what was damaged, for whoever gets the records anew: one JSON object a line."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from webssl_jax.data.mixture import Mixture
from webssl_jax.data.sources import ArrayRecordSource

_logger = logging.getLogger(__name__)


class DamageList:
    """Appends to ``path``: ``{"shard": file, "record": its number there, "reason": words}``, each
    record and reason once, also over several starts; and ``{"shard": ..., "reason": ...}`` of a
    lost shard.

    A disk that refuses the list does not end the run: all is in the log, too.
    """

    def __init__(self, path: Path, source: ArrayRecordSource | Mixture):
        self._path, self._source = path, source
        self._known: set[str] = set()
        if path.exists():
            self._known.update(path.read_text("utf-8").splitlines())
        for shard, reason in source.lost_files.items():
            self._add({"shard": shard, "reason": reason})

    def __call__(self, index: int, reason: str) -> None:
        """The record ``index`` of the source is damaged."""
        shard, record = self._source.locate(index)
        self._add({"shard": shard, "record": record, "reason": reason})

    def _add(self, entry: dict[str, str | int]) -> None:
        line = json.dumps(entry)
        if line in self._known:
            return
        self._known.add(line)
        try:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            _logger.warning("%s: cannot be written (%s): %s", self._path, error.strerror, line)
