"""Counts of words and of pairs of words in texts, exact and in bounded memory.

Words are those of ``matching``, so that what is counted is what an entry will match. A pair is two
words with a single space between them; neither is punctuation. Each file of texts and each shard is
a task of the engine, which leaves its counts sorted in ``.plan``; counts that outgrow the memory
are written out sorted. At the end all are merged into the two files that :mod:`entries` reads:
``unigrams.tsv`` with lines ``count<TAB>word`` and ``bigrams.tsv`` with ``count<TAB>word<TAB>word``,
sorted by word.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gzip
import heapq
import itertools
import json
import os
import shutil
import string
import tempfile
import unicodedata
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, TextIO

from webssl_jax.config import UserError
from webssl_jax.curation import engine
from webssl_jax.curation.matching import words_of
from webssl_jax.curation.shards import Shard, list_shards
from webssl_jax.data import records
from webssl_jax.data.converter import plan, runners
from webssl_jax.data.converter.items import no_progress
from webssl_jax.data.sources import DamagedRecord
from webssl_jax.files import write_json

UNIGRAMS, BIGRAMS = "unigrams.tsv", "bigrams.tsv"
LIMIT = 1 << 21  # different words and pairs in the memory of a process: some 220 MB
_RUNS = 200  # files that are merged at once


@functools.lru_cache(1 << 16)
def is_punctuation(word: str) -> bool:
    """Nothing but punctuation, ASCII's or Unicode's; also the empty word."""
    return all(c in string.punctuation or unicodedata.category(c)[0] == "P" for c in word)


@dataclasses.dataclass(frozen=True)
class Task:
    """One input: a file of texts, or a shard. limit: as :data:`LIMIT`."""

    output: str
    number: int
    source: Path | Shard
    limit: int

    size: ClassVar[int] = 1
    needs: ClassVar[tuple] = ()

    @property
    def path(self) -> Path:
        """Lines ``word`` or ``word<TAB>word``, a zero byte, the count; sorted."""
        return Path(self.output) / plan.PLAN_FOLDER / f"{self.number:05d}.counts"

    @property
    def damaged(self) -> Path:
        """A JSON list: what of the input could not be read, and why."""
        return self.path.with_suffix(".damaged.json")


def count(
    texts: Sequence[Path],
    captions: Sequence[str],
    output: Path,
    runner: runners.Runner = runners.here,
    progress: engine.Progress = engine.silent,
    limit: int = LIMIT,
) -> tuple[int, int, list[str]]:
    """Writes ``unigrams.tsv`` and ``bigrams.tsv``; continues what was begun.

    Args:
      texts: files with a text in each line. captions: patterns of shards.

    Returns:
      How many different words and pairs there are, and the damaged records.

    Raises:
      UserError: if the texts hold no word, for inputs that cannot be read, a folder begun with
        others or in use.
    """
    files, patterns = [Path(os.path.abspath(text)) for text in texts], engine.absolute(captions)

    def make() -> tuple[dict[str, Any], plan.Dealt]:
        units = [{"path": str(file), **_stamp(file)} for file in files]
        return {"shards": list_shards(patterns) if patterns else []}, {"texts": [units]}

    settings = {"text": [str(file) for file in files], "captions": patterns}
    facts, _ = plan.prepare(output, settings, make)
    with plan.lock(output):
        shards = [Shard(number, **shard) for number, shard in enumerate(facts["shards"])]
        for left in (*output.glob(".counting-*"), *output.glob(f"{plan.PLAN_FOLDER}/counting-*")):
            shutil.rmtree(left)  # of a pass that was killed
        sources: list[Path | Shard] = [*files, *shards]
        tasks = [Task(str(output), i, source, limit) for i, source in enumerate(sources)]
        engine.work(runner, count_input, tasks, progress)
        damaged = [x for task in tasks for x in json.loads(task.damaged.read_text("utf-8"))]
        with tempfile.TemporaryDirectory(dir=output, prefix=".counting-") as aside:
            sizes = _write([task.path for task in tasks], output, Path(aside))
    return *sizes, damaged


def _stamp(file: Path) -> dict[str, int]:
    try:
        return plan.stamp(file)
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None


def _write(runs: list[Path], output: Path, aside: Path) -> tuple[int, int]:
    """The two files, from the sorted counts of all tasks; how many lines each has."""
    number = 0
    while len(runs) > _RUNS:
        runs.append(aside / str(number))
        _save(runs[-1], _merged(runs[:_RUNS]))
        del runs[:_RUNS]
        number += 1
    names, sizes = (UNIGRAMS, BIGRAMS), [0, 0]
    with contextlib.ExitStack() as stack:
        files = [
            stack.enter_context(open(aside / name, "w", encoding="utf-8", newline="\n"))
            for name in names
        ]
        for key, times in _merged(runs):
            pair = "\t" in key  # words hold none
            files[pair].write(f"{times}\t{key}\n")
            sizes[pair] += 1
    if not sizes[0]:
        raise UserError("the texts hold no word; nothing was counted")
    for name in names:
        os.replace(aside / name, output / name)
    return sizes[0], sizes[1]


def count_input(task: Task, progress: Callable[[int], None] = no_progress) -> None:
    """Writes the counts of an input, unless they are there.

    Raises:
      UserError: if it cannot be read, or a shard has changed.
    """
    if not task.path.exists():
        damaged: list[str] = []
        counts: dict[str, int] = {}
        with tempfile.TemporaryDirectory(dir=task.path.parent, prefix="counting-") as aside:
            runs: list[Path] = []

            def spill(path: Path) -> None:
                _save(path, sorted(counts.items()))
                counts.clear()
                runs.append(path)

            for text in _texts(task.source, damaged.append):
                for key in _keys(text):
                    counts[key] = counts.get(key, 0) + 1
                if len(counts) > task.limit:
                    if len(runs) == _RUNS:  # all into one
                        _save(Path(aside) / "all", _merged(runs))
                        runs[:] = [(Path(aside) / "all").replace(runs[0])]
                    spill(Path(aside) / f"{len(runs)}")
            spill(Path(aside) / "last")
            _save(Path(aside) / "whole", _merged(runs))
            write_json(task.damaged, damaged)
            os.replace(Path(aside) / "whole", task.path)
    progress(task.size)


def _keys(text: str) -> Iterator[str]:
    """The words of a text, and the pairs with a tab between them."""
    words = words_of(text.replace("\0", " "))  # that ends a key in a file of counts
    counted = [not is_punctuation(word) for word in words]
    yield from itertools.compress(words, counted)
    for first, second, a, b in zip(words, words[1:], counted, counted[1:], strict=False):
        if a and b:
            yield f"{first}\t{second}"


def _save(path: Path, rows: Iterable[tuple[str, int]]) -> None:
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(f"{key}\0{n}\n" for key, n in rows)


def _merged(runs: Sequence[Path]) -> Iterator[tuple[str, int]]:
    """(key, count) of sorted files, by key."""
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open(run, encoding="utf-8", newline="\n")) for run in runs]
        rows = heapq.merge(*map(_rows, files))
        for key, same in itertools.groupby(rows, key=lambda row: row[0]):
            yield key, sum(n for _, n in same)


def _rows(file: Iterable[str]) -> Iterator[tuple[str, int]]:
    for line in file:
        key, _, n = line.rpartition("\0")
        yield key, int(n)


def _texts(source: Path | Shard, damaged: Callable[[str], None]) -> Iterator[str]:
    """Lines of a file, or captions of a shard; ``damaged`` is told of each damaged record."""
    if isinstance(source, Path):
        yield from lines_of(source)
        return
    opened = source.open() if source.records else None  # an empty one cannot be opened alone
    for place in range(source.records):
        assert opened is not None
        try:
            yield from records.decode(opened[place]).captions
        except (DamagedRecord, records.RecordError) as error:
            damaged(f"{opened.describe(place)}: {' '.join(str(error).split())}")


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
