"""Captions: counts of words, lists of entries, and MetaCLIP's curation by them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from webssl_jax import cli
from webssl_jax.config import UserError
from webssl_jax.curation import entries as listing
from webssl_jax.curation import matching, ngrams, passes
from webssl_jax.curation.commands import flags
from webssl_jax.data.converter import buckets
from webssl_jax.files import write_text


def _count_flags(parser: cli.ArgumentParser) -> None:
    parser.add_argument(
        "--text", nargs="+", type=Path, default=[], metavar="FILE", help="a text in each line; .gz"
    )
    parser.add_argument(
        "--captions", nargs="+", default=[], metavar="PATTERN", help="shards of captioned records"
    )
    flags.add_runner(parser)


def _count(args: Any) -> int:
    if not (args.text or args.captions):
        raise UserError("nothing to count: give --text or --captions")
    if args.output.exists() and not args.output.is_dir():
        raise UserError(f"--output {args.output}: is a file; give a folder")
    progress = flags.ProgressLine("counting", "files")
    words, pairs, damaged = ngrams.count(
        args.text, args.captions, args.output, flags.runner_of(args), progress
    )
    progress.close()
    print(f"{words:,} different words, {pairs:,} different pairs, in {args.address}")
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
    parser.add_argument(
        "--min-unigram", type=flags.positive, default=limits.min_unigram, metavar="N"
    )
    parser.add_argument(
        "--min-pmi",
        type=float,
        default=limits.min_pmi,
        metavar="X",
        help="pointwise mutual information of a pair, in bits",
    )
    parser.add_argument("--min-bigram", type=flags.positive, default=limits.min_bigram, metavar="N")
    parser.add_argument("--min-views", type=flags.positive, default=limits.min_views, metavar="N")
    parser.add_argument(
        "--max-entries", type=flags.positive, default=limits.max_entries, metavar="N"
    )


def _entries(args: Any) -> int:
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
        f"{len(entries):,} entries in {args.address}"
        + (f"; {never:,} of them can match no text: a mark without spaces" if never else "")
    )
    return 0


def _match_flags(parser: cli.ArgumentParser) -> None:
    flags.add_input(parser)
    parser.add_argument(
        "--entries",
        type=Path,
        required=True,
        metavar="FILE",
        help="one in each line, or a JSON list (*.json)",
    )
    flags.add_runner(parser)


def _match(args: Any) -> int:
    progress = flags.ProgressLine("matching")
    summary = passes.match(args.input, args.entries, args.output, flags.runner_of(args), progress)
    progress.close()
    print((args.output / "match.txt").read_text("utf-8"), end="")
    flags.tell_damaged(summary["damaged"], f"{args.address}/match.json")
    return 0


def _balance_flags(parser: cli.ArgumentParser) -> None:
    parser.add_argument(
        "--index", type=buckets.place, required=True, metavar="DIR", help="what match has written"
    )
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument(
        "--threshold",
        type=flags.positive,
        metavar="T",
        help="captions that each frequent entry asks for; MetaCLIP: 20000 of its pool of 400M "
        "pairs, 170000 of 2.5B",
    )
    how.add_argument(
        "--tail-share",
        type=flags.share,
        metavar="P",
        help="choose the threshold at which the tail holds this share of all matches",
    )
    parser.add_argument("--seed", type=flags.natural, default=0)
    parser.add_argument(
        "--split", default="train", type=flags.name, help="first part of shards' names"
    )
    flags.add_runner(parser)


def _balance(args: Any) -> int:
    progress = flags.ProgressLine("balancing")
    summary = passes.balance(
        args.index,
        args.output,
        args.split,
        args.threshold,
        args.tail_share,
        args.seed,
        flags.runner_of(args),
        progress,
    )
    progress.close()
    print((args.output / f"{args.split}.table.txt").read_text("utf-8"), end="")
    flags.tell_damaged(summary["after"]["damaged"], f"{args.address}/{args.split}.summary.json")
    return 0


COMMANDS = {
    "count": flags.Command("count words and pairs of words in texts", _count_flags, _count),
    "entries": flags.Command(
        "make a list of entries from counts", _entries_flags, _entries, False, buckets.here
    ),
    "match": flags.Command("which entries the captions of shards hold", _match_flags, _match),
    "balance": flags.Command(
        "write the sampled records of matched shards", _balance_flags, _balance
    ),
}
