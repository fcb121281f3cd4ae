"""From scores to a selection: a list of records that training takes without copying a shard
(``config.mixture.NAME.selection``), and a page that says what was chosen.

``--where`` is a condition on columns of scores. ``--top-share`` keeps that share of the whole pool
by a column, or an expression of several (:mod:`expressions`), the largest first, to the record: of
equal scores, those whose names have the smaller hash. Given both, the share is of the pool and
taken from what the condition leaves. A record without a score is never kept.

=======================  =========================================================================
``selection.parquet``    ``shard``, ``record``, ``key`` of what is kept, in the pool's order
``selection.json``       the figures: kept, dropped and unscored records; the threshold, ``alike``,
                         how many have just that score, and ``alike_kept``, how many of them stay
``index.html``           the report: the figures, and the pictures below
``selection.png``        histograms of the columns, kept and all
``kept.png``             kept records, those just above the threshold and any
``dropped.png``          dropped records, those just below and any
=======================  =========================================================================
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from webssl_jax.config import UserError
from webssl_jax.curation import scores, selection_page
from webssl_jax.curation.expressions import Condition, Expression
from webssl_jax.curation.shards import names_of
from webssl_jax.data import records
from webssl_jax.data.decode import DecodeError, decode_image
from webssl_jax.data.sources import ArrayRecordSource, DamagedRecord
from webssl_jax.files import make_folder, write_json
from webssl_jax.visuals import image_grid, save_png

SHOWN = 24  # images of a sheet
COLUMNS = ("shard", "record", "key")  # of a selection
PICTURES = {
    "selection": "scores of all records and of those that are kept",
    "kept": "kept: those just above the threshold, and any",
    "dropped": "dropped: those just below the threshold, and any",
}


def select(
    folders: Sequence[Path],
    output: Path,
    where: Condition | None = None,
    top_share: float | None = None,
    by: str | None = None,
    named: Sequence[str] = (),
) -> dict[str, Any]:
    """Writes a selection. Memory: about 100 bytes a record of the pool.

    Args:
      folders: of scores of the same shards. named: their names for the figures.
      top_share: the share of the pool to keep by the expression ``by``.

    Returns:
      The figures, also in ``<output>/selection.json``.

    Raises:
      UserError: as :func:`scores.tables`; or if nothing is kept.
    """
    from webssl_jax.curation import report  # with matplotlib: no worker and no --help needs it

    ranked = Expression(by, "--by") if by is not None else None
    names = sorted({name for asked in (where, ranked) if asked for name in asked.columns})
    columns = scores.numbers(folders, names)
    shards = scores.shards(folders[0])
    sizes, named_shards = [shard["records"] for shard in shards], names_of(shards)
    if ranked and by:
        columns[by] = ranked(columns)
    scored = ~np.logical_or.reduce([np.isnan(column) for column in columns.values()])
    kept = scored & where(columns) if where else scored.copy()
    figures: dict[str, Any] = {
        "scores": list(named) or [str(folder) for folder in folders],
        "where": where.text if where else None,
        "top_share": top_share,
        "by": by,
        "records": len(scored),
        "without_score": int((~scored).sum()),
    }
    if top_share is not None and by is not None:
        allowed, wanted = kept, round(top_share * len(scored))
        kept = _highest(columns[by], allowed, wanted, named_shards, sizes)
        threshold = float(columns[by][kept].min()) if kept.any() else None
        alike = allowed & (columns[by] == threshold)
        figures |= {"threshold": threshold, "alike": int(alike.sum())}
        figures["alike_kept"] = int((alike & kept).sum())
    figures |= {"kept": int(kept.sum()), "dropped": int((scored & ~kept).sum())}
    if not kept.any():
        raise UserError(f"nothing is kept of {len(scored):,} records; see the columns' ranges")
    make_folder(output)
    pool = zip(scores.tables(folders[:1], COLUMNS), named_shards, strict=True)
    chosen = (part.set_column(0, "shard", pa.repeat(name, len(part))) for part, name in pool)
    write_selection(output / "selection.parquet", chosen, kept)
    save_png(output / "selection.png", report.histograms(columns, kept))
    order = columns[by] if by else columns[names[0]]
    for name, mask in (("kept", kept), ("dropped", scored & ~kept)):
        _draw(output / f"{name}.png", folders[0], order, mask, name == "kept")
    pictures = {f"{name}.png": words for name, words in PICTURES.items()}
    selection_page.write(output, "Selected by scores", figures, pictures)
    write_json(output / "selection.json", figures)
    return figures


def _highest(
    values: np.ndarray, allowed: np.ndarray, count: int, names: list[str], sizes: list[int]
) -> np.ndarray:
    """(n,) bool: the ``count`` highest of those allowed, all if they are fewer. names, sizes: of
    the shards."""
    if count >= allowed.sum() or not count:
        return allowed if count else np.zeros_like(allowed)
    threshold = -np.partition(-values[allowed], count - 1)[count - 1]
    above = allowed & (values > threshold)
    ties = np.flatnonzero(allowed & (values == threshold))
    if len(ties) > count - above.sum():
        ends = np.cumsum(sizes)
        shard = np.searchsorted(ends, ties, "right")
        place = ties - (ends - sizes)[shard]
        ranks = [_hash(f"{names[s]}/{p}") for s, p in zip(shard, place, strict=True)]
        ties = ties[np.argsort(ranks, kind="stable")[: count - above.sum()]]
    above[ties] = True
    return above


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def write_selection(path: Path, pool: Iterable[pa.Table], kept: np.ndarray) -> None:
    """Args:
    pool: for each shard a table of :data:`COLUMNS`, a row a record.
    kept: (n,) bool, over the records of all of them.
    """
    temporary, start, writer = path.with_name(path.name + ".tmp"), 0, None
    for part in pool:
        chosen = part.filter(pa.array(kept[start : start + len(part)]))
        chosen = chosen.set_column(0, "shard", chosen["shard"].cast(pa.string()))
        writer = writer or pq.ParquetWriter(temporary, chosen.schema)
        writer.write_table(chosen)
        start += len(part)
    assert writer is not None  # there is a record
    writer.close()
    os.replace(temporary, path)


def _draw(path: Path, folder: Path, order: np.ndarray, mask: np.ndarray, lowest: bool) -> None:
    """Half of the images nearest to the threshold, half drawn at random."""
    found = np.flatnonzero(mask)
    if not len(found):
        path.unlink(missing_ok=True)
        return
    ranked = found[np.argsort(order[found], kind="stable")]
    near = ranked[: SHOWN // 2] if lowest else ranked[: -SHOWN // 2 - 1 : -1]
    any_of = np.random.default_rng(0).permutation(found)[: 4 * SHOWN]
    shown = list(dict.fromkeys([*near.tolist(), *any_of.tolist()][: 4 * SHOWN]))
    named = ((index, f"{order[index]:.4g}") for index in shown)
    sheet(path, scores.shards(folder), named, f"{path.stem}: {len(found):,} records")


def sheet(
    path: Path, shards: Sequence[dict[str, Any]], shown: Iterable[tuple[int, str]], title: str
) -> None:
    """Draws the first :data:`SHOWN` records that can be read, with their captions.

    shown: numbers of records over all shards, and words for each.
    """
    images, captions = [], []
    ends = np.cumsum([one["records"] for one in shards])
    for index, words in shown:
        number = int(np.searchsorted(ends, index, "right"))
        place = index - int(ends[number]) + shards[number]["records"]
        try:  # of a shard alone: the index of all would be large
            with ArrayRecordSource((shards[number]["file"],)) as source:
                image = decode_image(records.decode(source[place]).image, 128)
        except (DamagedRecord, records.RecordError, DecodeError):
            continue  # counted when it was scored
        image.thumbnail((128, 128))
        images.append(np.asarray(image))
        captions.append(words)
        if len(images) == SHOWN:
            break
    if images:
        save_png(path, image_grid(images, 8, captions, title))
    else:
        path.unlink(missing_ok=True)
