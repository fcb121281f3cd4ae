"""Counts of words and of pairs of words in texts, exact and in bounded memory.

Words are those of ``matching``, so that what is counted is what an entry will match. A pair is two
words with a single space between them; neither is punctuation. Counts that outgrow the memory are
written out sorted, and merged at the end. The two files are what :mod:`entries` reads:
``unigrams.tsv`` with lines ``count<TAB>word`` and ``bigrams.tsv`` with ``count<TAB>word<TAB>word``,
sorted by word.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import heapq
import itertools
import os
import string
import tempfile
import unicodedata
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

from webssl_jax.config import UserError
from webssl_jax.curation.matching import words_of
from webssl_jax.data import records
from webssl_jax.data.sources import ArrayRecordSource, DamagedRecord

UNIGRAMS, BIGRAMS = "unigrams.tsv", "bigrams.tsv"
LIMIT = 1 << 20  # different words or pairs in memory, each: some 110 MB
_RUNS = 200  # files that are merged at once


@functools.lru_cache(1 << 16)
def is_punctuation(word: str) -> bool:
    """Nothing but punctuation, ASCII's or Unicode's; also the empty word."""
    return all(c in string.punctuation or unicodedata.category(c)[0] == "P" for c in word)


class _Counts:
    """Counts of keys, with the excess in sorted files of ``folder``."""

    def __init__(self, folder: Path, limit: int):
        self._folder, self._limit = folder, limit
        self._counts: dict[str, int] = {}
        self._runs: list[Path] = []
        self._written = 0

    def add(self, keys: Iterable[str]) -> None:
        counts = self._counts
        for key in keys:
            counts[key] = counts.get(key, 0) + 1
        if len(counts) > self._limit:
            self._spill()

    def _spill(self) -> None:
        """Writes what is in memory to a new file; together with all others if they are many."""
        full = len(self._runs) == _RUNS
        path = self._folder / f"{id(self)}-{self._written}"
        self._written += 1
        with open(path, "w", encoding="utf-8", newline="\n") as file:
            rows = self.merged() if full else sorted(self._counts.items())
            file.writelines(f"{key}\0{n}\n" for key, n in rows)
        if full:
            for run in self._runs:
                run.unlink()
            self._runs.clear()
        self._runs.append(path)
        self._counts.clear()

    def merged(self) -> Iterator[tuple[str, int]]:
        """(key, count) by key."""
        with contextlib.ExitStack() as stack:
            files = [
                stack.enter_context(open(run, encoding="utf-8", newline="\n")) for run in self._runs
            ]
            rows = heapq.merge(sorted(self._counts.items()), *map(_rows, files))
            for key, same in itertools.groupby(rows, key=lambda row: row[0]):
                yield key, sum(n for _, n in same)


def _rows(file: Iterable[str]) -> Iterator[tuple[str, int]]:
    for line in file:
        key, _, n = line.rpartition("\0")
        yield key, int(n)


def count(texts: Iterable[str], folder: Path, limit: int = LIMIT) -> tuple[int, int]:
    """Writes ``unigrams.tsv`` and ``bigrams.tsv`` into a folder, made if missing.

    Args:
      limit: different words, and different pairs, in memory at once.

    Returns:
      How many different words and pairs there are.

    Raises:
      UserError: if the texts hold no word.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".counting-") as aside:
        unigrams, bigrams = _Counts(Path(aside), limit), _Counts(Path(aside), limit)
        for text in texts:
            # "\0" separates a word from its count in a run; no word of a text should hold it
            words = words_of(text.replace("\0", " "))
            counted = [not is_punctuation(word) for word in words]
            unigrams.add(itertools.compress(words, counted))
            bigrams.add(
                f"{first}\t{second}"
                for first, second, a, b in zip(words, words[1:], counted, counted[1:])
                if a and b
            )
        sizes = []
        for name, counts in ((UNIGRAMS, unigrams), (BIGRAMS, bigrams)):
            sizes.append(0)
            with open(Path(aside) / name, "w", encoding="utf-8", newline="\n") as file:
                for key, times in counts.merged():
                    file.write(f"{times}\t{key}\n")
                    sizes[-1] += 1
        if not sizes[0]:
            raise UserError("the texts hold no word; nothing was counted")
        for name in (UNIGRAMS, BIGRAMS):
            os.replace(Path(aside) / name, folder / name)
    return sizes[0], sizes[1]


def open_text(path: Path) -> TextIO:
    """A text file to read by lines, also ``.gz``; lines end at LF alone.

    Raises:
      UserError: if it cannot be opened.
    """
    try:
        if path.suffix == ".gz":
            return gzip.open(path, "rt", encoding="utf-8-sig", newline="\n")
        return open(path, encoding="utf-8-sig", newline="\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def lines_of(path: Path) -> Iterator[str]:
    """Lines of a text file, without their ends.

    Raises:
      UserError: if the file cannot be read, is not UTF-8 or no whole gzip file.
    """
    with open_text(path) as file:
        try:
            for line in file:
                yield line.rstrip("\r\n")
        except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot be read to its end: {error}") from None


def captions_of(pattern: str | Sequence[str], damaged: Callable[[str], None]) -> Iterator[str]:
    """Captions of the records of some shards; ``damaged`` is told of each damaged record.

    Raises:
      UserError: as :class:`ArrayRecordSource`.
    """
    source = ArrayRecordSource(pattern)
    for index in range(len(source)):
        try:
            yield from records.decode(source[index]).captions
        except (DamagedRecord, records.RecordError) as error:
            damaged(f"{source.describe(index)}: {' '.join(str(error).split())}")
