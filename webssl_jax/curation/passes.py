"""The two passes from their arguments to their files: planned, done by a pool, summed up.

What they leave in their folders, beside ``.plan`` (which a second start continues from):

=====================  ===========================================================================
``match``              entries.json, counts.npy (captions of each entry), match.json (the figures),
                       match.txt (what each threshold would mean), match.png
``balance``            the shards, <split>.summary.json, <split>.entries.json (entry -> captions
                       before and after), <split>.table.txt, <split>.counts.png
=====================  ===========================================================================
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from webssl_jax.config import UserError
from webssl_jax.curation import balancing, engine, matching, report
from webssl_jax.curation import index as indexing
from webssl_jax.curation.engine import Progress, silent
from webssl_jax.data.converter import plan
from webssl_jax.files import write_json, write_text
from webssl_jax.visuals.png import save_png


def match(
    pattern: Sequence[str],
    entries_file: Path,
    index: Path,
    workers: int,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Matches the captions of a pool with entries; continues what was begun.

    Returns:
      The figures, also in ``<index>/match.json``.

    Raises:
      UserError: for bad shards or entries (``sources``, ``matching.read_entries``), a folder begun
        with others or in use, a pool without a caption or without a match, a worker that died.
    """
    entries = matching.read_entries(entries_file)
    settings = {"input": engine.absolute(pattern), "entries": matching.digest(entries)}

    def make() -> tuple[dict[str, Any], plan.Dealt]:
        facts = {"shards": indexing.list_shards(settings["input"])}
        write_json(index / indexing.ENTRIES, entries)
        return facts, {}

    facts, _ = plan.prepare(index, settings, make)
    with plan.lock(index):
        shards = _shards(index, facts)
        engine.work(workers, indexing.match_shard, shards, progress)
        counts, sums = indexing.total([shard.path for shard in shards], len(entries))
        where = " ".join(settings["input"])
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
            "shards": len(shards),
            "entries": len(entries),
            "entries_that_cannot_match": sum(not matching.can_match(entry) for entry in entries),
            "entries_matched": int((counts > 0).sum()),
            "matches": int(counts.sum()),
            **sums,
        }
        write_text(index / "match.txt", report.match_table(summary, counts, entries))
        save_png(index / "match.png", report.picture(counts))
        write_json(index / "match.json", summary)
        with open(index / "counts.npy.tmp", "wb") as file:
            np.save(file, counts)
        os.replace(index / "counts.npy.tmp", index / "counts.npy")  # last: the index is complete
        return summary


def balance(
    index: Path,
    output: Path,
    split: str,
    threshold: int | None,
    tail_share: float | None,
    seed: int,
    workers: int,
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
    if not (index / "counts.npy").exists():
        raise UserError(
            f"--index {index}: no complete index there; run the match command, to its end"
        )
    counts = np.load(index / "counts.npy")
    entries = json.loads((index / indexing.ENTRIES).read_text("utf-8"))
    version = hashlib.blake2b(counts.tobytes() + json.dumps(entries).encode(), digest_size=4)
    settings = {
        "index": f"{index.resolve()} ({version.hexdigest()})",
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
        np.save(folder / balancing.PROBABILITIES, balancing.probabilities(counts, threshold))
        facts = json.loads((index / plan.PLAN_FOLDER / "facts.json").read_text("utf-8"))
        shards = _shards(index, facts)
        tasks = [balancing.Task(s, str(output), split, len(shards), seed) for s in shards]
        for left in output.glob("*.tmp"):
            left.unlink()
        engine.work(workers, balancing.balance_shard, tasks, progress)
        after, sums = indexing.total([task.counts for task in tasks], len(entries))
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


def _shards(index: Path, facts: dict[str, Any]) -> list[indexing.Shard]:
    return [
        indexing.Shard(str(index), number, **shard) for number, shard in enumerate(facts["shards"])
    ]
