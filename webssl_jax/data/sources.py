"""Where records come from: ArrayRecord shards, read at random by one global index.

A source is anything with ``len(source)``, ``source[index] -> bytes`` and
``source.describe(index)``. What can be known to be wrong before training is refused when the source
is made (:class:`UserError`, one line, naming the file); a record that turns out to be unreadable
later raises :class:`DamagedRecord`, which the loader survives. Storage that fails is tried again
for a while, and then raises :class:`TransientError`.
"""

from __future__ import annotations

import bisect
import collections
import itertools
import logging
import re
import resource
import threading
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import Any, NamedTuple, NoReturn, TypeVar

from array_record.python import array_record_module
from etils import epath

from webssl_jax.config import TransientError, UserError
from webssl_jax.data.patience import PATIENCE_SECONDS, may_pass, patiently

SUFFIX = ".arrayrecord"
# Random access wants no readahead. The buffer holds one typical record; the module's default of
# 1 MiB would be read for every record.
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
_READER_BUFFER = 32 * 1024
_OPENING_THREADS = 64  # opening is waiting: for a disk, or for a bucket
_TROUBLES = 5  # unreadable shards named in full
_QUICK_TRIES = 3  # of the module, which reports a failure to open as a shard of nothing
_MISSING = (
    "this shard is missing; finish or copy the set, name single files, or allow for lost ones"
    " (config.data.max_lost_shards)"
)
_INDEX_BYTES = 12  # of an open shard's index, a record: 8, and room to grow (8.0 to 11.5 measured)
_SPARE_FILES = 256  # file descriptors left to the rest of the process
_SET_NAME = re.compile(r"(?P<prefix>.*)-(?P<index>\d+)-of-(?P<total>\d+)(?P<suffix>\.[^/]*)?$")
_logger = logging.getLogger(__name__)
T = TypeVar("T")


class DamagedRecord(ValueError):
    """A record that cannot be read from its shard. The message gives the reason, not the place."""


class Shard(NamedTuple):
    """name: without its folder. size: bytes; 0 if it was lost when this was first asked."""

    name: str
    size: int
    records: int


class ArrayRecordSource:
    """All records of some ArrayRecord shards, ordered by pattern, then by file name.

    ``pattern`` is one or several of: a glob, a file, a folder (every ``*.arrayrecord`` in it), or
    ``corpus:train`` and ``corpus:test`` for the shards inside the package. In one text they are
    separated by commas; ``?`` stands for a comma in a name. Paths may be anything ``etils.epath``
    opens, so also ``gs://`` with the ``gcp`` extra.

    Pickles as a list of names, sizes and counts; each process opens its own readers, at the first
    record it needs from a shard. Reading is thread-safe. An open reader holds the shard's index in
    memory, 12 bytes a record; beyond ``memory``, the readers that were used longest ago are closed.
    Opening one again reads the index again.

    Every byte of a shard that matters is under a checksum of the format, so a record comes as it
    was written or is damaged. The limit: a shard that is overwritten in place, while it is open, by
    another of the same size cannot be told from the first.

    A shard is lost when it is missing from its set, truncated or damaged as a whole, or becomes so
    later. ``max_lost`` says how many are passed over. The records of a lost shard whose number is
    ``known`` count as damaged, so that all other records keep their numbers; of one that is not
    known, none is counted.

    Args:
      patience: seconds for which storage that fails is tried again.
      max_lost: the share of shards that may be lost.
      memory: bytes that the indices of open shards may take, in each process. One shard is always
        open.
      known: the shards as they were before (:attr:`shards`), if they are those of a run that goes
        on. One that was lost then stays so, and any trouble is worth the ``patience``.

    Raises:
      UserError: if a pattern matches nothing or cannot be read, a file is matched twice, too many
        shards are lost, or all are empty. (Single ones may be: of a tar without one usable image,
        the converter leaves one.)
      TransientError: if storage fails for longer than ``patience``.
    """

    def __init__(
        self,
        pattern: str | Sequence[str],
        *,
        patience: float = PATIENCE_SECONDS,
        max_lost: float = 0.0,
        known: Sequence[Shard] = (),
        memory: int = 2**32,
    ):
        self._patience, self._max_lost, self._memory = patience, max_lost, memory
        self._known = tuple(known)
        self._make_transient_parts()
        self._open_all(_patterns(pattern))

    def _open_all(self, patterns: Sequence[str]) -> None:
        # At a first start nobody waits for a name that was mistyped.
        kind = UserError if self._known else TransientError
        self._wait_for(lambda: self._measure_all(patterns), kind)
        if not len(self):
            nothing = f"{self.files[0]}: no record in this shard, nor in any beside it"
            raise UserError(next(iter(self.lost.values()), nothing))

    def _measure_all(self, patterns: Sequence[str]) -> None:
        listed = [found for pattern in patterns for found in _expand(pattern)]
        self.files: tuple[str, ...] = tuple(file for file, _ in listed)
        seen: set[str] = set()
        for file in self.files:
            if file in seen:
                raise UserError(
                    f"{file}: matched by more than one data pattern; name each shard once"
                )
            seen.add(file)
        _allow_open_files(len(self.files))
        with futures.ThreadPoolExecutor(min(_OPENING_THREADS, len(self.files))) as pool:
            results = list(pool.map(self._try_to_measure, *zip(*listed, strict=True)))
        same = [shard.name for shard in self._known] == [_name(file) for file in self.files]
        known = self._known if same else ()
        for i, shard in enumerate(known):
            if not shard.size and not isinstance(results[i], UserError):
                results[i] = UserError(
                    f"{self.files[i]}: was lost when the run began, and stays so"
                )
        lost = {i: found for i, found in enumerate(results) if isinstance(found, UserError)}
        if len(lost) > self._max_lost * len(self.files):
            self._refuse(list(lost.values()))
        measured = [(0, 0) if isinstance(found, UserError) else found for found in results]
        for i in lost if known else ():
            measured[i] = known[i].size, known[i].records
        self._sizes = [size for size, _ in measured]
        self._ends = list(itertools.accumulate(count for _, count in measured))
        self.lost = {i: str(trouble) for i, trouble in lost.items()}
        for trouble in itertools.islice(self.lost.values(), _TROUBLES):
            _logger.warning("lost shard passed over: %s", trouble)
        if lost:
            _logger.warning("%d of %d shards are lost", len(lost), len(self.files))

    def _refuse(self, troubles: Sequence[UserError]) -> NoReturn:
        lasting = [trouble for trouble in troubles if not isinstance(trouble, TransientError)]
        shown = (lasting or troubles)[:_TROUBLES]
        more = len(troubles) - len(shown)
        text = "; ".join(map(str, shown)) + (f"; and {more} more shards" if more else "")
        if self._max_lost:
            text = (
                f"{len(troubles)} of {len(self.files)} shards are lost, more than the share of "
                f"{self._max_lost:g} that may be: {text}"
            )
        raise (UserError if lasting else TransientError)(text)

    def _try_to_measure(self, file: str, trouble: str) -> tuple[int, int] | UserError:
        try:
            if trouble:
                raise UserError(f"{file}: {trouble}")
            return self._wait_for(lambda: _measure(file), TransientError)
        except UserError as error:  # all bad shards are to be named, not the first alone
            return error

    def _wait_for(self, action: Callable[[], T], kind: type[UserError]) -> T:
        """What ``action`` returns, tried again for errors of ``kind``. Each is told once, and not
        of all shards at once."""
        told: list[str] = []

        def say(error: UserError) -> None:
            if str(error) not in told and self._troubles < _TROUBLES:
                _logger.warning("%s; trying again for up to %.0f s", error, self._patience)
                self._troubles += not told
                told.append(str(error))

        found = patiently(action, self._patience, kind, say, self._closed)
        if told:
            self._troubles -= 1
            _logger.warning("%s: works again", told[0].partition(": ")[0])
        return found

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> bytes:
        """The bytes of one record.

        Raises:
          DamagedRecord: if they cannot be read, or do not match their checksum, or their shard is
            lost.
          IndexError: outside ``[0, len)``.
          TransientError: if storage failed for longer than the source has patience. A shard that is
            already open stays readable after its name is gone.
          UserError: if the shard has become another one since the source was made.
        """
        shard, position = self._locate(index)
        if shard in self.lost:
            raise DamagedRecord(f"its shard is lost: {self.lost[shard]}")
        try:
            return self._read(shard, position)
        except (RuntimeError, UserError):
            return self._read_again(shard, position)

    def _read_again(self, shard: int, position: int) -> bytes:
        """With a fresh reader: one that failed may stay failed. Damage is what such a one finds
        too: otherwise a hiccup would change the batch."""

        def read() -> bytes:
            with self._lock:
                self._close(shard)
            return self._read(shard, position)

        try:
            return self._wait_for(read, UserError)
        except RuntimeError as error:
            raise DamagedRecord(f"unreadable: {error}") from None
        except UserError as error:
            if not self._lose(shard, str(error)):
                raise
            raise DamagedRecord(f"its shard is lost: {error}") from None

    def _lose(self, shard: int, why: str) -> bool:
        """From now on this shard is lost, if as many may be."""
        with self._lock:
            if shard not in self.lost:
                if len(self.lost) + 1 > self._max_lost * len(self.files):
                    return False
                self.lost[shard] = why
                _logger.warning("lost shard passed over: %s", why)
            return True

    def close(self) -> None:
        """Ends all waiting for storage, at once."""
        self._closed.set()

    def __enter__(self) -> ArrayRecordSource:
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    @property
    def shards(self) -> list[Shard]:
        """What each file holds."""
        counts = [end - start for start, end in itertools.pairwise([0, *self._ends])]
        names = [_name(file) for file in self.files]
        return [Shard(*one) for one in zip(names, self._sizes, counts, strict=True)]

    @property
    def lost_files(self) -> dict[str, str]:
        """{file: why} of the shards that this process passes over."""
        return {self.files[shard]: why for shard, why in self.lost.items()}

    @property
    def lost_share(self) -> float:
        """Of the shards: those that this process passes over."""
        return len(self.lost) / len(self.files)

    def locate(self, index: int) -> tuple[str, int]:
        """Where a record lies: its shard's name, and its number there, counted from 0."""
        shard, position = self._locate(index)
        return self.files[shard], position

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
        names = ("files", "_sizes", "_ends", "_patience", "_max_lost", "_memory")
        return {name: self.__dict__[name] for name in names} | {"lost": dict(self.lost)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._make_transient_parts()
        _allow_open_files(len(self.files))

    def _make_transient_parts(self) -> None:
        # Ordered by their last use, if not all may be open.
        self._readers: collections.OrderedDict[int, array_record_module.ArrayRecordReader]
        self._readers, self._held = collections.OrderedDict(), 0  # bytes of their indices
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._troubles = 0  # that are told and waited for now

    def _locate(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        shard = bisect.bisect_right(self._ends, index)
        return shard, index - (self._ends[shard - 1] if shard else 0)

    def _read(self, shard: int, position: int) -> bytes:
        reader = self._readers.get(shard)
        if reader is None or _INDEX_BYTES * len(self) > self._memory:
            reader = self._last_used(shard)
        # The range form takes 4 us, the list form 60 us: the latter goes through a thread pool.
        try:
            data = reader.read(position, position + 1)[0]
        except RuntimeError as error:
            if not may_pass(error):
                raise
            raise TransientError(
                f"{self.files[shard]}: cannot be read now ({_line(error)}); start the same command "
                "again"
            ) from None
        if not data:  # what the module returns beyond the end of a file that has been cut
            raise RuntimeError("no bytes")
        return data

    def _last_used(self, shard: int) -> array_record_module.ArrayRecordReader:
        with self._lock:
            reader = self._readers.get(shard)
            if reader is None:
                reader = self._readers[shard] = self._open(shard)
                self._held += self._index_bytes(shard)
            self._readers.move_to_end(shard)
            while self._held > self._memory and len(self._readers) > 1:
                self._close(next(iter(self._readers)))
            return reader

    def _close(self, shard: int) -> None:
        # Only forgotten: another thread may be reading from it, and C++ closes the file after that.
        if self._readers.pop(shard, None) is not None:
            self._held -= self._index_bytes(shard)

    def _index_bytes(self, shard: int) -> int:
        return _INDEX_BYTES * (self._ends[shard] - (self._ends[shard - 1] if shard else 0))

    def _open(self, shard: int) -> array_record_module.ArrayRecordReader:
        file = self.files[shard]
        try:
            size = _size(file)
        except OSError as error:
            raise TransientError(
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


def _patterns(pattern: str | Sequence[str]) -> list[str]:
    parts = pattern.split(",") if isinstance(pattern, str) else pattern
    patterns = [part.strip() for part in parts if part.strip()]
    if not patterns:
        raise UserError(
            "no data pattern was given: name a glob, a folder or a file of *.arrayrecord shards"
        )
    return patterns


def _expand(pattern: str) -> list[tuple[str, str]]:
    """The files a pattern means, sorted, each with what is known to be wrong with it, or "". Whole
    sets, unless the pattern names a single file."""
    try:
        return _list_files(pattern)
    except OSError as error:
        kind = TransientError if may_pass(error) else UserError
        raise kind(f"data pattern {pattern}: cannot be read ({_cause(error)})") from None


def _list_files(pattern: str) -> list[tuple[str, str]]:
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
        # No glob: it would take a bracket in the folder's own name for a pattern.
        files = [p for p in epath.Path(root).iterdir() if p.name.endswith(SUFFIX)]
        if not files:
            raise UserError(
                f"data folder {pattern}: no *{SUFFIX} file in it; make shards with "
                "tools/make_records.py"
            )
    elif epath.Path(root).exists():
        return [(root, "")]
    else:
        raise UserError(f"data pattern {pattern}: no such file or folder")
    names = sorted(str(file) for file in files)
    if not names:
        raise UserError(f"data pattern {pattern}: matches no file")
    missing = _missing_from_sets(names)
    return sorted([(name, "") for name in names] + [(name, _MISSING) for name in missing])


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


def _missing_from_sets(names: Sequence[str]) -> list[str]:
    """What the sets of ``names``, such as -00000-of-00004, lack.

    Raises:
      UserError: if two sets share their name.
    """
    lacking: list[str] = []
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
            width = len(matches[0]["index"])
            lacking += [
                f"{prefix}-{index:0{width}d}-of-{matches[0]['total']}{suffix}"
                for index in sorted(set(range(total)) - {int(m["index"]) for m in matches})
            ]
    return lacking


def _measure(file: str) -> tuple[int, int]:
    """(bytes, records), the latter from the footer. The module reports most failures as 0 records,
    but without the writer's options, which a healthy empty shard has."""
    for _ in range(_QUICK_TRIES):
        try:
            size = _size(file)
        except OSError as error:
            kind = TransientError if may_pass(error) else UserError
            raise kind(f"{file}: the shard cannot be read ({_cause(error)})") from None
        if size == 0:
            raise UserError(f"{file}: the shard is a file of 0 bytes; write it again")
        try:
            reader = array_record_module.ArrayRecordReader(
                file, options=_READER_OPTIONS, file_reader_buffer_size=_READER_BUFFER
            )
            count, options = reader.num_records(), reader.writer_options_string() or ""
            reader.close()
        except RuntimeError as error:
            if may_pass(error):
                raise TransientError(f"{file}: the shard cannot be read: {_line(error)}") from None
            raise UserError(
                f"{file}: the shard cannot be read: {_line(error)}; it is truncated, damaged or "
                "not an ArrayRecord: write or copy it again"
            ) from None
        if count or options:
            break
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


def _name(file: str) -> str:
    return file.rpartition("/")[2]


def _size(file: str) -> int:
    """Its bytes, of a file that can be opened and read: why one can't, the module does not say.

    Raises:
      OSError: if it cannot.
    """
    path = epath.Path(file)
    with path.open("rb") as readable:
        readable.read(1)
    return path.stat().length


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


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
