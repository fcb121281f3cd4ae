"""MMBench, English (Liu et al., 2023): each question in all rotations of its options."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from webssl_jax.errors import UserError
from webssl_jax.evaluators.vqa.rules.choices import LETTER, letter
from webssl_jax.evaluators.vqa.scoring import (
    PERCENT,
    beside,
    image_bytes,
    judged,
    part_means,
    verdicts,
)
from webssl_jax.evaluators.vqa.submissions import Submission, workbook
from webssl_jax.evaluators.vqa.task import GENERAL, Answer, Items, Question, Source, TaskScore

_NO = (None, "", "nan")  # how the published table writes that there is none
_OPTIONS = "ABCD"
_KEPT = ("index", "question", "hint", *_OPTIONS, "category", "l2-category", "source")
_SIDE = 256  # Cambrian tells images apart by their pixels at this size


@dataclasses.dataclass(frozen=True)
class MMBench:
    """A question counts as right where it is right in all its rotations (circular accuracy).

    Rotations are rows with the same text, image, source and category, as Cambrian has it; the
    official rule goes by row numbers. split: ``dev``, or ``test``, whose truth only the server has.
    """

    split: str = "dev"

    title = "MMBench"
    category = GENERAL

    def __post_init__(self) -> None:
        if self.split not in ("dev", "test"):
            raise ValueError(f"split is dev or test, got {self.split!r}")

    @property
    def name(self) -> str:
        """``mmbench`` or ``mmbench_test``."""
        return "mmbench" if self.split == "dev" else "mmbench_test"

    @property
    def source(self) -> Source:
        """The rows of the split, rotations among them."""
        columns = (*_KEPT, "image", "answer")
        count = 4329 if self.split == "dev" else 6666
        return Source("lmms-lab/MMBench_EN", f"data/{self.split}-*.parquet", columns, count)

    def questions(self, place: int, row: Mapping[str, Any]) -> list[Question]:
        """One a rotation; options that are "nan" are left out, and keep their letters."""
        hint = [] if row["hint"] in _NO else [row["hint"]]
        options = [f"{name}. {row[name]}" for name in _OPTIONS if row[name] not in _NO]
        text = "\n".join((*hint, f"{row['question']} Options:", *options, LETTER))
        image = image_bytes(row["image"])
        extra = {name: row[name] for name in _KEPT}
        extra["truth"] = None if row["answer"] in _NO else row["answer"]
        seen = _fingerprint(image, f"{self.name}, row {place}")
        extra["rotation_of"] = f"{row['question']} {seen} {row['source']}"
        return [Question(str(place), text, image, extra)]

    def judge(self, answer: Answer) -> float:
        """The letter."""
        return letter(answer.answer) == answer.extra["truth"].lower()

    def score(self, answers: Sequence[Answer]) -> TaskScore:
        """See the class. Rows without truth do not count, as in the original."""
        answers = [answer for answer in answers if answer.extra.get("truth") is not None]
        if not answers and self.split == "test":
            raise UserError(
                f"{self.name}: only the server has the truth; hand in what submission() writes"
            )
        hits = judged(self.name, answers, self.judge)
        whole: dict[tuple[str, str], bool] = collections.defaultdict(lambda: True)
        categories = beside(self.name, answers, "category")
        questions = beside(self.name, answers, "rotation_of")
        for category, question, hit in zip(categories, questions, hits):
            whole[(category, question)] &= bool(hit)
        values = np.array(list(whole.values()), np.float32)
        metrics = {
            "circular_accuracy": PERCENT * float(values.mean()),
            "accuracy": PERCENT * float(np.mean(hits)),
        }
        metrics |= part_means(answers, hits, "category")
        kinds = [category for category, _ in whole]
        for kind in sorted(set(kinds)):
            of = [value for value, its in zip(values, kinds) if its == kind]
            metrics[f"circular_accuracy/{kind}"] = PERCENT * float(np.mean(of))
        groups = np.zeros(len(values), np.int32)
        items = Items(values, groups, np.array([PERCENT], np.float32))
        return TaskScore("circular_accuracy", metrics, items, verdicts(answers, hits))

    def submission(self, answers: Sequence[Answer]) -> Submission:
        """The workbook that the server takes: a row a rotation, the answer as ``prediction``."""
        header = (*_KEPT, "prediction", "split")
        rows = [
            [*(_cell(answer.extra[name]) for name in _KEPT), answer.answer, self.split]
            for answer in answers
        ]
        address = "https://mmbench.opencompass.org.cn/mmbench-submission"
        return Submission("mmbench_en.xlsx", workbook(header, rows), address)


def _cell(value: Any) -> Any:
    return "" if value in _NO else value


def _fingerprint(image: bytes | None, where: str) -> str:
    if image is None:
        return ""
    try:
        with Image.open(io.BytesIO(image)) as opened:
            pixels = opened.convert("RGB").resize((_SIDE, _SIDE)).tobytes()
    except OSError as error:
        raise UserError(f"{where}: no image can be read ({error}); download it again") from error
    return hashlib.blake2b(pixels, digest_size=8).hexdigest()
