"""A row of kind ``vqa``: a model of ``configs/vqa.py`` is asked the questions of a benchmark, and
its answers are judged.

The answers lie in ``eval/answers/MODEL/CONDITION/TASK.jsonl``, and a rule judges them from there:
where a rule changes, or a run was killed, nobody is asked again, and ``webssl score_vqa`` makes the
table of all benchmarks of them. Beside the model stand the same model without the image, and with
the image of another question, on the same questions: how much of a score needs no look.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterator

from webssl_jax.config import UserError
from webssl_jax.errors import suggest
from webssl_jax.evaluators import datasets
from webssl_jax.evaluators.base import LANGUAGE
from webssl_jax.evaluators.features import Cache
from webssl_jax.evaluators.outcome import Outcome
from webssl_jax.evaluators.vqa import ask
from webssl_jax.evaluators.vqa.rows import read_questions
from webssl_jax.evaluators.vqa.shards import ShardQuestions, chance
from webssl_jax.evaluators.vqa.task import Answer, Question, Task
from webssl_jax.evaluators.vqa.tasks import TASKS
from webssl_jax.model import Model
from webssl_jax.weights.networks import Networks

SHARDS = "shards"
PROTOCOL = 1  # raised whenever the same answers would get another figure
FOLDER = "answers"
_ON_A_SERVER = "_test"  # how the names of tasks end whose truth is there
_WORDS = {ask.BLIND: "blind", ask.SHUFFLED: "other images"}


@dataclasses.dataclass(frozen=True)
class VQAOptions:
    """The keys of a row.

    task: a benchmark of ``vqa/tasks``, or ``shards``: records with the annotation ``questions``.
    data: the folder that the benchmark was downloaded to; or the shards. max_questions: the first
    of them, and one more where it is the second of a pair; 0 for all. kind_of_answer: of shards,
    ``all`` questions, or ``open``: those whose answer is neither yes nor no. batch: questions a
    call. new_tokens: most tokens of an answer; 0 for the benchmark's own number. baselines: whether
    the model is also asked without the image and with another.
    """

    task: str
    data: str
    max_questions: int = 0
    kind_of_answer: str = "all"
    batch: int = 32
    new_tokens: int = 0
    baselines: bool = True

    def __post_init__(self) -> None:
        if self.task != SHARDS and self.task not in TASKS:
            known = suggest(self.task, (SHARDS, *TASKS))
            raise ValueError(f"task = {self.task!r}: there is no such benchmark; {known}")
        if not self.data:
            raise ValueError("data = '': give the folder of the benchmark, or shards")
        if self.kind_of_answer not in ("all", "open"):
            raise ValueError(f"kind_of_answer = {self.kind_of_answer!r} is not one of all, open")
        if self.batch < 1 or min(self.max_questions, self.new_tokens) < 0:
            raise ValueError("batch must be at least 1, max_questions and new_tokens 0 or more")


class VQA:
    """Asks, and judges."""

    Options = VQAOptions
    needs = frozenset({LANGUAGE})

    def __init__(self, options: VQAOptions):
        self._options = options
        self._task: Task
        if options.task == SHARDS:
            shards = ShardQuestions(options.data, options.kind_of_answer == "open")
            self._task, found = shards, shards.identity
        else:
            self._task = TASKS[options.task]
            folder = pathlib.Path(options.data)
            if not folder.is_dir():
                raise UserError(f"{folder}: no such folder; download {self._task.source.repo}")
            files = sorted(folder.glob(self._task.source.files))
            found = datasets.fingerprint([(x.name, x.stat().st_size) for x in files])
            if next(self._questions(), None) is None:  # a missing file or another one is told now
                raise UserError(f"{folder}: has no question of {options.task}; download it again")
        of_shards = f"-{datasets.fingerprint(found, options.kind_of_answer)}"
        self._file = options.task + (of_shards if options.task == SHARDS else "")
        named = datasets.fingerprint(found, options.max_questions, options.kind_of_answer)
        self.data, self.datasets = f"{options.task}-{named}-{PROTOCOL}", ()

    @classmethod
    def want(cls, options: VQAOptions, networks: Networks) -> None:
        """None: what is asked needs all tokens of an image."""
        return None

    def _questions(self) -> Iterator[Question]:
        found: Iterator[Question]
        if isinstance(self._task, ShardQuestions):
            found = self._task.read()
        else:
            found = read_questions(self._task, pathlib.Path(self._options.data))
        limit = self._options.max_questions
        pair = None
        for number, question in enumerate(found):
            if limit and "rotation_of" in question.extra:
                raise UserError(
                    f"{self._task.name}: max_questions = {limit}: a question counts in all its "
                    "rotations, which lie apart; ask all (0)"
                )
            before, pair = pair, question.extra.get("pair")
            if 0 < limit <= number and (pair is None or pair != before):
                return
            yield question

    def run(self, model: Model, cache: Cache) -> Outcome:
        """See ``base.Evaluation``."""
        options, folder = self._options, cache.folder.parent / FOLDER
        wanted = ask.CONDITIONS if options.baselines else (ask.SEEING,)
        limit = f"-{options.new_tokens}" if options.new_tokens else ""
        found = {}
        for condition in wanted:
            answers = ask.ask(
                model,
                self._questions(),
                folder / f"{model.fingerprint}{limit}" / condition / f"{self._file}.jsonl",
                options.batch,
                condition,
                options.new_tokens,
            )
            found[condition] = self._outcome(answers)
        seeing = found.pop(ask.SEEING)
        return dataclasses.replace(
            seeing, baselines={_WORDS[name]: one for name, one in found.items()}
        )

    def _outcome(self, answers: list[Answer]) -> Outcome:
        count = len(answers)
        if self._task.name.endswith(_ON_A_SERVER):
            meaning = f"{self._task.title}: answered; only a server has the truth (score_vqa)."
            return Outcome(("answers",), {"answers": float(count)}, {}, self.data, meaning)
        score = self._task.score(answers)
        whole = self._task.source.count
        asked = f"{count:,}" if whole in (0, count) else f"{count:,} of {whole:,}"
        meaning = f"{self._task.title}: {score.headline} of answers to {asked} questions."
        parts: dict[str, list[Answer]] = {}
        if isinstance(self._task, ShardQuestions):
            parts = self._task.by_category(answers)
        found = {score.headline: score.items}
        found |= {name: self._task.score(part).items for name, part in parts.items()}
        errors = {f"{name}_se": one.standard_error() for name, one in found.items()}
        items = {name: one.contributions().astype("float32") for name, one in found.items()}
        guesses = {name: chance(part) for name, part in {score.headline: answers, **parts}.items()}
        known = {name: guess for name, guess in guesses.items() if guess is not None}
        metrics = score.metrics | errors
        return Outcome(tuple(found), metrics, items, self.data, meaning, chance=known)
