"""MetaCLIP's two passes from their arguments to their files: planned, done by a runner, summed up.

=====================  ===========================================================================
``match``              scores (``scores``, by ``scorers.matches``): which entries each caption
                       holds; entries.json, counts.npy (captions of each entry), match.json (the
                       figures), match.txt (what each threshold would mean), match.png
``balance``            the shards, <split>.summary.json, <split>.entries.json (entry -> captions
                       before and after), <split>.table.txt, <split>.counts.png
=====================  ===========================================================================

What they are begun with is in ``.plan``: a second start continues from there.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

from webssl_jax.config import UserError
from webssl_jax.curation import balancing, engine, matching, scores
from webssl_jax.curation.engine import Progress, silent
from webssl_jax.curation.scorers.matches import Matches
from webssl_jax.curation.shards import Shard
from webssl_jax.data.converter import plan, runners
from webssl_jax.files import write_json, write_text
from webssl_jax.visuals.png import save_png

ENTRIES, COUNTS = "entries.json", "counts.npy"
MAX_NAMED = 1000  # damaged records in a summary; the count is of all


def match(
    pattern: Sequence[str],
    entries_file: Path,
    index: Path,
    runner: runners.Runner = runners.here,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Matches the captions of a pool with entries; continues what was begun.

    Returns:
      The figures, also in ``<index>/match.json``.

    Raises:
      UserError: for bad shards or entries (``sources``, ``matching.read_entries``), a folder begun
        with others or in use, a pool without a caption or without a match, a worker that died.
    """
    from webssl_jax.curation import report  # with matplotlib: no worker and no --help needs it

    entries = matching.read_entries(entries_file)
    scorer = Matches(os.path.abspath(entries_file))
    scores.score(pattern, scorer, index, runner, progress, {"entries": scorer.digest})
    where = " ".join(engine.absolute(pattern))
    with plan.lock(index):
        counts, sums = _sum(index, len(entries))
        if not sums["captions"]:
            damaged = sums["damaged"]["count"]
            raise UserError(
                f"--input {where}: no record has a caption"
                + (f" ({damaged:,} of {sums['records']:,} are damaged)" if damaged else "")
            )
        if not sums["matched_captions"]:
            raise UserError(
                f"--entries {entries_file}: none is in any of the {sums['captions']:,} captions of "
                f"{where}; case and spelling count"
            )
        summary = {
            "shards": len(scores.shards(index)),
            "entries": len(entries),
            "entries_that_cannot_match": sum(not matching.can_match(entry) for entry in entries),
            "entries_matched": int((counts > 0).sum()),
            "matches": int(counts.sum()),
            **sums,
        }
        write_json(index / ENTRIES, entries)
        write_text(index / "match.txt", report.match_table(summary, counts, entries))
        save_png(index / "match.png", report.picture(counts))
        write_json(index / "match.json", summary)
        balancing.save(index / COUNTS, counts)  # last: the index is complete
        return summary


def _sum(index: Path, entries: int) -> tuple[np.ndarray, dict[str, Any]]:
    """Counts of each entry, (entries,) int64, and the figures of the pool. Each caption counts once
    for each of its entries, as in MetaCLIP; captions that several records share count each time."""
    counts = np.zeros(entries, np.int64)
    names = ("records", "uncaptioned", "matched_records", "captions", "matched_captions")
    sums: dict[str, Any] = dict.fromkeys(names, 0)
    damaged: list[str] = []
    count = 0
    tables = scores.tables([index], ["matches", "problem"])
    for shard, table in zip(scores.shards(index), tables, strict=True):
        found = balancing.Matched.of(table)
        texts = pc.list_value_length(table["matches"]).drop_null()
        for place in np.flatnonzero(table["problem"].is_valid()):
            count += 1
            if len(damaged) < MAX_NAMED:
                why = table["problem"][int(place)].as_py().removeprefix("damaged: ")
                damaged.append(f"{shard['file']} record {place}: {why}")
        sums["records"] += len(table)
        sums["uncaptioned"] += pc.sum(pc.equal(texts, 0)).as_py() or 0
        sums["captions"] += pc.sum(texts).as_py() or 0
        sums["matched_captions"] += len(found.places)
        sums["matched_records"] += len(np.unique(found.places))
        counts += np.bincount(found.matches, minlength=entries)
    return counts, sums | {"damaged": {"count": count, "records": damaged}}


def balance(
    index: Path,
    output: Path,
    split: str,
    threshold: int | None,
    tail_share: float | None,
    seed: int,
    runner: runners.Runner = runners.here,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Writes the sampled records of a matched pool; continues what was begun.

    Args:
      threshold: captions of an entry above which it is sampled; or
      tail_share: the share of all matches that entries below the threshold are to hold.

    Returns:
      The figures, also in ``<output>/<split>.summary.json``.

    Raises:
      UserError: if the index is missing or not complete, its shards have changed, the folder was
        begun with other arguments or is in use, or a worker died.
    """
    from webssl_jax.curation import report  # with matplotlib: no worker and no --help needs it

    if not (index / COUNTS).exists():
        raise UserError(
            f"--index {index}: no complete index there; run the match command, to its end"
        )
    counts = np.load(index / COUNTS)
    entries = json.loads((index / ENTRIES).read_text("utf-8"))
    version = hashlib.blake2b(counts.tobytes() + json.dumps(entries).encode(), digest_size=4)
    settings = {
        "index": f"{index.name} ({version.hexdigest()})",
        "split": split,
        "threshold": threshold,
        "tail_share": tail_share,
        "seed": seed,
    }
    if threshold is None:
        if tail_share is None:
            raise ValueError("give a threshold or a tail_share")
        threshold = balancing.threshold_of_tail(counts, tail_share)
    plan.prepare(output, settings, lambda: ({"threshold": threshold}, {}))
    with plan.lock(output):
        folder = output / plan.PLAN_FOLDER
        balancing.save(folder / balancing.PROBABILITIES, balancing.probabilities(counts, threshold))
        tasks = _tasks(index, output, split, seed)
        for left in output.glob("*.tmp"):
            left.unlink()
        engine.work(runner, balancing.balance_shard, tasks, progress)
        after, sums = balancing.total([task.counts for task in tasks], len(entries))
        before = json.loads((index / "match.json").read_text("utf-8"))
        summary = {
            "split": split,
            "shards": len(tasks),
            "threshold": threshold,
            "seed": seed,
            **report.head_and_tail(counts, after, threshold),
            "before": before,
            "after": {**sums, "matches": int(after.sum())},
        }
        table = report.balance_table(summary, counts, after, entries)
        pairs = {entry: [int(a), int(b)] for entry, a, b in zip(entries, counts, after) if a}
        write_text(output / f"{split}.entries.json", json.dumps(pairs, ensure_ascii=False) + "\n")
        write_text(output / f"{split}.table.txt", table)
        save_png(output / f"{split}.counts.png", report.picture(counts, after, threshold))
        write_json(output / f"{split}.summary.json", summary)
        return summary


def _tasks(index: Path, output: Path, split: str, seed: int) -> list[balancing.Task]:
    shards = scores.shards(index)
    return [
        balancing.Task(str(output), str(index), Shard(i, **shard), split, len(shards), seed)
        for i, shard in enumerate(shards)
    ]
