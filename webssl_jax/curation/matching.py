"""Which entries a text holds: MetaCLIP's sub-string matching (arXiv 2309.16671, Algorithm 1), in
linear time.

MetaCLIP's rule: the text gets a space at both ends and around each of ``, . ; : ? ! ` ``; tabs and
line ends become spaces; an entry matches if the entry, with a space at both ends, is a sub-string.
Case counts. Cut at each single space, that is the same as: the words of the entry follow each other
among the words of the text (two spaces make an empty word). So one table, of all entries and of all
beginnings of entries, answers for each word of a text how far to read on. The work is at most words
of the text times words of the longest entry; it does not depend on the number of entries.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from webssl_jax.config import UserError

MARKS = ",.;:?!`"
BLANKS = "\t\n\r"
_MARKS, _SPECIAL = frozenset(MARKS), frozenset(MARKS + BLANKS)


def words_of(text: str) -> list[str]:
    """The words of a text by the rule above; may hold empty ones."""
    for mark in MARKS:
        text = text.replace(mark, f" {mark} ")
    for blank in BLANKS:
        text = text.replace(blank, " ")
    return text.split(" ")


class Matcher:
    """Finds entries in texts. ``entries``: unique and not empty, as :func:`read_entries` gives
    them; their positions are their ids."""

    def __init__(self, entries: Sequence[str]):
        # phrase -> 2 id + (1 if some entry goes on after it); -1 for what only begins entries
        self._table: dict[str, int] = {entry: 2 * i for i, entry in enumerate(entries)}
        for entry in entries:
            end = entry.find(" ")
            while end >= 0:
                beginning = entry[:end]
                self._table[beginning] = self._table.get(beginning, -1) | 1
                end = entry.find(" ", end + 1)

    def match(self, text: str) -> list[int]:
        """Ids of the entries in a text, each once, ascending."""
        table, words = self._table, words_of(text)
        found = set()
        for start, phrase in enumerate(words):
            code = table.get(phrase)
            end = start + 1
            while code is not None:
                if code >= 0:
                    found.add(code >> 1)
                if not code & 1 or end == len(words):
                    break
                phrase = f"{phrase} {words[end]}"
                code = table.get(phrase)
                end += 1
        return sorted(found)


def can_match(entry: str) -> bool:
    """Whether any text holds this entry. None does if it holds a tab or a line end, a mark without
    spaces around it (``St. John``), or two marks with a single space between them."""
    words = entry.split(" ")
    alone = [word in _MARKS for word in words]
    return not any(alone[i] and alone[i + 1] for i in range(len(words) - 1)) and all(
        mark or _SPECIAL.isdisjoint(word) for mark, word in zip(alone, words, strict=True)
    )


def read_entries(path: Path) -> list[str]:
    """Entries of a file: a JSON list of strings (``*.json``; MetaCLIP's ``metadata.json`` is one),
    or one in each line.

    Raises:
      UserError: if the file cannot be read or is not UTF-8, holds no entry, an empty one, or one
        twice.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"--entries {path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"--entries {path}: not UTF-8 at byte {error.start}") from None
    what = "line"
    if path.suffix == ".json":
        what = "item"
        try:
            entries = json.loads(text)
        except ValueError as error:
            raise UserError(f"--entries {path}: not JSON: {error}") from None
        if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
            raise UserError(f"--entries {path}: not a JSON list of strings")
    else:
        # Not splitlines(): a title may hold U+2028 and its kin.
        entries = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
        entries = entries if text else []
    if not entries:
        raise UserError(f"--entries {path}: holds no entry")
    seen: dict[str, int] = {}
    for number, entry in enumerate(entries, 1):
        if not entry:
            raise UserError(f"--entries {path}: {what} {number} is empty; remove it")
        if entry in seen:
            raise UserError(
                f"--entries {path}: {what} {number} repeats {what} {seen[entry]}: {entry!r}; "
                "remove one"
            )
        seen[entry] = number
    return entries


def digest(entries: Sequence[str]) -> str:
    """A name for a list of entries: its length and 8 hexadecimal digits."""
    hashed = hashlib.blake2b(json.dumps(entries).encode(), digest_size=4).hexdigest()
    return f"{len(entries)} entries, {hashed}"
