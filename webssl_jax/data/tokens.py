"""Texts to the token ids of CLIP (Radford et al., arXiv 2103.00020, section 2.4): byte-pair
encoding of lower-cased text, 49,408 ids, as the tokenizer of MetaCLIP and open_clip gives them.

A text is mended (mojibake and the like, by ``ftfy``), html-unescaped twice, its whitespace
collapsed, lower-cased and cut into words by one pattern; the UTF-8 bytes of a word are merged pair
by pair, the pair that was merged first in the training of the vocabulary before all others. Ids:
256 bytes, the same 256 at the end of a word, 48,894 merges, start of text, end of text.
"""

from __future__ import annotations

import codecs
import functools
import gzip
import heapq
import html
import importlib.resources
from collections.abc import Sequence

import numpy as np
import regex

MERGES = 48_894
START, END = 512 + MERGES, 513 + MERGES
VOCABULARY = END + 1
_SPECIAL = {"<start_of_text>": START, "<end_of_text>": END}
_WORDS = regex.compile(
    "|".join(_SPECIAL) + r"|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
    regex.IGNORECASE,
)
_KEPT_WORDS = 1 << 17  # whose ids are remembered, the latest: the web never runs out of words


class Tokenizer:
    """Texts to ids (N, ``context``) int32: start, the words, end, then ``pad``. Of a text that is
    too long the rest is cut off and the last id is the end all the same. Can be pickled.

    Raises:
      ValueError: if there is no room for start and end.
    """

    def __init__(self, context: int = 77, pad: int = 0):
        if context < 2:
            raise ValueError(f"context = {context} must be at least 2, for start and end of text")
        self.context, self.pad = context, pad
        self._word = functools.lru_cache(_KEPT_WORDS)(_word)

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[int, int]]:
        return Tokenizer, (self.context, self.pad)

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Raises:
        TypeError: for one string instead of a sequence of them.
        """
        if isinstance(texts, str):
            raise TypeError("give a sequence of texts, not one text")
        out = np.full((len(texts), self.context), self.pad, np.int32)
        for row, text in zip(out, texts):
            ids = self._ids(text)
            row[: len(ids)] = ids
        return out

    def _ids(self, text: str) -> list[int]:
        room = self.context - 2
        ids = [START]
        for match in _WORDS.finditer(clean(text)):
            ids += self._word(match[0])
            if len(ids) > room:
                break
        return [*ids[: room + 1], END]


def pieces(ids: Sequence[int] | np.ndarray) -> list[str]:
    """The text of each id between start and end; bytes that are no whole characters as ``<d0>``.

    ids: (context,) of one text.
    """
    bytes_ = _bytes()
    found: list[str] = []
    for i in np.asarray(ids).tolist():
        if i == END:
            break
        if i != START:
            found.append(bytes_[i].decode("utf-8", "spelled"))
    return found


def clean(text: str) -> str:
    """``text`` mended, unescaped, in lower case, words one space apart."""
    if not (text.isascii() and text.isprintable() and "&" not in text):
        # mending takes longer than all the rest, and leaves plain text as it is
        import ftfy  # a tenth of a second that every start of every program would pay

        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


def _word(word: str) -> tuple[int, ...]:
    """The ids of one word of the pattern."""
    if word in _SPECIAL:
        return (_SPECIAL[word],)
    bytes_, pairs = _vocabulary()
    ids = [bytes_[byte] for byte in word.encode("utf-8")]
    ids[-1] += 256
    return tuple(_merge(ids, pairs))


def _merge(ids: list[int], pairs: dict[tuple[int, int], int]) -> list[int]:
    """Replaces two neighbours by the id of their merge until none is left that has one, lowest id
    first, of equals the leftmost. In n log n steps for n ids: a page of Chinese is one word.

    That is the original's way, which replaces all pairs of one kind at a time, because a merge's id
    is higher than those of its parts: replacing one never makes a pair that should have come first.
    """
    count = len(ids)
    ids = [*ids, -1]  # no pair holds -1, which stands at the end and where an id is gone
    before, after = list(range(-1, count)), [*range(1, count + 1), count]
    queue = [(pairs[pair], place) for place, pair in enumerate(zip(ids, ids[1:])) if pair in pairs]
    heapq.heapify(queue)
    while queue:
        merged, place = heapq.heappop(queue)
        gone = after[place]
        if pairs.get((ids[place], ids[gone])) != merged:
            continue  # one of the two has changed since
        ids[place], ids[gone] = merged, -1
        after[place] = after[gone]
        before[after[place]] = place
        for left in (before[place], place):
            pair = (ids[left], ids[after[left]])
            if pair in pairs:
                heapq.heappush(queue, (pairs[pair], left))
    return [x for x in ids if x >= 0]


@functools.cache
def _vocabulary() -> tuple[list[int], dict[tuple[int, int], int]]:
    """(the id of each byte, {(id, id): the id of their merge})."""
    letters, bytes_ = spelling()
    ids = {letter: i for i, letter in enumerate(letters)}
    ids |= {f"{letter}</w>": 256 + i for i, letter in enumerate(letters)}
    pairs = {}
    for number, (left, right) in enumerate(merges(), start=512):
        pairs[ids[left], ids[right]] = ids[left + right] = number
    byte_ids = {byte: i for i, byte in enumerate(bytes_)}
    return [byte_ids[byte] for byte in range(256)], pairs


@functools.cache
def _bytes() -> list[bytes]:
    """Of the ids below ``START``, what they stand for."""
    letters, bytes_ = spelling()
    value = {letter: bytes([byte]) for letter, byte in zip(letters, bytes_)}
    words = [*letters, *letters, *(left + right for left, right in merges())]
    return [b"".join(value[letter] for letter in word.removesuffix("</w>")) for word in words]


def _spelled(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    bad = error.object[error.start : error.end]
    return "".join(f"<{byte:02x}>" for byte in bad), error.end


codecs.register_error("spelled", _spelled)


def spelling() -> tuple[list[str], list[int]]:
    """(the letters that the vocabulary's file spells bytes with, the bytes), in the order of ids:
    those bytes that print stand for themselves, the rest from U+0100 on."""
    prints = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in prints]
    return [chr(byte) for byte in prints] + [chr(256 + i) for i in range(len(rest))], prints + rest


def merges() -> list[tuple[str, str]]:
    """The pairs of spelled parts that become one, in the order of ids."""
    file = importlib.resources.files("webssl_jax.data") / "vocabulary/bpe_simple_vocab_16e6.txt.gz"
    lines = gzip.decompress(file.read_bytes()).decode("utf-8").split("\n")[1 : 1 + MERGES]
    return [(left, right) for left, right in (line.split() for line in lines)]
