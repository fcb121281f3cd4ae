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

and CHOSEN/selection.parquet is what training takes: config.mixture.NAME.selection. The paper's two
filters, images with text and charts, tables and documents, are one command, by a text detector, by
heads on features, or by SmolVLM2:

    python tools/curate.py text-rich --input 'SHARDS/train-*' --by detector --output TEXT

What a scorer says of some records, a linear head on features of a model can learn to say of others:

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

import sys

from webssl_jax import cli
from webssl_jax.curation.commands import COMMANDS, flags


def main(argv: list[str] | None = None) -> int:
    """The entry point. Returns an exit code of cli.py."""
    parser = cli.ArgumentParser(description=__doc__)
    parsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        mine = parsers.add_parser(name, help=command.help)
        command.add_flags(mine)
        if command.output is not None:
            mine.add_argument("--output", type=command.output, required=True)
    args, unknown = parser.parse_known_args(argv)
    if unknown:  # said by the subparser, so that it suggests its own flags
        parsers.choices[args.command].error(f"unrecognized arguments: {' '.join(unknown)}")
    command = COMMANDS[args.command]
    try:
        with flags.folders(args):
            return command.run(args)
    except KeyboardInterrupt:
        print(f"stopped{'; the same command continues' * command.resumable}", file=sys.stderr)
        return cli.EXIT_INTERRUPTED


if __name__ == "__main__":
    cli.run(main)
