"""A list of entries from counts, as MetaCLIP's (arXiv 2309.16671, section 3.1 and table 1): the
numbers 0 to 99, given words (WordNet's synsets), words of Wikipedia that are frequent enough, pairs
of words with enough pointwise mutual information, titles of articles that are viewed enough.

The pointwise mutual information of a pair is ``log2(count(pair) N / (count(first) count(second)))``
with N the count of all words. It is at most ``log2 N``: MetaCLIP's limit of 30 needs a text of a
billion words, and there it takes pairs whose words are hardly ever apart, however rare.

Entries come in that order, each source by falling count (pairs by information), until the list is
full; MetaCLIP's own list is a set without an order.
"""

from __future__ import annotations

import dataclasses
import math
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from webssl_jax.config import UserError
from webssl_jax.curation.ngrams import lines_of

MIN_UNIGRAM, MIN_PMI, MIN_VIEWS, MAX_ENTRIES = 100, 30.0, 70, 500_000  # MetaCLIP's
MIN_HOURLY_VIEWS = 50  # in a file of page views, to be counted at all
_FORBIDDEN = frozenset(string.punctuation)


@dataclasses.dataclass
class Source:
    """What one source of entries brought: candidates read, those over its limit, and of them those
    that were new and had room in the list."""

    name: str
    read: int = 0
    enough: int = 0
    taken: int = 0


@dataclasses.dataclass(frozen=True)
class Limits:
    """What an entry of each source needs; ``min_bigram`` is ours, MetaCLIP asks for no count."""

    min_unigram: int = MIN_UNIGRAM
    min_pmi: float = MIN_PMI
    min_bigram: int = 1
    min_views: int = MIN_VIEWS
    max_entries: int = MAX_ENTRIES


def build(
    words: Sequence[Path],
    unigrams: Path | None,
    bigrams: Path | None,
    pageviews: Sequence[Path],
    limits: Limits,
    project: str = "en",
) -> tuple[list[str], list[Source]]:
    """The list, and what each source brought.

    Args:
      words: files of entries to take as they are, one in each line.
      unigrams: lines ``count<TAB>word``.
      bigrams: lines ``count<TAB>word<TAB>word``; needs ``unigrams``.
      pageviews: Wikimedia's hourly files, lines ``project title views bytes``.
      project: of the page views, "en" for the English Wikipedia.
      (All may be ``.gz``.)

    Raises:
      UserError: if a file cannot be read or is of another format, if no source is given, if a pair
        cannot reach ``min_pmi`` in a text of that size.
    """
    if bigrams and not unigrams:
        raise UserError(f"--bigrams {bigrams}: needs --unigrams of the same texts")
    if not (words or unigrams or pageviews):
        raise UserError("no source of entries: give --words, --unigrams or --pageviews")
    entries = dict.fromkeys(map(str, range(100)))
    report = [Source("numbers", 100, 100, 100)]

    def take(source: Source, candidates: Iterable[str]) -> None:
        report.append(source)
        for entry in candidates:
            if len(entries) >= limits.max_entries:
                return
            if entry and entry not in _FORBIDDEN and entry not in entries:
                entries[entry] = None
                source.taken += 1

    if words:
        given = [line for path in words for line in lines_of(path)]
        take(Source("words", len(given), len(given)), given)
    if unigrams:
        counts = {word: n for n, word in _counted(unigrams, 1)}
        frequent = [word for word, n in counts.items() if n >= limits.min_unigram]
        take(Source("unigrams", len(counts), len(frequent)), _by_falling(frequent, counts))
        if bigrams:
            source = Source("bigrams")
            pairs = _informative(bigrams, counts, limits, source)
            take(source, _by_falling(pairs, pairs))
    if pageviews:
        views: dict[str, int] = {}
        for path in pageviews:
            for title, n in _views(path, project):
                views[title] = views.get(title, 0) + n
        seen = [title for title, n in views.items() if n >= limits.min_views]
        take(Source("titles", len(views), len(seen)), _by_falling(seen, views))
    return list(entries), report


def _informative(
    path: Path, counts: dict[str, int], limits: Limits, source: Source
) -> dict[str, float]:
    """{pair: its information} of those that have enough."""
    total = sum(counts.values())
    if not total:
        raise UserError(f"--bigrams {path}: --unigrams has no word, and pairs need their counts")
    if math.log2(total) < limits.min_pmi:
        raise UserError(
            f"--bigrams {path}: in a text of {total:,} words no pair has a pointwise mutual "
            f"information over {math.log2(total):.1f}; give a smaller --min-pmi than "
            f"{limits.min_pmi:g}"
        )
    found = {}
    for n, pair in _counted(path, 2):
        source.read += 1
        first, second = (counts.get(word) for word in pair.split("\t"))
        if first is None or second is None or n < limits.min_bigram:  # as MetaCLIP: left out
            continue
        information = math.log2(n * total) - math.log2(first * second)
        if information >= limits.min_pmi:
            found[pair.replace("\t", " ")] = information
    source.enough = len(found)
    return found


def _by_falling(names: Iterable[str], value: Mapping[str, float]) -> list[str]:
    return sorted(names, key=lambda name: (-value[name], name))


def _counted(path: Path, words: int) -> Iterator[tuple[int, str]]:
    """(count, word or pair) of each line."""
    for number, line in enumerate(lines_of(path), 1):
        count, _, rest = line.partition("\t")
        # isdecimal, not int(): the latter takes "1_000" and " 5"
        if not count.isdecimal() or rest.count("\t") != words - 1 or not all(rest.split("\t")):
            fields = "<TAB>".join(["count", *["word"] * words])
            raise UserError(f"{path}: line {number} is not {fields}: {line[:80]!r}")
        if int(count):
            yield int(count), rest


def _views(path: Path, project: str) -> Iterator[tuple[str, int]]:
    """(title, views) of one hour; of a project's articles alone."""
    found = False
    for line in lines_of(path):
        fields = line.split(" ")
        found |= len(fields) == 4 and fields[2].isdecimal()
        if len(fields) == 4 and fields[0] == project and fields[2].isdecimal():
            if int(fields[2]) >= MIN_HOURLY_VIEWS and ":" not in fields[1]:
                yield fields[1].replace("_", " ").strip(), int(fields[2])
    if not found:
        raise UserError(f"--pageviews {path}: no line is 'project title views bytes'")
