"""Multiple choice: options as text, and the letter or the words that an answer names.

As Cambrian's scripts do it (Tong et al., 2024), with what they get wrong: "The answer is: B" leaves
a colon, "Option B" an o, and "a red car" is taken for A. Figures compare only under the same rule.
"""

from __future__ import annotations

from collections.abc import Iterable

LETTER = "Answer with the option's letter from the given choices directly."
WORD = "Answer the question using a single word or phrase."
SHORT = "Give the short answer directly."

_MARKERS = ("answer is", "answer is:", "answer:")  # one after the other


def with_options(head: str, options: Iterable[str], tail: str = LETTER) -> str:
    """``head``, each option on a line of its own behind its letter, ``tail``."""
    lines = (f"{chr(ord('A') + place)}. {option}" for place, option in enumerate(options))
    return "\n".join((head, *lines, tail))


def final_words(answer: str) -> str:
    """In lower case, what stands behind the last "answer is" or "answer:"."""
    text = answer.lower().strip()
    for marker in _MARKERS:
        text = text.rpartition(marker)[2]
    return text.strip()


def option_words(answer: str, ends: str = ".:,") -> str:
    """:func:`final_words` without ``ends`` behind, and then without brackets around."""
    return final_words(answer).rstrip(ends).lstrip("(").rstrip(")")


def letter(answer: str, ends: str = ".:,") -> str:
    """The first character of :func:`option_words`, in lower case; empty where there is none."""
    return option_words(answer, ends)[:1]
