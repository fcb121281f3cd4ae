"""What curation did, for the eye: tables of head and tail, and the counts as curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from webssl_jax.visuals.axes import (
    COLOURS,
    GREY,
    INK,
    add_legend,
    dress,
    log_ticks,
    mark_level,
    to_pixels,
)

LARGEST = 15  # entries named in a table
_WIDTH = 30  # of their names
_POINTS = 2000  # of a curve


def head_and_tail(counts: np.ndarray, after: np.ndarray, threshold: int) -> dict[str, Any]:
    """Entries and matches, before and after, of the head (more captions than the threshold) and of
    the tail."""
    head, tail = counts > threshold, (counts > 0) & (counts <= threshold)
    return {
        name: {
            "entries": int(part.sum()),
            "before": int(counts[part].sum()),
            "after": int(after[part].sum()),
        }
        for name, part in (("head", head), ("tail", tail))
    }


def match_table(summary: Mapping[str, Any], counts: np.ndarray, entries: Sequence[str]) -> str:
    """The figures of a matched pool, and what each of some thresholds would make head and tail."""
    lines = [*_pool(summary), ""]
    lines.append(f"{'threshold':>12} {'head entries':>14} {'tail holds':>12} {'matches left':>14}")
    total = counts.sum()
    for threshold in _round_numbers(int(counts.max())):
        tail = counts[counts <= threshold].sum()
        lines.append(
            f"{threshold:>12,} {(counts > threshold).sum():>14,} {tail / total:>12.1%} "
            f"{np.minimum(counts, threshold).sum() / total:>13.1%}+"
        )
    lines += [
        "",
        "tail: entries of at most so many captions. matches left: if each entry kept its share",
        "alone; more stay, for a caption stays with all of its entries.",
        "",
        f"{'largest entries':{_WIDTH}} {'captions':>14}",
    ]
    for i in _largest(counts):
        lines.append(f"{_name(entries[i])} {counts[i]:>14,}")
    return "\n".join(lines) + "\n"


def balance_table(
    summary: Mapping[str, Any], counts: np.ndarray, after: np.ndarray, entries: Sequence[str]
) -> str:
    """Head and tail before and after, and the largest entries."""
    threshold, kept = summary["threshold"], summary["after"]
    before = summary["before"]
    lines = [
        *_pool(before),
        "",
        f"threshold {threshold:,}, seed {summary['seed']}: {kept['captions']:,} captions sampled "
        f"({kept['captions'] / before['matched_captions']:.1%} of the matched), in "
        f"{kept['records']:,} records, {kept['bytes'] / 1e6:,.1f} MB",
        "",
        f"{'':{_WIDTH}} {'entries':>10} {'matches before':>20} {'after':>20}",
    ]
    for name, words in (
        ("head", f"head, more than {threshold:,}"),
        ("tail", f"tail, up to {threshold:,}"),
    ):
        row = summary[name]
        lines.append(
            f"{words:{_WIDTH}} {row['entries']:>10,} "
            f"{_with_share(row['before'], before['matches'])} "
            f"{_with_share(row['after'], kept['matches'])}"
        )
    empty = before["entries"] - before["entries_matched"]
    lines += [
        f"{'without a match':{_WIDTH}} {empty:>10,}",
        "",
        f"{'largest entries':{_WIDTH}} {'before':>10} {'after':>10} {'asked for':>10}",
    ]
    for i in _largest(counts):
        asked = threshold / max(counts[i], threshold)
        lines.append(f"{_name(entries[i])} {counts[i]:>10,} {after[i]:>10,} {asked:>10.2%}")
    if kept["damaged"]["count"]:
        lines += ["", f"{kept['damaged']['count']:,} records damaged since they were matched"]
    return "\n".join(lines) + "\n"


def picture(
    counts: np.ndarray, after: np.ndarray | None = None, threshold: int | None = None
) -> np.ndarray:
    """Captions of each entry by rank, both axes logarithmic, and the matches of the entries added
    up from the rarest to the most frequent (MetaCLIP, figure 1); each with the curve after
    balancing, if there is one.

    Returns:
      The picture, (H, W, 3) uint8.
    """
    figure = Figure(figsize=(13, 5), dpi=100, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    ranked, added = figure.subplots(1, 2)
    for colour, name, found in (
        (COLOURS[0], "before", counts),
        *([] if after is None else [(COLOURS[1], "after", after)]),
    ):
        sizes = np.sort(found[found > 0])[::-1]
        if not len(sizes):
            continue
        ranks = np.unique(np.geomspace(1, len(sizes), _POINTS).round().astype(int))
        marker = {"marker": "o", "markersize": 3} if len(sizes) < 3 else {}
        ranked.loglog(ranks, sizes[ranks - 1], color=colour, linewidth=2, label=name, **marker)
        rising = np.cumsum(sizes[::-1])
        places = np.unique(np.linspace(0, len(rising) - 1, _POINTS).round().astype(int))
        label = f"{name}: {rising[-1]:,} matches"
        added.plot(places + 1, rising[places], color=colour, linewidth=2, label=label, **marker)
    ranked.set_title("captions of each entry, most frequent first", fontsize=11, loc="left")
    if threshold is not None:
        cut = np.cumsum(np.minimum(np.sort(counts[counts > 0]), threshold))
        places = np.unique(np.linspace(0, len(cut) - 1, _POINTS).round().astype(int))
        label = f"each entry cut at {threshold:,}: {cut[-1]:,} matches"
        added.plot(places + 1, cut[places], color=GREY, linewidth=1, linestyle="--", label=label)
    added.set_title("matches added up, rarest entry first", fontsize=11, loc="left")
    if threshold is not None:
        mark_level(ranked, threshold, f"threshold {threshold:,}")
    if ranked.get_xscale() == "log":  # there was something to draw
        ranked.set_xlim(left=0.9)
        for part in (ranked.xaxis, ranked.yaxis):
            log_ticks(part)
    for part in (added.xaxis, added.yaxis):
        part.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
        part.set_major_formatter(lambda value, _: f"{value:,.0f}")
    for axis in (ranked, added):
        axis.set_xlabel("entries", fontsize=9, color=INK, loc="right")
        dress(axis, label_size=8)
    figure.tight_layout()
    for axis in (ranked, added):
        add_legend(axis, 9)
    return to_pixels(canvas)


def histograms(columns: Mapping[str, np.ndarray], kept: np.ndarray) -> np.ndarray:
    """How the scores of all records lie, and of those that are kept.

    Args:
      columns: {name: (n,) scores, NaN where there is none}.
      kept: (n,) bool.

    Returns:
      The picture, (H, W, 3) uint8.
    """
    figure = Figure(figsize=(6.5, 3 * len(columns)), dpi=100, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    for axis, (name, values) in zip(
        np.ravel(figure.subplots(len(columns), 1)), columns.items(), strict=True
    ):
        finite = np.isfinite(values)
        edges = np.histogram_bin_edges(values[finite], 60)
        for colour, mask, label in (
            (GREY, finite, f"all {finite.sum():,}"),
            (COLOURS[0], finite & kept, f"kept {(finite & kept).sum():,}"),
        ):
            axis.hist(values[mask], edges, color=colour, label=label, log=True)
        axis.set_title(name, fontsize=11, loc="left")
        dress(axis, label_size=8)
    figure.tight_layout()
    for axis in figure.axes:
        add_legend(axis, 9)
    return to_pixels(canvas)


def _pool(summary: Mapping[str, Any]) -> list[str]:
    """A matched pool in words."""
    lines = [
        f"{summary['records']:,} records in {summary['shards']:,} shards: "
        f"{summary['captions']:,} captions, {summary['uncaptioned']:,} records without any",
        f"{summary['matched_captions']:,} captions hold an entry "
        f"({summary['matched_captions'] / summary['captions']:.1%}), of "
        f"{summary['matched_records']:,} records; {summary['matches']:,} matches, "
        f"{summary['matches'] / summary['matched_captions']:.2f} in each",
        f"{summary['entries_matched']:,} of {summary['entries']:,} entries are in some caption"
        + (
            f"; {summary['entries_that_cannot_match']:,} can be in none (a mark without spaces)"
            if summary["entries_that_cannot_match"]
            else ""
        ),
    ]
    if count := summary["damaged"]["count"]:
        lines.append(f"{count:,} damaged records left out")
    return lines


def _round_numbers(largest: int) -> list[int]:
    """1, 2, 5, 10, ... below the largest count, the highest dozen of them."""
    numbers = [digit * 10**power for power in range(len(str(largest))) for digit in (1, 2, 5)]
    return [number for number in numbers if number < largest][-12:] or [1]


def _largest(counts: np.ndarray) -> list[int]:
    return [i for i in np.argsort(-counts, kind="stable")[:LARGEST].tolist() if counts[i]]


def _name(entry: str) -> str:
    entry = " ".join(entry.split())
    return f"{entry if len(entry) <= _WIDTH else entry[: _WIDTH - 3] + '...':{_WIDTH}}"


def _with_share(part: int, whole: int) -> str:
    return f"{part:>12,} {part / max(whole, 1):>7.1%}"
