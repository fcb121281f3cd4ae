#!/usr/bin/env python3
"""Curates captioned records as MetaCLIP does (arXiv 2309.16671): see docs/curation.md.

    python tools/curate.py match --input 'SHARDS/train-*.arrayrecord' --entries entries.txt \\
        --output INDEX
    python tools/curate.py balance --index INDEX --threshold 20000 --output CURATED

``match`` finds which entries each caption holds and prints what thresholds would mean; ``balance``
writes the sampled records, and can be run again with another threshold into another folder. Both
continue where they were stopped, by whatever, and their result does not depend on that or on the
number of workers. A list of entries is made from texts in two steps:

    python tools/curate.py count --text wiki/*.txt.gz --output COUNTS
    python tools/curate.py entries --unigrams COUNTS/unigrams.tsv --bigrams COUNTS/bigrams.tsv \\
        --words wordnet.txt --pageviews views/*.gz --output entries.txt

Records are chosen by scores of any kind, without copying a shard, in two steps:

    python tools/curate.py score --input 'SHARDS/train-*' --scorer statistics --output SCORES
    python tools/curate.py select --scores SCORES --where 'width >= 256' --top-share 0.1 \\
        --by edges --output CHOSEN

and CHOSEN/selection.parquet is what training takes: config.mixture.NAME.selection. What a scorer
says of some records, a linear head on features of a model can learn to say of others:

    python tools/curate.py fit-head --scores SCORES --column text_area --above 0.02 \\
        --model MODEL --output head.npz

By features of the same shards (webssl features), near-duplicates, balance and retrieval are such
selections, too:

    python tools/curate.py dedup --features FEATURES --input SHARDS --threshold 0.95 --output ONCE
    python tools/curate.py cluster --features FEATURES --input SHARDS --levels 1000,50 \\
        --share 0.25 --output EVEN
    python tools/curate.py retrieve --features FEATURES --input SHARDS --targets WANTED \\
        --target-input IMAGES --nearest 4 --output LIKE_WANTED

Exit codes as everywhere in webssl_jax: 0 done, 2 bad input or full disk (one line says what), 130
stopped by Ctrl-C.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from webssl_jax import cli
from webssl_jax.config import UserError
from webssl_jax.curation import entries as listing
from webssl_jax.curation import matching, ngrams, scorers
from webssl_jax.files import write_text
from webssl_jax.telemetry.progress import Progress

_RESUMABLE = ("match", "balance", "score", "fit-head", "dedup", "cluster", "retrieve")


def main(argv: list[str] | None = None) -> int:
    """The entry point. Returns an exit code of cli.py."""
    parser = cli.ArgumentParser(description=__doc__)
    parsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (words, add_flags, _) in COMMANDS.items():
        mine = parsers.add_parser(name, help=words)
        add_flags(mine)
        mine.add_argument("--output", type=Path, required=True)
    args, unknown = parser.parse_known_args(argv)
    if unknown:  # said by the subparser, so that it suggests its own flags
        parsers.choices[args.command].error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        return COMMANDS[args.command][2](args)
    except KeyboardInterrupt:
        resumable = args.command in _RESUMABLE
        print("stopped; the same command continues" if resumable else "stopped", file=sys.stderr)
        return cli.EXIT_INTERRUPTED


def _count_flags(parser: cli.ArgumentParser) -> None:
    parser.add_argument(
        "--text", nargs="+", type=Path, default=[], metavar="FILE", help="a text in each line; .gz"
    )
    parser.add_argument(
        "--captions", nargs="+", default=[], metavar="PATTERN", help="shards of captioned records"
    )


def _count(args) -> int:
    if not (args.text or args.captions):
        raise UserError("nothing to count: give --text or --captions")
    if args.output.exists() and not args.output.is_dir():
        raise UserError(f"--output {args.output}: is a file; give a folder")
    texts = itertools.chain.from_iterable(map(ngrams.lines_of, args.text))
    damaged: list[str] = []
    if args.captions:
        texts = itertools.chain(texts, ngrams.captions_of(args.captions, damaged.append))
    words, pairs = ngrams.count(_with_progress(texts, "counting", "texts"), args.output)
    print(f"{words:,} different words, {pairs:,} different pairs, in {args.output}")
    if damaged:
        print(f"{len(damaged):,} damaged records left out, {damaged[0]} first", file=sys.stderr)
    return 0


def _entries_flags(parser: cli.ArgumentParser) -> None:
    limits = listing.Limits()
    parser.add_argument(
        "--words",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="entries to take as they are, one in each line (WordNet's, say)",
    )
    parser.add_argument("--unigrams", type=Path, metavar="FILE", help="lines count<TAB>word")
    parser.add_argument(
        "--bigrams", type=Path, metavar="FILE", help="lines count<TAB>word<TAB>word"
    )
    parser.add_argument(
        "--pageviews",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="hourly files of dumps.wikimedia.org/other/pageviews",
    )
    parser.add_argument("--project", default="en", help="of the page views (default: en)")
    parser.add_argument("--min-unigram", type=_positive, default=limits.min_unigram, metavar="N")
    parser.add_argument(
        "--min-pmi",
        type=float,
        default=limits.min_pmi,
        metavar="X",
        help="pointwise mutual information of a pair, in bits",
    )
    parser.add_argument("--min-bigram", type=_positive, default=limits.min_bigram, metavar="N")
    parser.add_argument("--min-views", type=_positive, default=limits.min_views, metavar="N")
    parser.add_argument("--max-entries", type=_positive, default=limits.max_entries, metavar="N")


def _entries(args) -> int:
    if args.output.is_dir():
        raise UserError(f"--output {args.output}: is a folder; give a file")
    limits = listing.Limits(
        args.min_unigram, args.min_pmi, args.min_bigram, args.min_views, args.max_entries
    )
    entries, sources = listing.build(
        args.words, args.unigrams, args.bigrams, args.pageviews, limits, args.project
    )
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_text(args.output, "".join(f"{entry}\n" for entry in entries))
    print(f"{'source':10} {'read':>12} {'over limit':>12} {'taken':>12}")
    for source in sources:
        print(f"{source.name:10} {source.read:>12,} {source.enough:>12,} {source.taken:>12,}")
    never = sum(not matching.can_match(entry) for entry in entries)
    print(
        f"{len(entries):,} entries in {args.output}"
        + (f"; {never:,} of them can match no text: a mark without spaces" if never else "")
    )
    return 0


def _with_progress(items: Iterable[str], label: str, unit: str) -> Iterator[str]:
    progress = Progress(None, label, unit)
    number = 0
    for number, item in enumerate(items, 1):
        yield item
        if number % 1000 == 0:
            progress.update(1000)
    progress.update(number % 1000)
    progress.close()


def _match_flags(parser: cli.ArgumentParser) -> None:
    _add_input(parser)
    parser.add_argument(
        "--entries",
        type=Path,
        required=True,
        metavar="FILE",
        help="one in each line, or a JSON list (*.json)",
    )
    _add_workers(parser)


def _match(args) -> int:
    from webssl_jax.curation import passes  # a command imports what it needs, --help none of it

    progress = _Progress("matching")
    summary = passes.match(args.input, args.entries, args.output, args.workers, progress)
    progress.close()
    print((args.output / "match.txt").read_text("utf-8"), end="")
    _tell_damaged(summary["damaged"], args.output / "match.json")
    return 0


def _balance_flags(parser: cli.ArgumentParser) -> None:
    parser.add_argument(
        "--index", type=Path, required=True, metavar="DIR", help="what match has written"
    )
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument(
        "--threshold",
        type=_positive,
        metavar="T",
        help="captions that each frequent entry asks for; MetaCLIP: 20000 of its pool of 400M "
        "pairs, 170000 of 2.5B",
    )
    how.add_argument(
        "--tail-share",
        type=_share,
        metavar="P",
        help="choose the threshold at which the tail holds this share of all matches",
    )
    parser.add_argument("--seed", type=_natural, default=0)
    parser.add_argument("--split", default="train", type=_name, help="first part of shards' names")
    _add_workers(parser)


def _balance(args) -> int:
    from webssl_jax.curation import passes

    progress = _Progress("balancing")
    summary = passes.balance(
        args.index,
        args.output,
        args.split,
        args.threshold,
        args.tail_share,
        args.seed,
        args.workers,
        progress,
    )
    progress.close()
    print((args.output / f"{args.split}.table.txt").read_text("utf-8"), end="")
    _tell_damaged(summary["after"]["damaged"], args.output / f"{args.split}.summary.json")
    return 0


def _score_flags(parser: cli.ArgumentParser) -> None:
    _add_input(parser)
    parser.add_argument(
        "--scorer",
        required=True,
        metavar="NAME[:option=value,...]",
        help=f"{', '.join(scorers.SCORERS)}, or module:Class of your own",
    )
    parser.add_argument(
        "--workers", type=_positive, metavar="N", help="1 of smolvlm, else one a core"
    )


def _score(args) -> int:
    from webssl_jax.curation import scores

    scorer = scorers.make(args.scorer)
    progress = _Progress("scoring")
    workers = args.workers or getattr(scorer, "workers", os.cpu_count())
    summary = scores.score(args.input, scorer, args.output, workers, progress)
    progress.close()
    print(f"{'column':20} {'least':>12} {'mean':>12} {'most':>12}")
    for name, figures in summary["columns"].items():
        print(f"{name:20} " + " ".join(f"{figures[k]:>12.4g}" for k in ("least", "mean", "most")))
    problems = ", ".join(f"{count:,} {kind}" for kind, count in summary["problems"].items())
    print(f"{summary['records']:,} records, {problems or 'all scored'}, in {args.output}")
    return 0


def _fit_head_flags(parser: cli.ArgumentParser) -> None:
    parser.add_argument("--scores", type=Path, required=True, metavar="DIR")
    parser.add_argument("--column", required=True, help="of the scores: what the head shall say")
    parser.add_argument(
        "--above", type=float, required=True, metavar="X", help="records above are positives"
    )
    parser.add_argument("--model", required=True, help="a run, or a weight file or folder")
    parser.add_argument("--feature", choices=("cls", "patches"), default="cls")
    parser.add_argument(
        "--features",
        type=Path,
        metavar="DIR",
        help="of webssl features for these shards; made if not there (default: OUTPUT.features)",
    )


def _fit_head(args) -> int:
    from webssl_jax.curation import heads  # with jax, which the workers of match need not import

    target = heads.Target(args.scores, args.column, args.above)
    figures = heads.fit(target, args.model, args.output, args.features, args.feature)
    low, high = figures["interval"]
    print(
        f"{figures['target']}: {figures['positives']:,} of {figures['records']:,} records, "
        f"{figures['left_out']:,} left out; area under the ROC curve {figures['auc']:.4f} "
        f"({low:.4f} to {high:.4f}, 95 %) on {figures['held_out']:,} held out"
    )
    print(f"  {args.output}  for --scorer head:file={args.output},model={args.model}")
    return 0


def _select_flags(parser: cli.ArgumentParser) -> None:
    parser.add_argument(
        "--scores", nargs="+", type=Path, required=True, metavar="DIR", help="of the same shards"
    )
    parser.add_argument("--where", metavar="CONDITION", help="as in 'width >= 256 and edges > 0.1'")
    parser.add_argument(
        "--top-share", type=_share, metavar="P", help="the share of the pool to keep, by --by"
    )
    parser.add_argument("--by", metavar="COLUMN", help="keep its largest scores")


def _select(args) -> int:
    from webssl_jax.curation import selecting

    if (args.top_share is None) != (args.by is None):
        raise UserError("--top-share and --by: give both, or only --where")
    if args.where is None and args.by is None:
        raise UserError("nothing to select by: give --where, or --top-share and --by")
    where = selecting.Condition(args.where) if args.where else None
    figures = selecting.select(args.scores, args.output, where, args.top_share, args.by)
    threshold = figures.get("threshold")
    print(
        f"{figures['kept']:,} of {figures['records']:,} records kept "
        f"({figures['kept'] / figures['records']:.2%}), {figures['dropped']:,} dropped, "
        f"{figures['without_score']:,} without a score"
        + (f"; {args.by} from {threshold:.6g} on" if threshold is not None else "")
    )
    return _tell_selection(args.output)


def _features_flags(parser: cli.ArgumentParser) -> None:
    parser.add_argument(
        "--features", type=Path, required=True, metavar="DIR", help="what webssl features has made"
    )
    parser.add_argument(
        "--input", nargs="+", required=True, metavar="PATTERN", help="the shards it was made of"
    )
    parser.add_argument("--feature", default="cls", help="column of the features (default: cls)")


def _dedup_flags(parser: cli.ArgumentParser) -> None:
    _features_flags(parser)
    parser.add_argument(
        "--threshold", type=_share, required=True, metavar="T", help="of the cosine similarity"
    )
    parser.add_argument("--scores", type=Path, metavar="DIR", help="of the same shards")
    parser.add_argument(
        "--by", metavar="COLUMN", help="of a group the largest stays, not the first"
    )
    parser.add_argument(
        "--exact",
        type=_positive,
        default=50_000,
        metavar="N",
        help="up to so many records all pairs are compared (default: 50,000)",
    )
    parser.add_argument(
        "--probes",
        type=_positive,
        default=4,
        metavar="N",
        help="cells of the index that a record is looked for in (default: 4)",
    )
    parser.add_argument("--seed", type=_natural, default=0)


def _dedup(args) -> int:
    from webssl_jax.curation import near_duplicates, scores
    from webssl_jax.curation.feature_pool import FeaturePool

    if (args.scores is None) != (args.by is None):
        raise UserError("--scores and --by: give both, or none")
    pool = FeaturePool.open(args.features, args.input, args.feature)
    better = None
    if args.scores:
        if tuple(scores.shards(args.scores)) != pool.shards:
            raise UserError(f"--scores {args.scores}: are of other shards than --input")
        better = scores.numbers([args.scores], args.by)
    rules = near_duplicates.Rules(args.threshold, args.exact, args.probes, args.seed)
    progress = _Progress("comparing")
    figures = near_duplicates.dedup(pool, args.output, rules, better, progress)
    progress.close()
    recall = figures["recall"]
    print(
        f"{_kept(figures)}; {figures['groups']:,} groups, the largest of "
        f"{figures['largest_group']:,}; "
        + (
            "all pairs compared"
            if figures["cells"] == 1
            else f"recall of the index {'unknown' if recall is None else f'{recall:.4f}'}, on "
            f"{figures['recall_pairs']:,} pairs"
        )
    )
    return _tell_selection(args.output)


def _cluster_flags(parser: cli.ArgumentParser) -> None:
    _features_flags(parser)
    parser.add_argument(
        "--levels", required=True, type=_numbers, metavar="K,K", help="clusters, as in 1000,50"
    )
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--share", type=_share, metavar="P", help="of the records to keep")
    how.add_argument("--number", type=_positive, metavar="N", help="of records to keep")
    parser.add_argument("--seed", type=_natural, default=0)


def _cluster(args) -> int:
    from webssl_jax.curation import by_cluster
    from webssl_jax.curation.feature_pool import FeaturePool

    pool = FeaturePool.open(args.features, args.input, args.feature)
    budget = args.number or round(args.share * len(pool))
    figures = by_cluster.cluster(pool, args.output, args.levels, budget, args.seed)
    print(_kept(figures))
    for number, level in enumerate(figures["by_level"], 1):
        print(
            f"level {number}: {level['clusters']:,} clusters, {level['empty']:,} empty; largest "
            f"{level['largest']:,}, {level['largest_kept']:,} kept; median {level['median']:,g}; "
            f"smallest {level['smallest']:,}, {level['smallest_kept']:,} kept"
        )
    return _tell_selection(args.output)


def _retrieve_flags(parser: cli.ArgumentParser) -> None:
    _features_flags(parser)
    parser.add_argument(
        "--targets", type=Path, required=True, metavar="DIR", help="features of the wanted images"
    )
    parser.add_argument(
        "--target-input", nargs="+", required=True, metavar="PATTERN", help="their shards"
    )
    parser.add_argument(
        "--nearest", type=_positive, default=4, metavar="N", help="records of a target (default 4)"
    )
    parser.add_argument(
        "--above", type=float, default=-1.0, metavar="X", help="only from this cosine similarity on"
    )


def _retrieve(args) -> int:
    from webssl_jax.curation import retrieving
    from webssl_jax.curation.feature_pool import FeaturePool

    pool = FeaturePool.open(args.features, args.input, args.feature)
    targets = FeaturePool.open(args.targets, args.target_input, args.feature)
    progress = _Progress("comparing")
    figures = retrieving.retrieve(pool, targets, args.output, args.nearest, args.above, progress)
    progress.close()
    print(
        f"{_kept(figures)}; of {figures['target_images']:,} targets, {figures['wanted_once']:,} "
        f"records of one only, at most {figures['most_wanted']:,} of one record; mean similarity "
        f"of the nearest {figures['similarity_of_nearest']:.3f}, the least taken "
        f"{figures['least_similarity']:.3f}"
    )
    return _tell_selection(args.output)


def _kept(figures: dict) -> str:
    return (
        f"{figures['kept']:,} of {figures['records']:,} records kept "
        f"({figures['kept'] / figures['records']:.2%}), {figures['dropped']:,} dropped, "
        f"{figures['without_features']:,} without features"
    )


def _tell_selection(output: Path) -> int:
    print(f"  {output / 'selection.parquet'}  for config.mixture.NAME.selection")
    return 0


class _Progress:
    """A progress line from what the passes call: first (done, total), then records more."""

    def __init__(self, label: str):
        self._label, self._line = label, None

    def __call__(self, records: int, total: int | None = None) -> None:
        if total is not None:
            self._line = Progress(total, self._label, "records", done=records)
        else:
            self._line.update(records)

    def close(self) -> None:
        self._line.close()


def _tell_damaged(damaged: dict, where: Path) -> None:
    if count := damaged["count"]:
        records = "1 damaged record" if count == 1 else f"{count:,} damaged records"
        named = damaged["records"][0] + (", ..." if count > 1 else "")
        print(f'{records} left out ({named}); see "damaged" in {where}', file=sys.stderr)


def _add_input(parser: cli.ArgumentParser) -> None:
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="PATTERN",
        help="shards: globs, files, folders, or corpus:train",
    )


def _add_workers(parser: cli.ArgumentParser) -> None:
    parser.add_argument("--workers", type=_positive, default=os.cpu_count(), metavar="N")


COMMANDS = {
    "count": ("count words and pairs of words in texts", _count_flags, _count),
    "entries": ("make a list of entries from counts", _entries_flags, _entries),
    "match": ("which entries the captions of shards hold", _match_flags, _match),
    "score": ("score records, each shard once", _score_flags, _score),
    "fit-head": ("teach features of a model what a scorer says", _fit_head_flags, _fit_head),
    "select": ("choose records by their scores", _select_flags, _select),
    "dedup": ("of near-duplicates by features keep one", _dedup_flags, _dedup),
    "cluster": ("cluster features, and sample evenly", _cluster_flags, _cluster),
    "retrieve": ("of records take the nearest to wanted images", _retrieve_flags, _retrieve),
    "balance": ("write the sampled records of matched shards", _balance_flags, _balance),
}


def _positive(text: str) -> int:
    return _checked(int(text), lambda value: value >= 1)


def _natural(text: str) -> int:
    return _checked(int(text), lambda value: value >= 0)


def _share(text: str) -> float:
    return _checked(float(text), lambda value: 0 < value < 1)


def _numbers(text: str) -> list[int]:
    return [_positive(part) for part in text.split(",")]


def _checked(value, test):
    if not test(value):
        raise ValueError  # argparse turns it into its own one-line error
    return value


def _name(text: str) -> str:
    return _checked(text, lambda name: name.replace("_", "").isalnum())


# argparse names the type in its message: "invalid positive whole number value: '0'".
_positive.__name__, _natural.__name__ = "positive whole number", "whole number"
_numbers.__name__ = "list of whole numbers"
_share.__name__, _name.__name__ = "share (above 0, below 1)", "name (letters, digits, _)"


if __name__ == "__main__":
    cli.run(main)
