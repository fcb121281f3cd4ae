"""Where records come from: ArrayRecord shards, read at random by one global index.

A source is anything with ``len(source)``, ``source[index] -> bytes`` and
``source.describe(index)``. What can be known to be wrong before training is refused when the source
is made (:class:`UserError`, one line, naming the file); a record that turns out to be unreadable
later raises :class:`DamagedRecord`, which the loader survives.
"""

from __future__ import annotations

import bisect
import itertools
import logging
import re
import resource
import threading
from collections.abc import Sequence
from concurrent import futures
from typing import Any

from array_record.python import array_record_module
from etils import epath

from webssl_jax.config import UserError

SUFFIX = ".arrayrecord"
# Random access wants no readahead. The buffer holds one typical record; the module's default of
# 1 MiB would be read for every record.
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
_READER_BUFFER = 32 * 1024
_OPENING_THREADS = 64  # opening is waiting: for a disk, or for a bucket
_TROUBLES = 5  # unreadable shards named in full
_SPARE_FILES = 256  # file descriptors left to the rest of the process
_SET_NAME = re.compile(r"(?P<prefix>.*)-(?P<index>\d+)-of-(?P<total>\d+)(?P<suffix>\.[^/]*)?$")
_logger = logging.getLogger(__name__)


class DamagedRecord(ValueError):
    """A record that cannot be read from its shard. The message gives the reason, not the place."""


class ArrayRecordSource:
    """All records of some ArrayRecord shards, ordered by pattern, then by file name.

    ``pattern`` is one or several of: a glob, a file, a folder (every ``*.arrayrecord`` in it), or
    ``corpus:train`` and ``corpus:test`` for the shards inside the package. Paths may be anything
    ``etils.epath`` opens, so also ``gs://`` with the ``gcp`` extra.

    Pickles as a list of names, sizes and counts; each process opens its own readers, at the first
    record it needs from a shard. Reading is thread-safe. An open reader holds the shard's index in
    memory: 8 bytes a record.

    Every byte of a shard that matters is under a checksum of the format, so a record comes as it
    was written or is damaged. The limit: a shard that is overwritten in place, while it is open, by
    another of the same size cannot be told from the first.

    Raises:
      UserError: if a pattern matches nothing or cannot be read, a set ``-00000-of-0000N`` lacks a
        shard, a file is matched twice, a shard is truncated or not an ArrayRecord, or all are
        empty. (Single ones may be: of a tar without one usable image, the converter leaves one.)
    """

    def __init__(self, pattern: str | Sequence[str]):
        patterns = (pattern,) if isinstance(pattern, str) else tuple(pattern)
        if not patterns:
            raise UserError(
                "no data pattern was given: name a glob, a folder or a file of *.arrayrecord shards"
            )
        self.files: tuple[str, ...] = tuple(f for p in patterns for f in _expand(p))
        seen: set[str] = set()
        for file in self.files:
            if file in seen:
                raise UserError(
                    f"{file}: matched by more than one data pattern; name each shard once"
                )
            seen.add(file)
        _allow_open_files(len(self.files))
        with futures.ThreadPoolExecutor(min(_OPENING_THREADS, len(self.files))) as pool:
            results = list(pool.map(_try_to_measure, self.files))
        if troubles := [str(result) for result in results if isinstance(result, UserError)]:
            more = len(troubles) - _TROUBLES
            raise UserError(
                "; ".join(troubles[:_TROUBLES]) + (f"; and {more} more shards" if more > 0 else "")
            )
        measured = [result for result in results if not isinstance(result, UserError)]
        self._sizes = [size for size, _ in measured]
        self._ends = list(itertools.accumulate(count for _, count in measured))
        if not len(self):
            raise UserError(f"{self.files[0]}: no record in this shard, nor in any beside it")
        self._readers: dict[int, array_record_module.ArrayRecordReader] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> bytes:
        """The bytes of one record.

        Raises:
          DamagedRecord: if they cannot be read, or do not match their checksum.
          IndexError: outside ``[0, len)``.
          UserError: if the shard vanished or changed since the source was made. A shard that is
            already open stays readable after its name is gone.
        """
        shard, position = self._locate(index)
        try:
            return self._read(shard, position)
        except RuntimeError:
            # A network file system fails now and then, and a reader that failed may stay failed. So
            # damage is what a fresh reader finds too: otherwise a hiccup would change the batch.
            with self._lock:
                self._readers.pop(shard, None)
        try:
            return self._read(shard, position)
        except RuntimeError as error:
            raise DamagedRecord(f"unreadable: {error}") from None

    def locate(self, index: int) -> tuple[str, int]:
        """Where a record lies: its shard's name, and its number there, counted from 0."""
        shard, position = self._locate(index)
        return self.files[shard], position

    @property
    def counts(self) -> list[int]:
        """Records of each of ``files``."""
        return [end - start for start, end in itertools.pairwise([0, *self._ends])]

    def describe(self, index: int) -> str:
        """The same for logs and errors: ``FILE record 17``."""
        file, position = self.locate(index)
        return f"{file} record {position}"

    def __str__(self) -> str:
        shards = "1 shard" if len(self.files) == 1 else f"{len(self.files):,} shards"
        more = ", ..." if len(self.files) > 1 else ""
        return f"{len(self):,} records in {shards} ({self.files[0]}{more})"

    def __repr__(self) -> str:
        return f"ArrayRecordSource({self})"

    def __getstate__(self) -> dict[str, Any]:
        return {"files": self.files, "_sizes": self._sizes, "_ends": self._ends}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        _allow_open_files(len(self.files))
        self._readers = {}
        self._lock = threading.Lock()

    def _locate(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        shard = bisect.bisect_right(self._ends, index)
        return shard, index - (self._ends[shard - 1] if shard else 0)

    def _read(self, shard: int, position: int) -> bytes:
        reader = self._readers.get(shard)
        if reader is None:
            with self._lock:
                reader = self._readers.get(shard) or self._open(shard)
                self._readers[shard] = reader
        # The range form takes 4 us, the list form 60 us: the latter goes through a thread pool.
        data = reader.read(position, position + 1)[0]
        if not data:  # what the module returns beyond the end of a file that has been cut
            raise RuntimeError("no bytes")
        return data

    def _open(self, shard: int) -> array_record_module.ArrayRecordReader:
        file = self.files[shard]
        try:
            size = epath.Path(file).stat().length
        except OSError as error:
            raise UserError(
                f"{file}: cannot be read any more ({_cause(error)}); put the shard back and start "
                "the same command again"
            ) from None
        if size != self._sizes[shard]:
            raise UserError(
                f"{file}: had {self._sizes[shard]:,} bytes at the start and {size:,} now; shards "
                "must not change under a run"
            )
        reader = array_record_module.ArrayRecordReader(
            file, options=_READER_OPTIONS, file_reader_buffer_size=_READER_BUFFER
        )
        expected = self._ends[shard] - (self._ends[shard - 1] if shard else 0)
        if reader.num_records() != expected:
            raise UserError(
                f"{file}: held {expected} records at the start and {reader.num_records()} now; "
                "shards must not change under a run"
            )
        return reader


def _expand(pattern: str) -> list[str]:
    """The files a pattern means, sorted. Whole sets, unless the pattern names a single file."""
    try:
        return _list_files(pattern)
    except OSError as error:
        raise UserError(f"data pattern {pattern}: cannot be read ({_cause(error)})") from None


def _list_files(pattern: str) -> list[str]:
    if pattern.startswith("corpus:"):
        split = pattern.removeprefix("corpus:")
        if split not in ("train", "test"):
            raise UserError(
                f"data pattern {pattern!r}: the corpus has the splits 'train' and 'test'"
            )
        from webssl_jax import corpus  # only who asks for the corpus needs it

        pattern = corpus.pattern(split)
    root, rest = _split_at_wildcard(pattern)
    if rest:
        files = [p for p in epath.Path(root).glob(rest) if not p.is_dir()]
        if not files:
            _try_to_list(root)
    elif epath.Path(root).is_dir():
        files = list(epath.Path(root).glob("*" + SUFFIX))
        if not files:
            _try_to_list(root)
            raise UserError(
                f"data folder {pattern}: no *{SUFFIX} file in it; make shards with "
                "tools/make_records.py"
            )
    elif epath.Path(root).exists():
        return [root]
    else:
        raise UserError(f"data pattern {pattern}: no such file or folder")
    names = sorted(str(file) for file in files)
    if not names:
        raise UserError(f"data pattern {pattern}: matches no file")
    _check_sets(names)
    return names


def _try_to_list(folder: str) -> None:
    """Raises the OSError that a glob keeps to itself, of a folder that may not be read."""
    next(iter(epath.Path(folder).iterdir()), None)


def _split_at_wildcard(pattern: str) -> tuple[str, str]:
    """``a/b/c-*.x`` -> (``a/b/``, ``c-*.x``); no wildcard, no second part."""
    match = re.search(r"[*?\[]", pattern)
    if match is None or epath.Path(pattern).exists():  # a name may hold a bracket
        return pattern, ""
    cut = pattern.rfind("/", 0, match.start()) + 1
    return pattern[:cut] or ".", pattern[cut:]


def _check_sets(names: Sequence[str]) -> None:
    sets: dict[tuple[str, str], dict[int, list[re.Match]]] = {}
    for name in names:
        if match := _SET_NAME.match(name):
            totals = sets.setdefault((match["prefix"], match["suffix"] or ""), {})
            totals.setdefault(int(match["total"]), []).append(match)
    for (prefix, suffix), totals in sets.items():
        if len(totals) > 1:
            raise UserError(
                f"{prefix}-*{suffix}: more than one set of shards lies here, of "
                f"{' and of '.join(map(str, totals))} shards; narrow the pattern to one"
            )
        for total, matches in totals.items():
            missing = sorted(set(range(total)) - {int(m["index"]) for m in matches})
            if missing:
                index, width = missing[0], len(matches[0]["index"])
                name = f"{prefix}-{index:0{width}d}-of-{matches[0]['total']}{suffix}"
                more = f" (and {len(missing) - 1} more of its set)" if len(missing) > 1 else ""
                raise UserError(
                    f"{name}: this shard is missing{more}; finish or copy the set, or name single "
                    "files"
                )


def _try_to_measure(file: str) -> tuple[int, int] | UserError:
    try:
        return _measure(file)
    except UserError as error:  # all bad shards are to be named, not the first alone
        return error


def _measure(file: str) -> tuple[int, int]:
    """(bytes, records), the latter from the footer. The module reports most failures as 0 records,
    but without the writer's options, which a healthy empty shard has."""
    try:
        size = epath.Path(file).stat().length
        if size == 0:
            raise UserError(f"{file}: the shard is a file of 0 bytes; write it again")
        with epath.Path(file).open("rb") as readable:
            readable.read(1)
    except OSError as error:
        raise UserError(f"{file}: the shard cannot be read ({_cause(error)})") from None
    try:
        reader = array_record_module.ArrayRecordReader(
            file, options=_READER_OPTIONS, file_reader_buffer_size=_READER_BUFFER
        )
        count, options = reader.num_records(), reader.writer_options_string() or ""
        reader.close()
    except RuntimeError as error:
        raise UserError(
            f"{file}: the shard cannot be read: {' '.join(str(error).split())}; it is truncated, "
            "damaged or not an ArrayRecord: write or copy it again"
        ) from None
    if count == 0 and not options:
        raise UserError(
            f"{file}: no record can be read from this shard ({size:,} bytes): it is truncated or "
            "not an ArrayRecord; write it again"
        )
    if (group := re.search(r"group_size:(\d+)", options)) and group[1] != "1":
        _logger.warning(
            "%s was written with group_size:%s; random access is many times slower than with "
            "group_size:1",
            file,
            group[1],
        )
    return size, count


def _cause(error: OSError) -> str:
    return error.strerror or str(error)


def _allow_open_files(shards: int) -> None:
    """Lifts this process's soft limit of open files (often 1,024) to fit one reader a shard."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = shards + _SPARE_FILES
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise UserError(
            f"{shards:,} shards need {needed:,} open files and this machine allows {hard:,}; raise "
            "'ulimit -Hn' or write fewer, larger shards"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
