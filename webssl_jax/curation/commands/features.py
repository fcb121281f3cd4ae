"""Selections by features: near-duplicates, clusters, retrieval."""

from __future__ import annotations

import sys
from typing import Any

from webssl_jax import cli
from webssl_jax.config import UserError
from webssl_jax.curation import expressions, scores
from webssl_jax.curation.commands import flags
from webssl_jax.data.converter import buckets

_SUSPECT = 0.1  # of the records in one group of near-duplicates


def _features_flags(parser: cli.ArgumentParser) -> None:
    parser.add_argument(
        "--features",
        type=buckets.place,
        required=True,
        metavar="DIR",
        help="what webssl features has made",
    )
    parser.add_argument(
        "--input", nargs="+", required=True, metavar="PATTERN", help="the shards it was made of"
    )
    parser.add_argument("--feature", default="cls", help="column of the features (default: cls)")


def _dedup_flags(parser: cli.ArgumentParser) -> None:
    _features_flags(parser)
    parser.add_argument(
        "--threshold", type=flags.share, required=True, metavar="T", help="of the cosine similarity"
    )
    parser.add_argument("--scores", type=buckets.place, metavar="DIR", help="of the same shards")
    parser.add_argument(
        "--by",
        metavar="COLUMN",
        help="of a group the largest stays, not the first; or of several, as 'a + b'",
    )
    parser.add_argument(
        "--exact",
        type=flags.positive,
        default=50_000,
        metavar="N",
        help="up to so many records all pairs are compared (default: 50,000)",
    )
    parser.add_argument(
        "--probes",
        type=flags.positive,
        default=4,
        metavar="N",
        help="cells of the index that a record is looked for in (default: 4)",
    )
    parser.add_argument("--seed", type=flags.natural, default=0)
    flags.add_runner(parser)


def _dedup(args: Any) -> int:
    from webssl_jax.curation import near_duplicates
    from webssl_jax.curation.feature_pool import FeaturePool

    if (args.scores is None) != (args.by is None):
        raise UserError("--scores and --by: give both, or none")
    pool = FeaturePool.open(args.features, args.input, args.feature)
    better = None
    if args.scores:
        if tuple(scores.shards(args.scores)) != pool.shards:
            raise UserError(f"--scores {args.scores}: are of other shards than --input")
        better = expressions.numbers(args.scores, args.by, "--by")
    rules = near_duplicates.Rules(args.threshold, args.exact, args.probes, args.seed)
    progress = flags.ProgressLine("comparing")
    figures = near_duplicates.dedup(
        pool, args.output, rules, better, progress, flags.runner_of(args)
    )
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
    if figures["largest_group"] > _SUSPECT * figures["records"]:
        print(
            f"warning: one group has {figures['largest_group'] / figures['records']:.0%} of the "
            f"records: --threshold {args.threshold:g} is too low for features of this model; see "
            "groups.png",
            file=sys.stderr,
        )
    return flags.tell_selection(args)


def _cluster_flags(parser: cli.ArgumentParser) -> None:
    _features_flags(parser)
    parser.add_argument(
        "--levels", required=True, type=flags.numbers, metavar="K,K", help="clusters, as in 1000,50"
    )
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--share", type=flags.share, metavar="P", help="of the records to keep")
    how.add_argument("--number", type=flags.positive, metavar="N", help="of records to keep")
    parser.add_argument("--seed", type=flags.natural, default=0)


def _cluster(args: Any) -> int:
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
    return flags.tell_selection(args)


def _retrieve_flags(parser: cli.ArgumentParser) -> None:
    _features_flags(parser)
    parser.add_argument(
        "--targets",
        type=buckets.place,
        required=True,
        metavar="DIR",
        help="features of the wanted images",
    )
    parser.add_argument(
        "--target-input", nargs="+", required=True, metavar="PATTERN", help="their shards"
    )
    parser.add_argument(
        "--nearest",
        type=flags.positive,
        default=4,
        metavar="N",
        help="records of a target (default 4)",
    )
    parser.add_argument(
        "--above", type=float, default=-1.0, metavar="X", help="only from this cosine similarity on"
    )


def _retrieve(args: Any) -> int:
    from webssl_jax.curation import retrieving
    from webssl_jax.curation.feature_pool import FeaturePool

    pool = FeaturePool.open(args.features, args.input, args.feature)
    targets = FeaturePool.open(args.targets, args.target_input, args.feature)
    progress = flags.ProgressLine("comparing")
    figures = retrieving.retrieve(pool, targets, args.output, args.nearest, args.above, progress)
    progress.close()
    print(
        f"{_kept(figures)}; of {figures['target_images']:,} targets, {figures['wanted_once']:,} "
        f"records of one only, at most {figures['most_wanted']:,} of one record; mean similarity "
        f"of the nearest {figures['similarity_of_nearest']:.3f}, the least taken "
        f"{figures['least_similarity']:.3f}"
    )
    return flags.tell_selection(args)


def _kept(figures: dict) -> str:
    return (
        f"{figures['kept']:,} of {figures['records']:,} records kept "
        f"({figures['kept'] / figures['records']:.2%}), {figures['dropped']:,} dropped, "
        f"{figures['without_features']:,} without features"
    )


COMMANDS = {
    "dedup": flags.Command("of near-duplicates by features keep one", _dedup_flags, _dedup),
    "cluster": flags.Command("cluster features, and sample evenly", _cluster_flags, _cluster),
    "retrieve": flags.Command(
        "of records take the nearest to wanted images", _retrieve_flags, _retrieve
    ),
}
