"""What a training set of a crawl's list of addresses takes: hours, dollars, bytes. Arithmetic on
rates of one core; ``tests/curation/test_million_scores.py`` measures those of the engine, and
docs/curation.md says where the others are from.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Iterable, Sequence


@dataclasses.dataclass(frozen=True)
class Rates:
    """Seconds of one core for a record, where nothing else is said.

    download: by img2dataset, of an address. convert, statistics: of an image of some 500 pixels.
    match, balance: of a caption. select. link: for a multiplication of two features. alive: the
    share of addresses that still give an image. image_bytes: of an image as it is kept.
    captions: of an image. width: numbers of a feature. features: images a second of an accelerator.
    """

    download: float = 11.5e-3
    convert: float = 1.2e-3
    statistics: float = 0.8e-3
    match: float = 41e-6
    balance: float = 17e-6
    select: float = 20e-6
    link: float = 0.1e-9
    alive: float = 0.7
    image_bytes: float = 50e3
    captions: float = 1.0
    width: int = 384
    features: float = 2000.0


@dataclasses.dataclass(frozen=True)
class Fleet:
    """machines of so many cores and gigabits a second, and accelerators; dollars an hour of one of
    either."""

    machines: int
    cores: int
    gigabits: float
    machine_price: float
    accelerators: int
    accelerator_price: float


@dataclasses.dataclass(frozen=True)
class Stage:
    """records: that it reads. hours: with the whole fleet, of its cores or its network, whichever
    takes longer. written: bytes. memory: bytes of a process, of what grows with the records."""

    name: str
    records: float
    hours: float
    dollars: float
    written: float = 0.0
    memory: float = 0.0


PROBES = 4  # of dedup, by default
ROWS_A_CELL = 256  # that its index is fitted on
STEPS = 25  # of that, at most


def plan(addresses: float, fleet: Fleet, rates: Rates | None = None) -> list[Stage]:
    """The stages from a list of addresses to a balanced selection, in their order. Duplicates by
    bytes are dropped while converting; near-duplicates are looked for among all images at once."""
    rates = rates or Rates()
    images = addresses * rates.alive
    captions = images * rates.captions
    cells = images**0.5
    compared = images * PROBES * cells  # each record to those of its cells
    fitted = 2 * STEPS * min(images, ROWS_A_CELL * cells) * cells  # distances, and sums of rows
    shards = images * rates.image_bytes
    vector = 4.0 * rates.width

    def stage(
        name: str, records: float, seconds: float, read: float, written: float, memory: float = 0.0
    ) -> Stage:
        network = (read + written) * 8 / (fleet.gigabits * 1e9)
        machine_hours = max(seconds / fleet.cores, network) / 3600
        dollars = machine_hours * fleet.machine_price
        return Stage(name, records, machine_hours / fleet.machines, dollars, written, memory)

    hours = images / rates.features / 3600
    features = Stage(
        "features",
        images,
        hours / fleet.accelerators,
        hours * fleet.accelerator_price,
        images * vector,
    )
    return [
        stage("download", addresses, addresses * rates.download, shards, shards),
        stage("convert", images, images * rates.convert, shards, shards),
        stage("score", images, images * rates.statistics, shards, 100 * images),
        features,
        stage(
            "dedup",
            images,
            (compared + fitted) * rates.width * rates.link,
            images * vector,
            images * (vector + 8 * PROBES),
            40 * images,
        ),
        stage("match", images, captions * rates.match, shards, 40 * captions),
        stage("balance", images, captions * rates.balance, shards, shards),
        stage("select", images, images * rates.select, 100 * images, 40 * images, 100 * images),
    ]


def makespan(sizes: Iterable[float], seconds: float, workers: int) -> float:
    """Hours until the last of ``workers`` cores is done with shards of so many records, each taken
    by the core that is free first: what :func:`plan` takes for their mean."""
    free = [0.0] * workers
    for size in sizes:
        heapq.heapreplace(free, free[0] + size * seconds)
    return max(free) / 3600


def table(stages: Sequence[Stage]) -> str:
    """For the eye."""
    lines = [
        f"{'stage':10} {'records':>16} {'hours':>10} {'dollars':>12} {'TB':>9} {'GB memory':>10}"
    ]
    total = Stage(
        "all",
        0,
        sum(s.hours for s in stages),
        sum(s.dollars for s in stages),
        sum(s.written for s in stages),
        max(s.memory for s in stages),
    )
    for one in (*stages, total):
        records = f"{one.records:,.0f}" if one.records else ""
        lines.append(
            f"{one.name:10} {records:>16} {one.hours:>10,.1f} {one.dollars:>12,.0f} "
            f"{one.written / 1e12:>9,.2f} {one.memory / 1e9:>10,.1f}"
        )
    return "\n".join(lines)
