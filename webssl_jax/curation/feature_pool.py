"""Features of the records of shards, as ``webssl features`` writes them, joined to the records."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from webssl_jax.config import UserError
from webssl_jax.curation import engine, scores
from webssl_jax.curation.shards import list_shards, names_of
from webssl_jax.data.sources import ArrayRecordSource
from webssl_jax.evaluators import feature_files

ROWS = 8192  # of a block


@dataclasses.dataclass(frozen=True)
class FeaturePool:
    """One column of the features of all records of some shards.

    folder: of ``webssl features``. shards: file, bytes and records of each, in order; record ``i``
    of them all has row ``i``. facts: what the folder says of its features.
    """

    folder: Path
    column: str
    shards: tuple[dict[str, Any], ...]
    facts: dict[str, Any]

    @classmethod
    def open(cls, folder: Path, pattern: Sequence[str], column: str) -> FeaturePool:
        """Args:
          pattern: the shards that they are features of.

        Raises:
          UserError: for features that are not complete, of other records, or without the column.
        """
        where = f"--features {folder}"
        try:
            facts = json.loads((folder / feature_files.FACTS).read_text("utf-8"))
            columns = list(facts["columns"])
        except (OSError, ValueError, TypeError, KeyError):
            raise UserError(f"{where}: no features there; make them with webssl features") from None
        if column not in columns:
            raise UserError(f"{where}: no column {column!r}; has {', '.join(columns)}")
        source = ArrayRecordSource(engine.absolute(pattern))
        if facts["input"] != feature_files.input_digest(source):
            raise UserError(
                f"{where}: are features of {facts['images']:,} other images than the "
                f"{len(source):,} records of --input {' '.join(pattern)}"
            )
        pool = cls(folder, column, tuple(list_shards(engine.absolute(pattern))), facts)
        if sum(_rows(part) for part in pool._parts) != len(source):
            raise UserError(f"{where}: are not complete; the same webssl features command goes on")
        return pool

    def __len__(self) -> int:
        return sum(self.sizes)

    @property
    def sizes(self) -> list[int]:
        """Records of each shard."""
        return [shard["records"] for shard in self.shards]

    @property
    def identity(self) -> dict[str, Any]:
        """What its rows depend on."""
        return {"column": self.column, **{k: self.facts[k] for k in ("weights", "input", "dtype")}}

    @property
    def _parts(self) -> list[Path]:
        return sorted(self.folder.glob("part-*.parquet"))

    def blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Rows with features, in order: their numbers (m,), and (m, D) float32."""
        for part in self._parts:
            for batch in pq.ParquetFile(part).iter_batches(ROWS, columns=["index", self.column]):
                there = batch.filter(batch[self.column].is_valid())
                values = there[self.column].flatten().to_numpy(zero_copy_only=False)
                numbers = there["index"].to_numpy()
                width = batch[self.column].type.list_size
                yield numbers, values.astype(np.float32).reshape(-1, width)

    def records(self) -> Iterator[pa.Table]:
        """Of each shard: ``shard``, ``record`` and ``key`` of its records, in order."""
        parts = (pq.read_table(part, columns=["name"])["name"] for part in self._parts)
        waiting = pa.chunked_array([], pa.string())
        for shard, name in zip(self.shards, names_of(self.shards), strict=True):
            count = shard["records"]
            while len(waiting) < count:
                waiting = pa.chunked_array([*waiting.chunks, *next(parts).chunks])
            yield pa.table(
                {
                    "shard": pa.repeat(name, count),
                    "record": pa.array(range(count), pa.int64()),
                    "key": waiting.slice(0, count),
                }
            )
            waiting = waiting.slice(count)

    def write_scores(
        self, output: Path, there: np.ndarray, columns: Mapping[str, np.ndarray]
    ) -> None:
        """Writes what was found by the features as scores of the shards.

        Args:
          there: (n,) bool, which of all records have features. columns: {name: (n,)}.
        """
        parts = [pq.read_table(part, columns=["problem"])["problem"] for part in self._parts]
        why = pa.chunked_array([chunk for part in parts for chunk in part.chunks], pa.string())
        problems = pc.binary_join_element_wise("no features", pc.fill_null(why, ""), ": ")
        problems = pc.if_else(pa.array(there), pa.scalar(None, pa.string()), problems)
        made = {name: pa.array(values, mask=~there) for name, values in columns.items()}
        scores.write(output, self.records(), made, problems)


def _rows(part: Path) -> int:
    try:
        return pq.read_metadata(part).num_rows
    except (OSError, pa.ArrowException) as error:
        words = " ".join(str(error).split())
        raise UserError(
            f"{part}: cannot be read ({words}); remove it and give webssl features again"
        ) from error


def unit(rows: np.ndarray) -> np.ndarray:
    """(m, D) of length 1; zeros stay."""
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
