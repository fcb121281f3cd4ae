"""Batches for the training of heads: features made in passing from augmented images, or read from
the cache."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Generator, Mapping
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from webssl_jax.config import UserError
from webssl_jax.data.pipeline import Source, TrainLoader, TrainView
from webssl_jax.evaluators.features import Table
from webssl_jax.model import Model
from webssl_jax.models.features import Want
from webssl_jax.sharding import mesh as meshes

Batch = Mapping[str, jax.Array]
# A batch in parts, one behind the other along b: features, and what losses want besides.
Parts = list[tuple[Any, Batch]]


class Batches(Protocol):
    """Where batches come from. Batch k is a function of k alone, so that training goes on by its
    step number."""

    @property
    def mesh(self) -> Mesh: ...

    def start(self, step: int) -> Generator[Parts, None, None]:
        """Batches from ``step`` on, on the devices, cut over the mesh. All processes call it."""


@dataclasses.dataclass(frozen=True)
class Images:
    """Augmented images, whose features are made in passing.

    view: gives ``image`` (H, W, 3) uint8, and whatever losses want besides. batch: images of an
    update. a_call: images a call of the network at most; 0: all of them. targets:
    {name: (records, ...)}, more that losses want, by the number of the record. The batch holds
    ``substituted`` (b,) too: True where a damaged record's place is taken by another, so that its
    targets are not to be used.

    Raises:
      UserError: for numbers that do not divide.
    """

    model: Model
    source: Source
    view: TrainView
    want: Want
    batch: int
    seed: int
    a_call: int = 0
    targets: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    threads: int = 16

    def __post_init__(self) -> None:
        calls_of(self.mesh, self.batch)

    @property
    def mesh(self) -> Mesh:
        """The model's."""
        if self.model.mesh is None:
            raise ValueError("the model's parameters lie on no mesh: see model.load")
        return self.model.mesh

    def start(self, step: int) -> Generator[Parts, None, None]:
        """See :class:`Batches`."""
        calls = calls_of(self.mesh, self.batch, self.a_call)
        loader = TrainLoader(
            self.source,
            self.view,
            global_batch=self.batch // calls,
            seed=self.seed,
            rows=meshes.local_rows(self.mesh, self.batch // calls),
            start_step=step * calls,
            threads=self.threads,
        )
        with loader:
            while True:
                yield [self._call(next(loader)) for _ in range(calls)]

    def _call(self, rows: dict[str, np.ndarray]) -> tuple[Any, Batch]:
        record = rows.pop("record")
        rows |= {name: of_all[record] for name, of_all in self.targets.items()}
        placed = meshes.to_global(rows, self.mesh)
        return self.model.features(placed.pop("image"), self.want), placed


@dataclasses.dataclass(frozen=True)
class Cached:
    """Features that are there already, in the order of a fixed shuffle; each epoch has its own.

    features: {name: (n, ...)}, and targets: {name: (n, ...)}, in memory or on disk. seed: of the
    shuffle.
    """

    features: Mapping[str, Table]
    targets: Mapping[str, Table]
    mesh: Mesh
    batch: int
    seed: int

    def __post_init__(self) -> None:
        calls_of(self.mesh, self.batch)

    def start(self, step: int) -> Generator[Parts, None, None]:
        """See :class:`Batches`."""
        count = len(next(iter(self.features.values())))
        own = meshes.local_rows(self.mesh, self.batch)
        while True:
            rows = _shuffled(count, self.seed, step * self.batch + own)
            features, targets = (
                meshes.to_global({name: x[rows] for name, x in given.items()}, self.mesh)
                for given in (self.features, self.targets)
            )
            yield [(features, targets)]
            step += 1


def _shuffled(count: int, seed: int, places: np.ndarray) -> np.ndarray:
    """What stands at rising ``places`` (n,) of an endless order of ``count`` rows: (n,) int."""
    epochs, within = np.divmod(places, count)
    return np.concatenate(
        [_epoch(count, seed, e)[within[epochs == e]] for e in np.unique(epochs).tolist()]
    )


@functools.lru_cache(maxsize=2)
def _epoch(count: int, seed: int, number: int) -> np.ndarray:
    """The order of an epoch: made once, where grain's, row by row, takes longer than the steps."""
    return np.random.default_rng([seed, number]).permutation(count)


def calls_of(mesh: Mesh, batch: int, a_call: int = 0) -> int:
    """Calls of the network that make the features of a batch of images, with at most ``a_call`` in
    each; 0: in one.

    Raises:
      UserError: if the batch does not divide over the devices.
    """
    shards = meshes.batch_shards(mesh)
    if batch % shards:
        raise UserError(f"batch = {batch}: does not divide over {shards} devices")
    most, each = max(a_call or batch, shards), batch // shards  # each: of a shard
    return next(n for n in range(1, each + 1) if each % n == 0 and each // n * shards <= most)
