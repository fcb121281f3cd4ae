#!/usr/bin/env python3
"""Scores answers to benchmarks of visual question answering, as they lie on disk.

    python tools/score_vqa.py NAME=ANSWERS [NAME=ANSWERS ...] [--beside "Web-DINO 7B"]
        [--mme perception] [--output DIR] [--benchmarks DIR]

ANSWERS is a folder with a file BENCHMARK.jsonl for each of the sixteen benchmarks, or for some; no
model is asked again. Printed: each benchmark, the categories that are whole and the mean, with
intervals by bootstrap; what each model differs from the first by, paired question by question;
which benchmarks were answered in part; and published rows (--beside, part of a name). Written to
DIR: scores.json, radar.png, bars.png; with --benchmarks, a folder with the downloaded data set
BENCHMARK in each folder, a sheet of questions with answers and verdicts (NAME_BENCHMARK.png); and
answers to the test questions of mmbench_test and docvqa_test, of which only a server has the truth,
in its format.

Exit codes: 0 done · 2 bad input or a full disk, one line.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping

from webssl_jax import cli
from webssl_jax.errors import UserError
from webssl_jax.evaluators.vqa.tasks.mme import MME, READINGS
from webssl_jax.files import make_folder, write_bytes, write_json


def _parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("answers", nargs="+", metavar="NAME=ANSWERS")
    parser.add_argument("--output", help="folder for scores, pictures and files for servers")
    parser.add_argument("--beside", action="append", default=[], help="a published encoder")
    parser.add_argument("--benchmarks", help="folder of downloaded data sets, for sheets")
    parser.add_argument("--mme", choices=READINGS, default=MME().reading, help="its headline")
    return parser


cli.help_early(_parser, __name__)

from webssl_jax.evaluators.vqa import pictures
from webssl_jax.evaluators.vqa.averages import Published, published
from webssl_jax.evaluators.vqa.rows import read_questions
from webssl_jax.evaluators.vqa.submissions import Submits
from webssl_jax.evaluators.vqa.table import figures, gaps, table
from webssl_jax.evaluators.vqa.task import Answer, Task, TaskScore, read_answers
from webssl_jax.evaluators.vqa.tasks import SIXTEEN, TASKS
from webssl_jax.visuals import save_png

Answers = Mapping[str, Mapping[str, list[Answer]]]


def main(argv: list[str] | None = None) -> int:
    """The entry point. Returns an exit code of cli.py."""
    args = _parser().parse_args(argv)
    if args.benchmarks and not args.output:
        raise UserError("--benchmarks: sheets need a folder; give --output DIR too")
    tasks = TASKS | {"mme": MME(args.mme)}
    kept = dict(_read(text) for text in args.answers)
    if len(kept) < len(args.answers):
        raise UserError("two models have the same name")
    judged = {task.name for task in SIXTEEN}
    models = {
        name: {one: tasks[one].score(said) for one, said in answers.items() if one in judged}
        for name, answers in kept.items()
    }
    models = {name: scores for name, scores in models.items() if scores}
    if models:
        print(table(models, _beside(args.beside)))
    if args.output:
        output = make_folder(pathlib.Path(args.output))
        _hand_in(kept, output)
        if models:
            _write(models, output)
        if args.benchmarks:
            _sheets(tasks, kept, models, pathlib.Path(args.benchmarks), output)
    return 0


def _read(text: str) -> tuple[str, dict[str, list[Answer]]]:
    name, equals, folder = text.partition("=")
    if not (name and equals and folder) or "/" in name:  # it is a part of files' names
        raise UserError(f"{text}: write NAME=ANSWERS, a name without /")
    files = {task: pathlib.Path(folder, f"{task}.jsonl") for task in TASKS}
    found = {task: read_answers(path) for task, path in files.items() if path.is_file()}
    if not found:
        raise UserError(f"{folder}: has no answers, as {next(iter(files.values())).name}")
    return name, found


def _beside(asked: list[str]) -> list[Published]:
    rows = []
    for name in asked:
        found = [row for row in published() if name.lower() in row.model.lower()]
        if not found:
            known = ", ".join(dict.fromkeys(row.model for row in published()))
            raise UserError(f"--beside {name}: no such encoder in the paper; it has {known}")
        rows += found
    return rows


def _write(models: Mapping[str, Mapping[str, TaskScore]], output: pathlib.Path) -> None:
    found = {
        "models": {
            name: {
                "figures": {line: one._asdict() for line, one in lines.items()},
                "metrics": {task: score.metrics for task, score in models[name].items()},
                "questions": {task: len(score.verdicts) for task, score in models[name].items()},
            }
            for name, lines in figures(models).items()
        },
        "differences": {
            pair: {line: one._asdict() for line, one in lines.items()}
            for pair, lines in gaps(models).items()
        },
    }
    write_json(output / "scores.json", found)
    headlines = {
        name: {task: score.items.headline() for task, score in scores.items()}
        for name, scores in models.items()
    }
    save_png(output / "radar.png", pictures.radar(headlines))
    save_png(output / "bars.png", pictures.bars(models))
    print(f"\n{output}  scores.json, radar.png, bars.png")


def _hand_in(kept: Answers, output: pathlib.Path) -> None:
    for name, answers in kept.items():
        for task, said in answers.items():
            judge = TASKS[task]
            if task.endswith("_test") and isinstance(judge, Submits):
                file = judge.submission(said)
                write_bytes(output / f"{name}_{file.name}", file.content)
                print(f"{output / f'{name}_{file.name}'}  hand it in at {file.address}")


def _sheets(
    tasks: Mapping[str, Task],
    kept: Answers,
    models: Mapping[str, Mapping[str, TaskScore]],
    benchmarks: pathlib.Path,
    output: pathlib.Path,
) -> None:
    for name, scores in models.items():
        for task, score in scores.items():
            if not (benchmarks / task).is_dir():
                print(f"{benchmarks / task}  is not there: no sheet of {task}")
                continue
            keys = set(pictures.picked(list(score.verdicts)))
            asked = read_questions(tasks[task], benchmarks / task)
            shown = [question for question in asked if question.key in keys]
            if not shown:
                print(f"{benchmarks / task}  has none of these questions: no sheet of {task}")
                continue
            sheet = pictures.answer_sheet(tasks[task], shown, kept[name][task], score)
            save_png(output / f"{name}_{task}.png", sheet)
            print(f"{output / f'{name}_{task}.png'}  {len(shown)} questions")


if __name__ == "__main__":
    cli.run(main)
