"""The paper's light and heavy filter (arXiv 2504.01017, appendix A) in one pass, by any of three
ways. A way scores each record, and the two shares with the highest scores are selections.

``detector``   lines of text, then their area (scorers/text_boxes.py)
``smolvlm``    how likely a yes is to each of the paper's questions (scorers/smolvlm.py)
``features``   heads on features of a model, one for each filter, which another way teaches

================================  ================================================================
``index.html``                    the report: counts, agreement, sources, histograms, sheets
``text_rich.json``                its figures
``WAY/light/``, ``WAY/heavy/``    as ``curate select`` writes them
``WAY/scores/``                   as ``curate score`` writes them
``features/taught/``              scores of the shards that the heads learn from, if not from all
``features/features/``            as ``webssl features`` writes them
``features/light.npz``, ...       the heads, for ``--scorer head``
================================  ================================================================

What is scored is not scored again: the same command goes on after a kill, and one with another way
adds it to the report.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from webssl_jax.config import UserError
from webssl_jax.curation import engine, expressions, scorers, scores, selecting
from webssl_jax.curation.scorers.smolvlm import QUESTIONS
from webssl_jax.curation.shards import list_shards, names_of
from webssl_jax.data.converter import plan, runners
from webssl_jax.errors import suggest
from webssl_jax.files import write_json, write_text
from webssl_jax.visuals import pages

LIGHT, HEAVY = 0.503, 0.013  # what the paper's filters kept
FEATURES = "features"
# Of each way, what each filter ranks by.
RANKS = {
    "detector": {"light": "lines + text_area", "heavy": "lines + text_area"},
    "smolvlm": {"light": "text_rich_yes", "heavy": "chart_like_yes"},
    FEATURES: {"light": "light", "heavy": "heavy"},
}
_SCORERS = {"detector": "text_boxes", "smolvlm": "smolvlm"}
_SOURCES = 30  # named in the report
RunnerOf = Callable[[scorers.Scorer], runners.Runner]


@dataclasses.dataclass(frozen=True)
class Features:
    """model: as :func:`webssl_jax.load` takes it. feature: cls or patches. teacher: detector or
    smolvlm."""

    model: str = ""
    feature: str = "cls"
    teacher: str = "detector"

    def __post_init__(self) -> None:
        if not self.model:
            raise UserError("--by features: name the model, as in features:model=RUN")
        if self.feature not in ("cls", "patches"):
            raise UserError(f"--by features:feature={self.feature}: must be cls or patches")
        if self.teacher not in _SCORERS:
            raise UserError(f"--by features:teacher: {suggest(self.teacher, _SCORERS)}")


@dataclasses.dataclass(frozen=True)
class Asked:
    """pattern: the pool. output: the folder. ways: {name: its options}. shares: of the pool, by
    filter. taught_on: shards of the pool that heads learn from; empty: all."""

    pattern: list[str]
    output: Path
    ways: Mapping[str, str]
    shares: Mapping[str, float]
    taught_on: list[str]

    def scorer(self, way: str) -> scorers.Scorer:
        options = self.ways.get(way, "")
        return scorers.make(f"{_SCORERS[way]}{':' * bool(options)}{options}")


def ask(
    pattern: Sequence[str],
    ways: Sequence[str],
    output: Path,
    light: float = LIGHT,
    heavy: float = HEAVY,
    taught_on: Sequence[str] = (),
) -> Asked:
    """Args:
      ways: ``NAME[:option=value,...]`` each.

    Raises:
      UserError: for a way that there is not, or one given twice.
    """
    found: dict[str, str] = {}
    for spec in ways:
        name, _, options = spec.partition(":")
        if name not in RANKS:
            raise UserError(f"--by {spec}: {suggest(name, RANKS)}")
        if name in found:
            raise UserError(f"--by {spec}: {name} is given twice")
        found[name] = options
    files, taught = engine.absolute(pattern), engine.absolute(taught_on)
    return Asked(files, output, found, {"light": light, "heavy": heavy}, taught)


def text_rich(
    asked: Asked, runner_of: RunnerOf, progress: engine.Progress = engine.silent
) -> dict[str, Any]:
    """Scores, selects, and writes the report.

    Args:
      runner_of: by whom a scorer is called.

    Returns:
      The figures, also in ``text_rich.json``.

    Raises:
      UserError: for bad shards, a folder begun with others or in use, too few records for a share
        or for a head, a worker that died.
    """
    own = None
    if FEATURES in asked.ways:
        own = scorers.filled(Features, asked.ways[FEATURES], "--by features")
    output, settings = asked.output, {"input": asked.pattern, **asked.shares}
    plan.prepare(output, settings, lambda: ({"shards": list_shards(asked.pattern)}, {}))
    asked = dataclasses.replace(asked, taught_on=_taught_on(asked, own))
    with plan.lock(output):
        for way in asked.ways:
            if way in _SCORERS:
                _score(asked, way, asked.pattern, output / way / "scores", runner_of, progress)
        if own is not None:
            _score_by_heads(asked, own, runner_of, progress)
        done = [way for way in RANKS if (output / way / "scores" / "scores.json").exists()]
        figures: dict[str, Any] = {"shares": dict(asked.shares), "ways": {}}
        for way in done:
            figures["ways"][way] = {part: _select(asked, way, part) for part in asked.shares}
        if "smolvlm" in done:
            figures["answers"] = _answers(output / "smolvlm" / "scores")
        figures |= _compare(output, done, list(asked.shares))
        write_text(output / "index.html", _page(figures))
        write_json(output / "text_rich.json", figures)
        return figures


def _taught_on(asked: Asked, own: Features | None) -> list[str]:
    """The files: a part of a set is meant here, so what else is in the set is not missing."""
    if asked.taught_on and own is None:
        raise UserError("--taught-on: only with --by features")
    pool = [shard["file"] for shard in scores.shards(asked.output)]
    chosen: list[str] = []
    for pattern in asked.taught_on:
        found = [file for file in pool if file not in chosen and fnmatch.fnmatch(file, pattern)]
        if not found:
            raise UserError(f"--taught-on {pattern}: is no shard of --input, or is given twice")
        chosen += found
    return chosen


def _score(
    asked: Asked,
    way: str,
    pattern: Sequence[str],
    folder: Path,
    runner_of: RunnerOf,
    progress: engine.Progress,
) -> None:
    scorer = asked.scorer(way)
    scores.score(pattern, scorer, folder, runner_of(scorer), progress)


def _select(asked: Asked, way: str, part: str) -> dict[str, Any]:
    """The figures of a selection, which is made if it is not there."""
    folder = asked.output / way
    if (done := folder / part / "selection.json").exists():  # written last
        return json.loads(done.read_text("utf-8"))
    share, rank = asked.shares[part], RANKS[way][part]
    return selecting.select(
        [folder / "scores"], folder / part, None, share, rank, [f"{way}/scores"]
    )


def _score_by_heads(
    asked: Asked, own: Features, runner_of: RunnerOf, progress: engine.Progress
) -> None:
    """Scores by heads on features, after what teaches them."""
    from webssl_jax.curation import heads  # with jax, which the other ways need not import

    folder = asked.output / FEATURES
    taught = folder / "taught" if asked.taught_on else asked.output / own.teacher / "scores"
    _score(asked, own.teacher, asked.taught_on or asked.pattern, taught, runner_of, progress)
    pool = heads.pool_of(own.model, asked.pattern, folder / "features", own.feature)
    learned = {}
    for part, share in asked.shares.items():
        rank = RANKS[own.teacher][part]
        values = _spread(taught, rank, pool.shards)
        above = _above(values, share, heads.FEWEST)
        head, _ = heads.learn(pool, values, above, rank, f"--by features: {rank} > {above:g}")
        head.save(folder / f"{part}.npz")
        learned[part] = head
    settings = {"features": pool.identity, "taught": scorers.describe(asked.scorer(own.teacher))}
    settings["taught_on"] = asked.taught_on
    plan.prepare(folder / "scores", settings, lambda: ({"shards": list(pool.shards)}, {}))
    with plan.lock(folder / "scores"):
        there = np.zeros(len(pool), bool)
        columns = {part: np.zeros(len(pool), np.float32) for part in learned}
        for numbers, block in pool.blocks():
            there[numbers] = True
            for part, head in learned.items():
                columns[part][numbers] = head(block)
        pool.write_scores(folder / "scores", there, columns)


def _spread(folder: Path, rank: str, shards: Sequence[dict[str, Any]]) -> np.ndarray:
    """(n,) of all records of ``shards``: what the scores of some of them say, else NaN."""
    found, start = expressions.numbers(folder, rank, "--by"), 0
    starts = dict(zip([one["file"] for one in shards], _starts(shards), strict=True))
    values = np.full(sum(one["records"] for one in shards), np.nan)
    for shard in scores.shards(folder):
        first, count = starts[shard["file"]], shard["records"]
        values[first : first + count] = found[start : start + count]
        start += count
    return values


def _starts(shards: Sequence[dict[str, Any]]) -> list[int]:
    """The number of the first record of each, over all."""
    return list(itertools.accumulate([one["records"] for one in shards], initial=0))[:-1]


def _above(values: np.ndarray, share: float, fewest: int) -> float:
    """Of the scores there are, the one above which lies about the share of the records, and of
    either kind as many as a head needs."""
    levels, counts = np.unique(values[~np.isnan(values)], return_counts=True)
    above = counts.sum() - np.cumsum(counts)
    wanted = np.clip(share * counts.sum(), fewest, max(counts.sum() - fewest, fewest))
    fits = (above >= fewest) & (above <= counts.sum() - fewest)
    gaps = np.where(fits, np.abs(above - wanted), np.inf)
    return float(levels[gaps.argmin()]) if len(levels) else 0.0


def _answers(folder: Path) -> dict[str, dict[str, int]]:
    """How often each question was answered by yes, by no, by neither, and not asked."""
    found = {name: dict.fromkeys(("yes", "no", "unclear", "not asked"), 0) for name in QUESTIONS}
    for part in scores.tables([folder], [*QUESTIONS, "unclear"]):
        missing = part["unclear"].null_count
        for name, counts in found.items():
            yes = pc.sum(part[name]).as_py() or 0
            unclear = part[name].null_count - missing
            asked = len(part) - missing
            for answer, count in zip(counts, (yes, asked - unclear - yes, unclear, missing)):
                counts[answer] += count
    return found


def _compare(output: Path, ways: Sequence[str], parts: Sequence[str]) -> dict[str, Any]:
    """What the ways have in common, and which sources they take."""
    shards = scores.shards(output)
    kept = {
        (way, part): _mask(output / way / part / "selection.parquet", shards)
        for way in ways
        for part in parts
    }
    agreement = {
        part: {
            f"{a}, {b}": int((kept[a, part] & kept[b, part]).sum())
            for a, b in itertools.combinations(ways, 2)
        }
        for part in parts
    }
    scored = next((way for way in ways if way in _SCORERS), None)
    sources: dict[str, Any] = {}
    if scored:
        names, numbers = _sources(output / scored / "scores")
        sizes = np.bincount(numbers, minlength=len(names))
        taken = {
            key: np.bincount(numbers[mask], minlength=len(names)) for key, mask in kept.items()
        }
        for i in np.argsort(-sizes, kind="stable").tolist():
            sources[names[i]] = {"records": int(sizes[i])} | {
                f"{way}, {part}": int(found[i]) for (way, part), found in taken.items()
            }
    return {"agreement": agreement, "sources": sources}


def _mask(selection: Path, shards: Sequence[dict[str, Any]]) -> np.ndarray:
    """(n,) bool over the records of all shards."""
    starts = dict(zip(names_of(shards), _starts(shards), strict=True))
    table = pq.read_table(selection, columns=["shard", "record"])
    shard = table["shard"].combine_chunks().dictionary_encode()
    first = np.array([starts[name] for name in shard.dictionary.to_pylist()], np.int64)
    mask = np.zeros(sum(one["records"] for one in shards), bool)
    mask[first[shard.indices.to_numpy()] + table["record"].to_numpy()] = True
    return mask


def _sources(folder: Path) -> tuple[list[str], np.ndarray]:
    """The sources of the records, and (n,) which of them each is of."""
    names: dict[str, int] = {}
    found = []
    for part in scores.tables([folder], ["source"]):
        texts = part["source"].cast(pa.string()).combine_chunks()
        column = texts.fill_null("(damaged)").dictionary_encode()
        own = [names.setdefault(name, len(names)) for name in column.dictionary.to_pylist()]
        found.append(np.array(own, np.int64)[column.indices.to_numpy()])
    return list(names), np.concatenate(found)


# ---------------------------------------------------------------------------------------- the page


def _page(figures: Mapping[str, Any]) -> str:
    ways, shares = figures["ways"], figures["shares"]
    body = [
        '<p class="soft">Each way scores all records, and the shares with the highest scores are '
        "kept. WAY/light/selection.parquet and WAY/heavy/selection.parquet are what "
        "config.mixture.NAME.selection takes.</p>",
        "<h2>What was kept</h2>",
        pages.wide_table(
            ["way", "filter", "asked", "records", "without a score", "kept", "ranked by", "from"]
            + ["of equal score"],
            [
                [way, part, f"{shares[part]:.2%}", f"{one['records']:,}"]
                + [f"{one['without_score']:,}", f"{one['kept']:,}", one["by"]]
                + [f"{one['threshold']:.4g}", f"{one['alike_kept']:,} of {one['alike']:,}"]
                for way, parts in ways.items()
                for part, one in parts.items()
            ],
        ),
        *_answered(figures.get("answers", {})),
        *_agreement(figures),
        *_by_source(figures["sources"]),
    ]
    for way, parts in ways.items():
        for part in parts:
            body.append(f"<h2>{way}, {part}</h2>")
            for name, words in selecting.PICTURES.items():
                body.append(pages.picture(f"{way}/{part}/{name}.png", words))
    return pages.document("Text-rich images", "\n".join(body))


def _answered(answers: Mapping[str, Mapping[str, int]]) -> Iterable[str]:
    if answers:
        heads = list(next(iter(answers.values())))
        yield "<h2>What SmolVLM2 answered</h2>"
        lines = [
            [QUESTIONS[name], *(f"{n:,}" for n in row.values())] for name, row in answers.items()
        ]
        yield pages.wide_table(["question", *heads], lines)


def _agreement(figures: Mapping[str, Any]) -> Iterable[str]:
    lines = []
    for part, pairs in figures["agreement"].items():
        for names, both in pairs.items():
            a, b = (figures["ways"][way][part] for way in names.split(", "))
            fewer = min(a["kept"], b["kept"])
            chance = max(a["kept"], b["kept"]) / a["records"]
            lines.append([names, part, f"{both:,}", f"{both / fewer:.1%}", f"{chance:.1%}"])
    if lines:
        heads = ["ways", "filter", "kept by both", "share of the smaller", "by chance"]
        yield "<h2>Agreement</h2>"
        yield pages.wide_table(heads, lines)


def _by_source(sources: Mapping[str, Mapping[str, int]]) -> Iterable[str]:
    if not sources:
        return
    heads = [name for name in next(iter(sources.values())) if name != "records"]
    lines = [
        [name, f"{row['records']:,}"]
        + [f"{row[head]:,} ({row[head] / row['records']:.0%})" for head in heads]
        for name, row in list(sources.items())[:_SOURCES]
    ]
    yield "<h2>Which sources they are of</h2>"
    yield pages.wide_table(["source", "records", *heads], lines)
    if len(sources) > _SOURCES:
        yield f'<p class="soft">and {len(sources) - _SOURCES:,} smaller ones</p>'
