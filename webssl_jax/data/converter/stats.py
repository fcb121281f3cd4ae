"""Counts of a conversion: plain JSON and additive, so that a split is the sum of its shards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from webssl_jax.data import annotations as annotation
from webssl_jax.data import records
from webssl_jax.data.converter.items import EMPTY, Candidate, Dropped, Item, Note

CONVERSATIONS = "conversations"
EXAMPLES = 5  # names kept for each reason
# Beginnings of the notes that tell of inputs, or parts of them, that could not be read.
_DAMAGE = ("damaged ", "unreadable file", "zeros inside a tar", "shard missing", EMPTY + " ")
_SUMS = ("inputs", "kept", "reencoded", "captioned", "bytes")
_EDGES = {
    "shorter_side": (32, 64, 128, 224, 256, 384, 512, 768, 1024, 2048),
    "longer_side": (64, 128, 224, 256, 384, 512, 768, 1024, 2048, 4096),
    "aspect": (1.1, 1.34, 1.5, 1.78, 2.0, 3.0, 4.0),
    "kilobytes": (4, 16, 64, 256, 1024, 4096),
    "captions": (0, 1, 2, 5, 10),
    "caption_words": (2, 5, 10, 20, 50, 100),
    "turns": (2, 4, 8, 16, 32),
    "conversation_words": (20, 50, 100, 200, 500, 1000, 2000),
}
TITLES = {
    "shorter_side": "shorter side",
    "longer_side": "longer side",
    "aspect": "aspect",
    "kilobytes": "kilobytes",
    "captions": "captions",
    "caption_words": "words each",
    "turns": "turns",
    "conversation_words": "words in all",
}


def new_stats() -> dict[str, Any]:
    """``inputs`` is the number of images met: ``kept`` and those under ``dropped`` add up to it.
    ``notes`` counts what is not an image: damaged files, ignored members. ``listed``: the values of
    lists of the user's that images were found by."""
    names = ("dropped", "notes", *_EDGES, "labels", "annotations", "listed")
    return {**dict.fromkeys(_SUMS, 0), **{name: {} for name in names}}


def count_item(stats: dict[str, Any], item: Item, outcome: records.Record | Dropped | None) -> None:
    """Adds what a reader yielded, and what became of it (None for a note)."""
    if isinstance(item, Note):
        _name(stats["notes"], item.reason, item.key)
        return
    stats["inputs"] += 1
    if item.listed:
        _raise(stats["listed"], item.listed, 1)
    for reason in item.notes if isinstance(item, Candidate) else ():
        _name(stats["notes"], reason, item.key)
    if isinstance(outcome, Dropped):
        _name(stats["dropped"], outcome.reason, outcome.key)
    else:
        assert isinstance(item, Candidate) and outcome is not None  # what became a record
        _add(stats, outcome, outcome.image is not item.data, 1)


def drop_record(stats: dict[str, Any], record: records.Record, reencoded: bool, why: str) -> None:
    """Takes back a record that was counted as kept."""
    _add(stats, record, reencoded, -1)
    _name(stats["dropped"], why, record.key)


def _name(table: dict[str, Any], reason: str, key: str) -> None:
    row = table.setdefault(reason, {"count": 0, "examples": []})
    row["count"] += 1
    row["examples"] = (row["examples"] + [key])[:EXAMPLES]


def _add(stats: dict[str, Any], record: records.Record, reencoded: bool, sign: int) -> None:
    sides = sorted((record.width, record.height))
    stats["kept"] += sign
    stats["bytes"] += sign * len(record.image)
    stats["captioned"] += sign * bool(record.captions)
    stats["reencoded"] += sign * reencoded
    _bin(stats, "shorter_side", sides[0], sign)
    _bin(stats, "longer_side", sides[1], sign)
    _bin(stats, "aspect", sides[1] / sides[0], sign)
    _bin(stats, "kilobytes", len(record.image) / 1000, sign)
    _bin(stats, "captions", len(record.captions), sign)
    for caption in record.captions:
        _bin(stats, "caption_words", len(caption.split()), sign)
    if CONVERSATIONS in record.annotations:
        turns = annotation.conversations(record)
        _bin(stats, "turns", len(turns), sign)
        words = sum(len(one["value"].split()) for one in turns)
        _bin(stats, "conversation_words", words, sign)
    if record.label is not None:
        _raise(stats["labels"], record.label, sign)
    for name in record.annotations:
        _raise(stats["annotations"], name, sign)


def _bin(stats: dict[str, Any], name: str, value: float, sign: int) -> None:
    edges = _EDGES[name]
    _raise(
        stats[name],
        next((f"<= {edge:g}" for edge in edges if value <= edge), f"> {edges[-1]:g}"),
        sign,
    )


def _raise(table: dict[str, int], key: str, n: int) -> None:
    table[key] = table.get(key, 0) + n
    if not table[key]:
        del table[key]


def total_stats(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The sum of shards' statistics, in a fixed order, so that the summary file is reproducible."""
    total = new_stats()
    for part in parts:
        for name in _SUMS:
            total[name] += part[name]
        for table in ("dropped", "notes"):
            for reason, row in part[table].items():
                mine = total[table].setdefault(reason, {"count": 0, "examples": []})
                mine["count"] += row["count"]
                mine["examples"] = (mine["examples"] + row["examples"])[:EXAMPLES]
        for name in (*_EDGES, "labels", "annotations", "listed"):
            for key, n in part[name].items():
                _raise(total[name], key, n)
    for name, edges in _EDGES.items():
        order = [f"<= {edge:g}" for edge in edges] + [f"> {edges[-1]:g}"]
        total[name] = {key: total[name][key] for key in order if key in total[name]}
    for table in ("labels", "annotations"):
        total[table] = dict(sorted(total[table].items()))
    for table in ("dropped", "notes"):
        rows = sorted(total[table].items(), key=lambda x: (-x[1]["count"], x[0]))
        total[table] = dict(rows)
    return total


def damaged(summary: Mapping[str, Any]) -> int:
    """How many inputs, or parts of them, could not be read, by the summary."""
    rows = [*summary["notes"].items(), *summary["dropped"].items()]
    return sum(row["count"] for reason, row in rows if reason.startswith(_DAMAGE))


def table(summary: Mapping[str, Any]) -> str:
    """A split's summary for the eye."""
    shards = "1 shard" if summary["shards"] == 1 else f"{summary['shards']:,} shards"
    lines = [
        f"{summary['split']}: {summary['kept']:,} of {summary['inputs']:,} images kept in "
        f"{shards}, {summary['bytes'] / 1e6:,.1f} MB"
        + (f", {summary['reencoded']:,} shrunk" if summary["reencoded"] else "")
        + (f", {summary['captioned']:,} with captions" if summary["captioned"] else "")
    ]
    for title, name in (("dropped", "dropped"), ("note", "notes")):
        for reason, row in summary[name].items():
            more = ", ..." if row["count"] > len(row["examples"]) else ""
            named = ", ".join(row["examples"]) + more
            lines.append(f"  {title:7} {row['count']:>8,}  {reason}: {named}")
    for name, title in TITLES.items():
        if summary[name] and (summary["captioned"] or not name.startswith("caption")):
            bins = "   ".join(f"{key}: {n:,}" for key, n in summary[name].items())
            lines.append(f"  {title:12} {bins}")
    if summary["labels"]:
        common = sorted(summary["labels"].items(), key=lambda item: (-item[1], item[0]))
        shown = ", ".join(f"{name} {n:,}" for name, n in common[:8])
        lines.append(f"  {len(common)} labels   {shown}{', ...' if len(common) > 8 else ''}")
    if summary["annotations"]:
        shown = ", ".join(f"{name} {n:,}" for name, n in summary["annotations"].items())
        lines.append(f"  annotations  {shown}")
    return "\n".join(lines)
