"""Questions that lie in records, as the annotation ``questions``: a benchmark of one's own."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from webssl_jax.data import annotations as annotation
from webssl_jax.data import records
from webssl_jax.data.sources import ArrayRecordSource
from webssl_jax.errors import UserError
from webssl_jax.evaluators import datasets
from webssl_jax.evaluators.vqa.scoring import PERCENT, accuracy, part_means
from webssl_jax.evaluators.vqa.task import (
    CATEGORIES,
    VISION_CENTRIC,
    Answer,
    Question,
    Source,
    TaskScore,
)

YES_NO = frozenset({"yes", "no"})
NEW_TOKENS = 16
_KEPT = ("category", "type", "chance")  # of a question, if it has them; chance: of guessing, 0 to 1


@dataclasses.dataclass(frozen=True)
class ShardQuestions:
    """Questions of records, right where an answer is one of theirs: lower case, without blanks
    around it and full stops after it. only_open: without those that are answered by yes or no."""

    shards: str
    only_open: bool = False

    name = "shards"
    title = "questions of records"
    category = VISION_CENTRIC
    source = Source("records", "*", ("questions",), 0)

    @property
    def identity(self) -> str:
        """A fingerprint of the records."""
        source = ArrayRecordSource(self.shards)
        return datasets.sampled_digest(source, range(len(source)), f"{len(source)} {self.name}")

    def read(self) -> Iterator[Question]:
        """All questions, record by record.

        Raises:
          UserError: for a record that is damaged or has no questions.
        """
        source = ArrayRecordSource(self.shards)
        keys: set[str] = set()
        for place in range(len(source)):
            try:
                record = records.decode(source[place])
                asked = annotation.questions(record)
            except records.RecordError as error:
                raise UserError(f"{source.describe(place)}: {error}") from error
            if record.key in keys:  # of another source
                record = dataclasses.replace(record, key=f"{record.key}@{place}")
            keys.add(record.key)
            yield from self.questions(place, {"record": record, "questions": asked})

    def questions(self, place: int, row: Mapping[str, Any]) -> list[Question]:
        """See ``task.Task``. row: ``record`` and ``questions``."""
        record, found = row["record"], []
        for i, one in enumerate(row["questions"]):
            closed = {_plain(answer) for answer in one["answers"]} <= YES_NO
            if closed and self.only_open:
                continue
            extra = {"answers": one["answers"], "category": "yes_no" if closed else "open"}
            extra |= {name: one[name] for name in _KEPT if name in one}
            key, text = f"{record.key}#{i}", one["question"]
            found.append(Question(key, text, record.image, extra, NEW_TOKENS))
        return found

    def score(self, answers: Sequence[Answer]) -> TaskScore:
        """See ``task.Task``. Besides the accuracy of each category that of each type."""
        found = accuracy(self.name, answers, _judge)
        values = [found.verdicts[answer.key] for answer in answers]
        return dataclasses.replace(
            found, metrics=found.metrics | part_means(answers, values, "type")
        )

    def by_category(self, answers: Sequence[Answer]) -> dict[str, list[Answer]]:
        """{``accuracy/CATEGORY``: its answers} of the paper's four that there are."""
        parts = {
            category: [answer for answer in answers if answer.extra["category"] == category]
            for category in CATEGORIES
        }
        return {f"accuracy/{category}": part for category, part in parts.items() if part}


def chance(answers: Sequence[Answer]) -> float | None:
    """What guessing gives, in percent; None where a question does not say it."""
    guesses = [answer.extra.get("chance") for answer in answers]
    said = [guess for guess in guesses if isinstance(guess, float)]
    return PERCENT * sum(said) / len(said) if len(said) == len(guesses) else None


def _judge(answer: Answer) -> float:
    return float(_plain(answer.answer) in map(_plain, answer.extra["answers"]))


def _plain(text: str) -> str:
    return text.strip().rstrip(".").strip().lower()
