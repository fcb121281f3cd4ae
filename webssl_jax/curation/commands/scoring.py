"""Scores of records, and selections by them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from webssl_jax import cli
from webssl_jax.config import UserError
from webssl_jax.curation import expressions, scorers, scores, selecting
from webssl_jax.curation import text_rich as filters
from webssl_jax.curation.commands import flags
from webssl_jax.data.converter import buckets, runners


def _score_flags(parser: cli.ArgumentParser) -> None:
    flags.add_input(parser)
    parser.add_argument(
        "--scorer",
        required=True,
        metavar="NAME[:option=value,...]",
        help=f"{', '.join(scorers.SCORERS)}, or module:Class of your own",
    )
    flags.add_runner(parser, "1 of head and smolvlm, else one a core")


def _score(args: Any) -> int:
    scorer = scorers.make(args.scorer)
    progress = flags.ProgressLine("scoring")
    runner = flags.runner_of(args, getattr(scorer, "workers", None))
    summary = scores.score(args.input, scorer, args.output, runner, progress)
    progress.close()
    print(f"{'column':20} {'least':>12} {'mean':>12} {'most':>12}")
    for name, figures in summary["columns"].items():
        print(f"{name:20} " + " ".join(f"{figures[k]:>12.4g}" for k in ("least", "mean", "most")))
    problems = ", ".join(f"{count:,} {kind}" for kind, count in summary["problems"].items())
    print(f"{summary['records']:,} records, {problems or 'all scored'}, in {args.address}")
    return 0


def _fit_head_flags(parser: cli.ArgumentParser) -> None:
    parser.add_argument("--scores", type=buckets.place, required=True, metavar="DIR")
    parser.add_argument(
        "--column", required=True, help="of the scores, or as 'a + b': what the head shall say"
    )
    parser.add_argument(
        "--above", type=float, required=True, metavar="X", help="records above are positives"
    )
    parser.add_argument("--model", required=True, help="a run, or a weight file or folder")
    parser.add_argument("--feature", choices=("cls", "patches"), default="cls")
    parser.add_argument(
        "--features",
        type=buckets.place,
        metavar="DIR",
        help="of webssl features for these shards; made if not there (default: OUTPUT.features)",
    )


def _fit_head(args: Any) -> int:
    from webssl_jax.curation import heads  # with jax, which others need not import

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
        "--scores",
        nargs="+",
        type=buckets.place,
        required=True,
        metavar="DIR",
        help="of the same shards",
    )
    parser.add_argument("--where", metavar="CONDITION", help="as in 'width >= 256 and edges > 0.1'")
    parser.add_argument(
        "--top-share", type=flags.share, metavar="P", help="the share of the pool to keep, by --by"
    )
    parser.add_argument(
        "--by", metavar="COLUMN", help="keep its largest scores; or of several, as 'a + b / 2'"
    )


def _select(args: Any) -> int:
    if (args.top_share is None) != (args.by is None):
        raise UserError("--top-share and --by: give both, or only --where")
    if args.where is None and args.by is None:
        raise UserError("nothing to select by: give --where, or --top-share and --by")
    where = expressions.Condition(args.where) if args.where is not None else None
    figures = selecting.select(args.scores, args.output, where, args.top_share, args.by, args.named)
    threshold = figures.get("threshold")
    print(
        f"{figures['kept']:,} of {figures['records']:,} records kept "
        f"({figures['kept'] / figures['records']:.2%}), {figures['dropped']:,} dropped, "
        f"{figures['without_score']:,} without a score"
        + (f"; {args.by} from {threshold:.6g} on" if threshold is not None else "")
        + _drawn(figures)
    )
    return flags.tell_selection(args)


def _drawn(figures: Mapping[str, Any]) -> str:
    """What is kept by chance, because others have the same score."""
    alike, own = figures.get("alike", 0), figures.get("alike_kept", 0)
    return f"; {own:,} of them drawn from {alike:,} of equal score" if own < alike else ""


def _text_rich_flags(parser: cli.ArgumentParser) -> None:
    flags.add_input(parser)
    parser.add_argument(
        "--by",
        nargs="+",
        required=True,
        metavar="WAY[:option=value,...]",
        help="some of detector, features:model=MODEL (heads that another way teaches), and "
        "smolvlm:model=PATH_OR_NAME",
    )
    for name, default in (("light", filters.LIGHT), ("heavy", filters.HEAVY)):
        parser.add_argument(
            f"--{name}",
            type=flags.share,
            default=default,
            metavar="P",
            help=f"share of the pool to keep (the paper's: {default:g})",
        )
    parser.add_argument(
        "--taught-on",
        nargs="+",
        default=[],
        metavar="PATTERN",
        help="shards of --input that the heads of features learn from (default: all)",
    )
    flags.add_runner(parser, "1 of smolvlm, else one a core")


def _text_rich(args: Any) -> int:
    asked = filters.ask(args.input, args.by, args.output, args.light, args.heavy, args.taught_on)
    progress = flags.ProgressLine("scoring")

    def runner_of(scorer: scorers.Scorer) -> runners.Runner:
        return flags.runner_of(args, getattr(scorer, "workers", None))

    figures = filters.text_rich(asked, runner_of, progress)
    progress.close()
    for way, parts in figures["ways"].items():
        for part, one in parts.items():
            print(
                f"{way:10} {part:6} {one['kept']:>12,} of {one['records']:,} records "
                f"({one['kept'] / one['records']:.2%}), {one['without_score']:,} without a score"
                + _drawn(one)
            )
    print(f"  {args.output}/WAY/light/selection.parquet, .../heavy/...  for config.mixture")
    print(f"  {args.output}/index.html  the report")
    return 0


COMMANDS = {
    "text-rich": flags.Command(
        "choose images with text by the paper's two filters, in any of three ways",
        _text_rich_flags,
        _text_rich,
        output=buckets.here,
    ),
    "score": flags.Command("score records, each shard once", _score_flags, _score),
    "fit-head": flags.Command(
        "teach features of a model what a scorer says",
        _fit_head_flags,
        _fit_head,
        output=buckets.here,
    ),
    "select": flags.Command(
        "choose records by their scores", _select_flags, _select, resumable=False
    ),
}
