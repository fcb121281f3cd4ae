"""What a linear head says of features of our own: a detector of text, say, that a model learned
from another scorer (``webssl curate fit-head``)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pyarrow as pa

from webssl_jax.config import UserError
from webssl_jax.curation.heads import Head, all_devices
from webssl_jax.data.records import Record
from webssl_jax.model import Model, fill_up, load, to_host
from webssl_jax.models.features import Want

_THREADS = 8  # that decode


@dataclasses.dataclass(frozen=True)
class HeadScorer:
    """``head``: the probability of what the head was fitted to.

    file: as fit-head writes it. model: the one that it was fitted on, for its path. batch: images a
    call of the network.
    """

    file: str = ""
    model: str = ""
    batch: int = 256

    workers: ClassVar[int] = 1  # a process has all devices
    columns: ClassVar[Mapping[str, pa.DataType]] = {"head": pa.float32()}

    def __post_init__(self) -> None:
        if not self.file or not self.model or self.batch < 1:
            raise UserError(
                "--scorer head: give head:file=HEAD.npz,model=PATH, and batch from 1 on"
            )
        Head.load(Path(self.file))

    @property
    def version(self) -> int:
        """Of the head's content: another one in the same file gives other figures."""
        return Head.load(Path(self.file)).digest

    def __call__(self, records: Sequence[Record]) -> list[dict[str, Any]]:
        loaded = _load(self.file, self.model)
        see = loaded.model.preprocess
        with futures.ThreadPoolExecutor(_THREADS) as pool:
            images = np.stack(list(pool.map(lambda record: see(record.image), records)))
        want = Want(cls=loaded.head.feature == "cls", patches=_PATCHES[loaded.head.feature])
        batch = loaded.model.rounded_batch(self.batch)
        seen = to_host(loaded.model.features(fill_up(images, batch), want))
        features = seen.cls if want.cls else seen.patches
        return [{"head": float(p)} for p in loaded.head(features[: len(images)])]


_PATCHES = {"cls": "none", "patches": "mean"}


class _Loaded(NamedTuple):
    head: Head
    model: Model


@functools.lru_cache(1)
def _load(file: str, model: str) -> _Loaded:
    """Once in a worker."""
    loaded = _Loaded(Head.load(Path(file)), load(model, mesh=all_devices()))
    if loaded.model.fingerprint != loaded.head.model:
        raise UserError(
            f"--scorer head:file={file},model={model}: the head was fitted on features of another "
            "model; give that one, or fit a head on this"
        )
    return loaded
