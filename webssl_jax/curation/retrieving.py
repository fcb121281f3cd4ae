"""Retrieval towards a target set, as DINOv2's LVD-142M was made (Oquab et al. 2023, arXiv
2304.07193, section 3): each image of a set whose kind is wanted takes the records of a pool that
lie nearest to it.

=======================  =========================================================================
``selection.parquet``    ``shard``, ``record``, ``key`` of what was retrieved
``NNNNN.parquet``        as scores of the shards: ``similarity``, the largest cosine to a target;
                         ``wanted``, how many targets took the record
``scores.json``          their ranges
``retrieve.json``        the figures: records, targets, kept, dropped, without features; how often a
                         kept record is wanted; similarity of the nearest and of the last taken
``retrieved.png``        kept records, the most wanted first
``index.html``           the report: figures and the picture
=======================  =========================================================================
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from webssl_jax.config import UserError
from webssl_jax.curation import engine, selecting, selection_page
from webssl_jax.curation.feature_pool import FeaturePool, unit
from webssl_jax.data.converter import plan
from webssl_jax.files import write_json

_TARGETS = 1024  # of a product


def retrieve(
    pool: FeaturePool,
    targets: FeaturePool,
    output: Path,
    nearest: int,
    above: float = -1.0,
    progress: engine.Progress = engine.silent,
) -> dict[str, Any]:
    """Writes what lies nearest to the targets. Memory: their features, ``12 nearest`` bytes a
    target, 20 a record.

    Args:
      nearest: records that each target takes.
      above: only those with this cosine similarity at least.

    Returns:
      The figures, also in ``<output>/retrieve.json``.

    Raises:
      UserError: for features of two models, a folder begun with others or in use.
    """
    for name in ("weights", "column"):
        if pool.identity[name] != targets.identity[name]:
            raise UserError(
                f"--targets {targets.folder}: are features of another model than {pool.folder}"
            )
    settings = {"features": pool.identity, "targets": targets.identity, "nearest": nearest}
    settings["above"] = above
    plan.prepare(output, settings, lambda: ({"shards": list(pool.shards)}, {}))
    with plan.lock(output):
        wanted_by = unit(np.concatenate([block for _, block in targets.blocks()]))
        best = np.full(len(pool), np.nan, np.float32)
        if not len(wanted_by):
            raise UserError(f"--targets {targets.folder}: no image has features")
        found, similar = _search(pool, wanted_by, min(nearest, len(pool)), best, progress)
        taken = (found >= 0) & (similar >= above)
        counts = np.bincount(found[taken], minlength=len(pool))
        kept, there = counts > 0, ~np.isnan(best)
        if not kept.any():
            raise UserError(f"--above {above:g}: no record is so similar to a target")
        figures = {
            **settings,
            "records": len(pool),
            "without_features": int((~there).sum()),
            "target_images": len(wanted_by),
            "kept": int(kept.sum()),
            "dropped": int((there & ~kept).sum()),
            "wanted_once": int((counts == 1).sum()),
            "most_wanted": int(counts.max()),
            "similarity_of_nearest": float(similar[:, 0].mean()),
            "least_similarity": float(similar[taken].min()),
        }
        pool.write_scores(output, there, {"similarity": best, "wanted": counts.astype(np.int32)})
        selecting.write_selection(output / "selection.parquet", pool.records(), kept)
        order = np.lexsort((-best, -counts))[: int(kept.sum())]
        shown = ((int(i), f"{counts[i]}: {best[i]:.3f}") for i in order)
        title = f"{kept.sum():,} records: targets that want it, and the similarity of the nearest"
        selecting.sheet(output / "retrieved.png", pool.shards, shown, title)
        selection_page.write(
            output,
            "Retrieved towards targets",
            figures,
            {"retrieved.png": "the records that most targets want"},
        )
        write_json(output / "retrieve.json", figures)
        return figures


def _search(
    pool: FeaturePool,
    targets: np.ndarray,
    nearest: int,
    best: np.ndarray,
    progress: engine.Progress,
) -> tuple[np.ndarray, np.ndarray]:
    """(t, nearest) records and their similarities, the largest first, by all pairs; -1 where there
    are fewer. Fills ``best``, (n,), with each record's largest."""
    found = np.full((len(targets), nearest), -1, np.int64)
    similar = np.full((len(targets), nearest), -np.inf, np.float32)
    progress(0, len(pool))
    for numbers, block in pool.blocks():
        rows = unit(block)
        best[numbers] = -np.inf
        for start in range(0, len(targets) if len(rows) else 0, _TARGETS):
            span = slice(start, start + _TARGETS)
            product = targets[span] @ rows.T
            best[numbers] = np.maximum(best[numbers], product.max(axis=0))
            enters = (product > similar[span, -1:]).any(axis=0)  # soon few do
            both = np.concatenate([similar[span], product[:, enters]], axis=1)
            entering = np.broadcast_to(numbers[enters], (len(product), int(enters.sum())))
            names = np.concatenate([found[span], entering], axis=1)
            # Of equal ones the first of the pool: the sort is stable.
            order = np.argsort(-both, axis=1, kind="stable")[:, :nearest]
            similar[span] = np.take_along_axis(both, order, 1)
            found[span] = np.take_along_axis(names, order, 1)
        progress(len(numbers))
    return found, similar
