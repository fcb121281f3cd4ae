"""Conversations about an image as LLaVA and Cambrian-1 write them: who speaks, and where the image
stands."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from webssl_jax.errors import UserError

IMAGE = "<image>"
_ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant"}


class DialogueError(UserError):
    """A conversation that cannot be learned from. The message is a short phrase that is counted."""


def written(asked: Iterable[tuple[str, str]]) -> list[dict[str, str]]:
    """Questions with their answers about one image, as LLaVA writes a conversation."""
    turns = []
    for i, (question, answer) in enumerate(asked):
        turns.append({"from": "human", "value": f"{IMAGE}\n{question}" if i == 0 else question})
        turns.append({"from": "gpt", "value": answer})
    return turns


def take_turns(turns: Sequence[Mapping[str, Any]], image: bool) -> list[dict[str, str]]:
    """A conversation as LLaVA writes it (``from``, ``value``) with ``role`` and ``content``.

    A first turn that is an answer is passed over, and ``<image>`` moves to the front of the first
    question where there is an ``image``.

    Raises:
      DialogueError: if questions and answers do not take turns, it holds no answer, it names an
        image in a later turn, or one that is not there.
    """
    said = [(_ROLES.get(turn["from"]), turn["value"]) for turn in turns]
    if said and said[0][0] == "assistant":
        said = said[1:]
    if not said or [role for role, _ in said] != ["user", "assistant"] * (len(said) // 2):
        raise DialogueError("questions and answers that do not take turns")
    if any(IMAGE in text for _, text in said[1:]):
        raise DialogueError("an image in a later turn")
    first = said[0][1]
    if IMAGE in first:
        if not image:
            raise DialogueError("an image is named and none is there")
        first = f"{IMAGE}\n{first.replace(IMAGE, '').strip()}"
    rest = [{"role": str(role), "content": text} for role, text in said[1:]]
    return [{"role": "user", "content": first}, *rest]
