"""Conversations about an image as tokens: which of them stand for the image, which are answers.

Cambrian-1's rules (Tong et al., arXiv 2406.16860): ``<image>`` is taken out of wherever it stands
in the first question and put before it, on a line of its own; what a model is to learn are the
answers with the token that ends them, and nothing else.

The conversation is cut where an answer begins and where it ends, and each part is tokenised alone:
so an answer's tokens in training are those that a model writes when it is asked.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from webssl_jax.data.turns import IMAGE, DialogueError, take_turns
from webssl_jax.errors import UserError
from webssl_jax.language import tokenizer
from webssl_jax.language.tokenizer import Messages, Tokenizer

# In place of token ids: a cell of the image, a cell that is padding of the image, and padding.
CELL, HIDDEN_CELL, PADDING = -200, -201, -1
IGNORED = -100  # of labels
TEMPLATES = ("own", "cambrian")

# Llama 3's roles as Cambrian-1 writes them: without the blank line of Meta's template.
_CAMBRIAN = (
    "{{ '<|begin_of_text|>' }}{% for message in messages %}{{ '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>' + message['content'] + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>' }}{% endif %}"
)
_CAMBRIAN_END = "<|eot_id|>"
# What Cambrian-1 was trained with, blanks and line breaks included.
CAMBRIAN_SYSTEM = (
    "You are Cambrian, a highly intelligent multimodal AI trained by NYU Vision X. \n    As a "
    "multimodal AI, you have the ability to process and analyze images. Whenever an image is "
    "present in the conversation, very carefully examine it and consider its content when "
    "formulating your response.\n    You should give concise responses to very simple questions, "
    "but provide thorough responses to more complex and open-ended questions. "
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dialogue:
    """How conversations become tokens.

    tokenizer: a folder of transformers, a ``.gguf`` file, or ``smollm2``. template: ``own``, the
    chat template of the tokenizer, or ``cambrian``, Llama 3's roles as Cambrian-1 writes them.
    system: what is said before all; "" for nothing (a template may have words of its own).
    unpad: whether cells of an image that are its padding to a square are hidden.

    Raises:
      ValueError: for another template.
    """

    tokenizer: str
    template: str = "own"
    system: str = ""
    unpad: bool = False

    def __post_init__(self) -> None:
        if self.template not in TEMPLATES:
            known = ", ".join(TEMPLATES)
            raise ValueError(f"template = {self.template!r} is not one of {known}")

    @property
    def speaker(self) -> Tokenizer:
        """The tokenizer with the template.

        Raises:
          WeightsError: if it cannot be read.
        """
        return _speaker(self.tokenizer, self.template)

    def messages(self, turns: Sequence[Mapping[str, Any]], image: bool) -> Messages:
        """:func:`take_turns`, with what the system says before."""
        return [*self._system, *take_turns(turns, image)]

    def prompt(self, question: str, cells: np.ndarray | None) -> list[int]:
        """Ids up to where the answer to one question begins. cells: as of :func:`encode`; None for
        a question without an image."""
        content = question if cells is None else f"{IMAGE}\n{question}"
        text = self.speaker.render([*self._system, {"role": "user", "content": content}])
        return _ids(self.speaker, text, cells)

    def encode(self, messages: Messages, cells: np.ndarray | None) -> Encoded:
        """The whole conversation. cells: (n,) bool, which cells of the image are seen; None without
        an image, and then there is no ``<image>``.

        Raises:
          DialogueError: if there is nothing to learn: all answers are empty.
          UserError: if the template refuses the conversation, or rewrites what was said before.
        """
        speaker = self.speaker
        ids: list[int] = []
        answer: list[bool] = []
        before, place = "", 0
        ends = set(speaker.end_ids)
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            asked = speaker.render(messages[:i])
            told = speaker.render(messages[: i + 1], add_generation_prompt=False)
            if not asked.startswith(before) or not told.startswith(asked):
                raise UserError(
                    f"{speaker.where}: its chat template rewrites earlier turns or the start of an "
                    "answer, so answers cannot be told apart; choose another template"
                )
            question = _ids(speaker, asked[place:], cells if not ids else None)
            said = speaker.encode(told[len(asked) :], special=False)
            stop = next((k + 1 for k, token in enumerate(said) if token in ends), len(said))
            counts = bool(message["content"])
            ids += question + said
            answer += [False] * len(question) + [counts] * stop + [False] * (len(said) - stop)
            before, place = told, len(told)
        if not any(answer):
            raise DialogueError("no answer to learn")
        return Encoded(np.array(ids, np.int32), np.array(answer, bool))

    @property
    def _system(self) -> list[dict[str, str]]:
        return [{"role": "system", "content": self.system}] if self.system else []


class Encoded(NamedTuple):
    """tokens (T,) int32: ids, :data:`CELL` or :data:`HIDDEN_CELL`. answer (T,) bool: which of them
    are to be predicted."""

    tokens: np.ndarray
    answer: np.ndarray

    @property
    def labels(self) -> np.ndarray:
        """(T,) int32: the tokens to predict, :data:`IGNORED` elsewhere."""
        return np.where(self.answer, self.tokens, IGNORED)

    def fitted(self, length: int) -> tuple[Encoded, int]:
        """Cut or padded at the end to ``length`` tokens; and how many were cut."""
        cut = max(0, len(self.tokens) - length)
        room = max(0, length - len(self.tokens))
        tokens = np.pad(self.tokens[:length], (0, room), constant_values=PADDING)
        return Encoded(tokens, np.pad(self.answer[:length], (0, room))), cut


def seen_cells(width: int, height: int, shape: tuple[int, int], unpad: bool = True) -> np.ndarray:
    """(rows * columns,) bool: which cells of an image of ``width`` x ``height`` pixels, padded to a
    square, show some of it. Cells beyond a square of ``shape`` are newlines, and stay.

    The cells are Cambrian-1's: of rows that a wide image covers its share is cut to a whole number,
    and what is left goes in equal parts above and below.
    """
    rows, columns = shape
    seen = np.ones(shape, bool)
    if unpad and width > height:
        hidden = (rows - int(height * (rows / width))) // 2
        seen[:hidden] = seen[rows - hidden :] = False
    elif unpad and height > width:
        hidden = (rows - int(width * (rows / height))) // 2
        seen[:, :hidden] = seen[:, rows - hidden : rows] = False
    return seen.reshape(-1)


def _ids(speaker: Tokenizer, text: str, cells: np.ndarray | None) -> list[int]:
    if cells is None:
        return speaker.encode(text, special=False)
    before, _, after = text.partition(IMAGE)
    image = np.where(cells, CELL, HIDDEN_CELL).tolist()
    ids = [speaker.encode(part, special=False) if part else [] for part in (before, after)]
    return [*ids[0], *image, *ids[1]]


@functools.cache
def _speaker(path: str, template: str) -> Tokenizer:
    """One a process."""
    opened = tokenizer.open_(path)
    if template == "own":
        return opened
    end = opened.inner.token_to_id(_CAMBRIAN_END)
    if end is None:
        raise UserError(
            f"{opened.where}: has no {_CAMBRIAN_END}, so Cambrian's template of Llama 3 is not for "
            "it; take template = own"
        )
    return dataclasses.replace(opened, chat_template=_CAMBRIAN, end_ids=(end,))
