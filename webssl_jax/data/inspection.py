"""What is in a set of records: counts, sizes, texts, annotations, duplicates, damage, and a fair
sample.

The records are read in spans, by as many processes as there are cores. A span's tally is plain
counts, so tallies add up, in the order of the spans: the result does not depend on the processes.
Memory is bounded: 17 bytes a record for the digests by which duplicates are found, 8 more for the
shards' own indices, and at most ``MAX_NAMES`` names of sources, of labels and of annotations.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import heapq
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from webssl_jax.data import annotations as annotation
from webssl_jax.data import processes, records
from webssl_jax.data.decode import DecodeError, format_of, open_image
from webssl_jax.data.sources import ArrayRecordSource, DamagedRecord

SPAN = 2048  # records
MAX_NAMES = 10_000
OTHERS = "(others)"
SIDE_EDGES = (32, 64, 128, 224, 256, 384, 512, 768, 1024, 2048)
CAPTION_EDGES = (0, 16, 32, 64, 128, 256, 512, 1024)
COUNT_EDGES = (0, 1, 2, 3, 5, 10)
EXAMPLES = 5


@dataclasses.dataclass(frozen=True)
class DamagedPlace:
    """A damaged record: its global index, where it lies, its key if that can be read, and why."""

    index: int
    shard: str
    record: int
    key: str | None
    reason: str

    def __str__(self) -> str:
        key = "" if self.key is None else f" (key {self.key!r})"
        return f"{self.shard} record {self.record}{key}: {self.reason}"


@dataclasses.dataclass
class AnnotationTally:
    """Counts over the annotations of one name."""

    count: int = 0
    bytes: int = 0
    largest_bytes: int = 0
    formats: collections.Counter = dataclasses.field(default_factory=collections.Counter)

    def add(self, other: AnnotationTally) -> None:
        self.count += other.count
        self.bytes += other.bytes
        self.largest_bytes = max(self.largest_bytes, other.largest_bytes)
        self.formats.update(other.formats)


@dataclasses.dataclass
class Tally:
    """Counts over a span of records. Histograms are {upper edge, or None above the last: count}.

    ``drawn``: {source: [(priority, index), ...]}, the candidates of a sample. The digests are those
    of the whole records of the span, ``indices`` their places in the source.
    """

    count: int = 0
    image_bytes: int = 0
    largest_image_bytes: int = 0
    captions: int = 0
    sides: list[int] | None = None  # narrowest and widest width, lowest and highest height
    shorter_side: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    formats: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    caption_characters: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    captions_per_image: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    sources: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    labels: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    unlabelled: int = 0
    annotations: dict[str, AnnotationTally] = dataclasses.field(default_factory=dict)
    damaged: list[DamagedPlace] = dataclasses.field(default_factory=list)
    drawn: dict[str, list[tuple[float, int]]] = dataclasses.field(default_factory=dict)
    indices: list[int] = dataclasses.field(default_factory=list)
    key_digests: list[int] = dataclasses.field(default_factory=list)
    image_digests: list[int] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Report:
    """The tally of all records. ``duplicate_keys`` and ``duplicate_images``: (records beyond the
    first of their kind, examples as groups of indices)."""

    tally: Tally
    damaged: int
    duplicate_keys: tuple[int, list[list[int]]]
    duplicate_images: tuple[int, list[list[int]]]

    def to_json(self, source: ArrayRecordSource) -> dict[str, Any]:
        """Plain JSON for ``--json``, without the single damages."""
        tally = self.tally
        low_w, high_w, low_h, high_h = tally.sides or [0] * 4

        def examples(groups: Sequence[Sequence[int]]) -> list[list[dict[str, Any]]]:
            return [[_place(source, index) for index in group] for group in groups]

        return {
            "shards": len(source.files),
            "records": len(source),
            "whole": tally.count,
            "damaged": self.damaged,
            "image_bytes": tally.image_bytes,
            "largest_image_bytes": tally.largest_image_bytes,
            "width": {"min": low_w, "max": high_w},
            "height": {"min": low_h, "max": high_h},
            "shorter_side": _binned(tally.shorter_side, SIDE_EDGES),
            "formats": _ranked(tally.formats),
            "captions": tally.captions,
            "captions_per_image": _binned(tally.captions_per_image, COUNT_EDGES),
            "caption_characters": _binned(tally.caption_characters, CAPTION_EDGES),
            "sources": _ranked(tally.sources),
            "labels": _ranked(tally.labels),
            "unlabelled": tally.unlabelled,
            "annotations": {
                name: {
                    "records": found.count,
                    "share": found.count / tally.count,
                    "bytes": found.bytes,
                    "largest_bytes": found.largest_bytes,
                    "formats": _ranked(found.formats),
                }
                for name, found in sorted(tally.annotations.items())
            },
            "duplicate_keys": {
                "records": self.duplicate_keys[0],
                "examples": examples(self.duplicate_keys[1]),
            },
            "duplicate_images": {
                "records": self.duplicate_images[0],
                "examples": examples(self.duplicate_images[1]),
            },
        }


def inspect(
    source: ArrayRecordSource,
    *,
    verify: bool = False,
    sample: int = 0,
    seed: int = 0,
    workers: int = 1,
    on_damage: Callable[[DamagedPlace], None] = lambda place: None,
    progress: Callable[[int], None] = lambda n: None,
) -> Report:
    """Reads every record.

    Args:
      verify: also decodes every image and compares its size with what the record says, and reads
        its annotations (:func:`annotations.check`). Without it a record is damaged if its bytes do
        not match their checksum or are no record.
      sample: candidates kept for a sample of so many images, see :func:`draw`.
      workers: processes; 1 reads in this one.
      on_damage: called for every damaged record, in order.
      progress: called with the number of records read since the last call.

    Raises:
      UserError: if a shard changes meanwhile, or a worker process dies.
    """
    total = Tally()
    whole = np.zeros(len(source), bool)
    digests = np.zeros((2, len(source)), np.uint64)
    damaged = 0
    spans = ((at, min(at + SPAN, len(source))) for at in range(0, len(source), SPAN))
    examine = _Examination(source, verify, sample, seed)
    for (start, stop), tally in processes.in_order(examine, spans, workers):
        _add(total, tally, sample)
        whole[tally.indices] = True
        digests[:, tally.indices] = tally.key_digests, tally.image_digests
        damaged += len(tally.damaged)
        for place in tally.damaged:
            on_damage(place)
        progress(stop - start)
    keys, images = (_duplicates(row, whole) for row in digests)
    return Report(total, damaged, keys, images)


def draw(tally: Tally, sample: int) -> list[int]:
    """``sample`` indices, as evenly over the sources as these allow, sorted by source and place.
    They depend on the seed and the records alone."""
    queues = [[index for _, index in sorted(drawn)] for _, drawn in sorted(tally.drawn.items())]
    taken: list[list[int]] = [[] for _ in queues]
    left = sample
    while left and any(queues):
        for queue, mine in zip(queues, taken, strict=True):
            if queue and left:
                mine.append(queue.pop(0))
                left -= 1
    return [index for mine in taken for index in sorted(mine)]


@dataclasses.dataclass(frozen=True)
class _Examination:
    """What is done with a span, in this process or in a worker."""

    source: ArrayRecordSource
    verify: bool
    sample: int
    seed: int

    def __call__(self, span: tuple[int, int]) -> Tally:
        tally = Tally()
        start, stop = span
        priorities = np.random.default_rng([self.seed, start]).random(stop - start).tolist()
        for index, priority in zip(range(start, stop), priorities, strict=True):
            record = None
            try:
                record = records.decode(self.source[index])
                if self.verify:
                    _check_image(record)
                    annotation.check(record)
            except (DamagedRecord, records.RecordError, DecodeError) as error:
                file, position = self.source.locate(index)
                key = None if record is None else record.key
                reason = " ".join(str(error).split())
                tally.damaged.append(DamagedPlace(index, file, position, key, reason))
                continue
            _count(tally, record, index)
            if self.sample:
                drawn = tally.drawn.setdefault(_bounded(tally.drawn, record.source), [])
                drawn.append((priority, index))
        tally.drawn = {n: heapq.nsmallest(self.sample, drawn) for n, drawn in tally.drawn.items()}
        return tally


def _check_image(record: records.Record) -> None:
    opened = open_image(record.image)
    if (opened.width, opened.height) != (record.width, record.height):
        raise records.RecordError(
            f"the record says {record.width} x {record.height} pixels, its image has "
            f"{opened.width} x {opened.height}"
        )
    opened.decode()


def _count(tally: Tally, record: records.Record, index: int) -> None:
    tally.count += 1
    tally.image_bytes += len(record.image)
    tally.largest_image_bytes = max(tally.largest_image_bytes, len(record.image))
    w, h = record.width, record.height
    tally.sides = _widen(tally.sides, [w, w, h, h])
    tally.shorter_side[_edge(min(w, h), SIDE_EDGES)] += 1
    tally.formats[format_of(record.image) or "other"] += 1
    tally.captions += len(record.captions)
    tally.captions_per_image[_edge(len(record.captions), COUNT_EDGES)] += 1
    for caption in record.captions:
        tally.caption_characters[_edge(len(caption), CAPTION_EDGES)] += 1
    tally.sources[_bounded(tally.sources, record.source)] += 1
    if record.label is None:
        tally.unlabelled += 1
    else:
        tally.labels[_bounded(tally.labels, record.label)] += 1
    for name, data in record.annotations.items():
        formats = collections.Counter([annotation.format_of(data)])
        one = AnnotationTally(1, len(data), len(data), formats)
        _annotation_tally(tally, name).add(one)
    tally.indices.append(index)
    tally.key_digests.append(_digest(record.key.encode("utf-8", "surrogatepass")))
    tally.image_digests.append(_digest(record.image))


def _add(total: Tally, part: Tally, sample: int) -> None:
    """Adds what is bounded. Digests and damages are taken from the part by the caller."""
    for name in ("count", "image_bytes", "captions", "unlabelled"):
        setattr(total, name, getattr(total, name) + getattr(part, name))
    total.largest_image_bytes = max(total.largest_image_bytes, part.largest_image_bytes)
    if part.sides:
        total.sides = _widen(total.sides, part.sides)
    for name in ("shorter_side", "formats", "caption_characters", "captions_per_image"):
        getattr(total, name).update(getattr(part, name))
    for name in ("sources", "labels"):
        counts = getattr(total, name)
        for key, n in getattr(part, name).items():
            counts[_bounded(counts, key)] += n
    for name, found in part.annotations.items():
        _annotation_tally(total, name).add(found)
    for key, drawn in part.drawn.items():
        key = _bounded(total.drawn, key)
        total.drawn[key] = heapq.nsmallest(sample, total.drawn.get(key, []) + drawn)


def _annotation_tally(tally: Tally, name: str) -> AnnotationTally:
    return tally.annotations.setdefault(_bounded(tally.annotations, name), AnnotationTally())


def _duplicates(digests: np.ndarray, whole: np.ndarray) -> tuple[int, list[list[int]]]:
    """(records beyond the first with their digest, the first few groups of indices).

    64 bits: among a billion records one false pair is expected in 37 runs, among a million none.
    """
    places = np.flatnonzero(whole)
    order = places[np.argsort(digests[places], kind="stable")]
    again = digests[order[1:]] == digests[order[:-1]]
    # A group begins where a repeated digest was not yet repeated before.
    begins = np.flatnonzero(again & ~np.concatenate([[False], again[:-1]])[: len(again)])
    first = begins[np.argsort(order[begins])][:EXAMPLES]
    groups = []
    for at in first.tolist():
        end = at + 1
        while end < len(order) and again[end - 1] and end - at < EXAMPLES:
            end += 1
        groups.append(order[at:end].tolist())
    return int(again.sum()), groups


def _place(source: ArrayRecordSource, index: int) -> dict[str, Any]:
    file, position = source.locate(index)
    return {"shard": file, "record": position, "key": records.decode(source[index]).key}


def _digest(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def _bounded(counts: Mapping[str, Any], name: str) -> str:
    return name if name in counts or len(counts) < MAX_NAMES else OTHERS


def _widen(limits: list[int] | None, by: list[int]) -> list[int]:
    if limits is None:
        return by
    return [f(a, b) for f, a, b in zip((min, max, min, max), limits, by, strict=True)]


def _edge(value: int, edges: Sequence[int]) -> int | None:
    return next((edge for edge in edges if value <= edge), None)


def _binned(counts: Mapping[int | None, int], edges: Sequence[int]) -> dict[str, int]:
    """{"<= 32": n, ..., "> 2048": n}, without empty bins."""
    names = {edge: f"<= {edge}" for edge in edges} | {None: f"> {edges[-1]}"}
    return {name: counts[edge] for edge, name in names.items() if counts[edge]}


def _ranked(counts: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
