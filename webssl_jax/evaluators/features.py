"""Features of a whole data set: streamed from its records, made on all devices of all hosts, kept
on disk in chunks.

Each process reads its own chunks of the records, so memory does not depend on their number; the
last batch is filled up. A chunk is written whole or not at all, and one that is there is not made
again: after a kill, extraction goes on where it was. Finished features are found again by what they
are of: (weights, records, preprocessing, what was wanted). Whoever wants a part of what is there
gets it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from webssl_jax.config import UserError
from webssl_jax.data import records
from webssl_jax.data.pipeline import read_each
from webssl_jax.data.views import Preprocess
from webssl_jax.evaluators import outcome
from webssl_jax.evaluators.datasets import Dataset
from webssl_jax.evaluators.outcome import Outcome
from webssl_jax.files import write_json
from webssl_jax.model import Model, fill_up, text_of
from webssl_jax.models.features import PATCHES, Want
from webssl_jax.sharding import distributed
from webssl_jax.sharding import mesh as meshes
from webssl_jax.telemetry.progress import Progress

CHUNK_BYTES = 64 * 2**20
MOST_ROWS = 8192  # of a chunk
_PROTOCOL = 1  # raised whenever the same weights and records would get other features
_DONE = "done.json"
# Folders of what is of no model, so that several runs may have them in common.
SHARED = ("outcomes", "texts")
TOKENS = "tokens"  # the array of all patches
# One batch: from images (b, H, W, 3) uint8 of this process to {name: (b, ...)} of this process.
Compute = Callable[[np.ndarray], dict[str, Any]]
log = logging.getLogger(__name__)


class Row(NamedTuple):
    """What is kept of a record besides its features."""

    number: int
    label: str | None
    captions: tuple[str, ...]


class Store:
    """Finished features in ``folder``; rows are the readable records, in order."""

    def __init__(self, folder: pathlib.Path):
        self._chunks = sorted(folder.glob("chunk-*[0-9]"))
        self.rows: list[Row] = []
        self._ends = []
        for chunk in self._chunks:
            found = json.loads((chunk / "rows.json").read_text())
            self.rows += [Row(index, label, tuple(captions)) for index, label, captions in found]
            self._ends.append(len(self.rows))

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def labels(self) -> list[str | None]:
        return [row.label for row in self.rows]

    def array(self, name: str) -> Rows:
        """The array of a name, still on disk."""
        parts = [np.load(chunk / f"{name}.npy", mmap_mode="r") for chunk in self._chunks]
        return Rows(tuple(part for part in parts if len(part)))


class Table(Protocol):
    """An array (n, d) in memory or on disk; :class:`Rows` and numpy's arrays are such."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Any, /) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class Rows:
    """Arrays (n_i, ...) one behind the other, read where they are asked for. picked: of all rows
    those with these numbers; None for all."""

    parts: tuple[np.ndarray, ...]
    picked: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        count = sum(map(len, self.parts)) if self.picked is None else len(self.picked)
        return (count, *self.parts[0].shape[1:])

    @property
    def dtype(self) -> np.dtype:
        return self.parts[0].dtype

    def __len__(self) -> int:
        return self.shape[0]

    def pick(self, rows: np.ndarray) -> Rows:
        """Only these rows, still on disk. rows: (k,) integers."""
        return Rows(self.parts, rows if self.picked is None else self.picked[rows])

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        """Some rows, as an array in memory. rows: a slice, or (k,) integers."""
        wanted = np.arange(len(self))[rows] if isinstance(rows, slice) else np.asarray(rows)
        if self.picked is not None:
            wanted = self.picked[wanted]
        starts = np.cumsum([0, *map(len, self.parts)])
        out = np.empty((len(wanted), *self.shape[1:]), self.dtype)
        owner = np.searchsorted(starts, wanted, side="right") - 1
        for i in np.unique(owner):
            mine = owner == i
            out[mine] = self.parts[i][wanted[mine] - starts[i]]
        return out


@dataclasses.dataclass(frozen=True)
class Cache:
    """Features kept in ``folder``, which all processes see.

    batch: images a call of the network, over all processes. threads: decoding threads a process.
    """

    folder: pathlib.Path
    batch: int = 256
    threads: int = 16

    def pooled(self, model: Model, dataset: Dataset, want: Want) -> Store:
        """CLS and mean patches: arrays ``cls`` and ``patches`` (n, D), and of each block that is
        wanted ``cls@BLOCK`` and ``patches@BLOCK``, with 0-based numbers; where the grid of patches
        is wanted, ``tokens`` (n, N, D) of the last block too. All processes call it.

        Raises:
          UserError: if a feature is not finite, no record can be read, or the disk is too small.
        """
        if not want.blocks_norm or want.pad:
            raise ValueError(f"features that are kept are normed, of images as they are: {want}")
        want = _absolute(model, want)
        kept = self._of(model.fingerprint, dataset, model.preprocess)
        there = sorted(done.parent.name for done in kept.glob(f"*/{_DONE}"))
        found = next((name for name in there if _covers(name, want)), "")
        if found := distributed.from_first(found):
            return Store(kept / found)

        def compute(images: np.ndarray) -> dict[str, Any]:
            seen = model.features(meshes.to_global({"x": images}, _mesh(model))["x"], want)
            found = {"cls": seen.cls, "patches": _mean(seen.patches)}
            if want.patches == "grid":
                assert seen.patches is not None
                found[TOKENS] = seen.patches.reshape(len(seen.patches), -1, seen.patches.shape[-1])
            for block, (cls, patches) in seen.blocks.items():
                found |= {f"cls@{block}": cls, f"patches@{block}": _mean(patches)}
            return {name: x for name, x in found.items() if x is not None}

        vectors = (want.cls + (want.patches != "none")) * (1 + len(want.blocks))
        if want.patches == "grid":
            vectors += math.prod(model.encoder.grid_of(*model.preprocess.shape))
        size = 4 * model.encoder.width * vectors
        return self._extract(kept / _name(want), model, dataset, compute, size)

    def embeddings(self, model: Model, dataset: Dataset) -> Store:
        """Images in the space that they share with texts: an array ``image`` (n, E). All processes
        call it; raises as :meth:`pooled`."""
        kept = self._of(model.fingerprint, dataset, model.preprocess) / "embeddings"
        if _is_done(kept):
            return Store(kept)

        text = text_of(model)

        def compute(images: np.ndarray) -> dict[str, Any]:
            placed = meshes.to_global({"x": images}, _mesh(model))["x"]
            return {"image": text.embed_images(placed)}

        size = 4 * text.config.embedding
        return self._extract(kept, model, dataset, compute, size)

    def of_model(
        self,
        name: str,
        model: Model,
        dataset: Dataset,
        compute: Callable[[jax.Array], dict[str, jax.Array]],
        row_bytes: int,
    ) -> Store:
        """What ``compute`` makes of preprocessed images (b, H, W, 3) uint8 on the devices: {array:
        (b, ...)}, cut over the model's mesh. name: says all that ``compute`` depends on besides
        the model. All processes call it; raises as :meth:`pooled`."""
        kept = self._of(model.fingerprint, dataset, model.preprocess) / name
        if _is_done(kept):
            return Store(kept)

        def placed(images: np.ndarray) -> dict[str, Any]:
            return compute(meshes.to_global({"x": images}, _mesh(model))["x"])

        return self._extract(kept, model, dataset, placed, row_bytes)

    def heads(self, model: Model, name: str) -> pathlib.Path:
        """Where heads trained on a model's features are kept, as long as its features are. name:
        says all that they depend on besides the model."""
        return self.folder / f"{model.fingerprint}-heads-{name}"

    def of_pixels(
        self,
        name: str,
        preprocess: Preprocess,
        dataset: Dataset,
        compute: Callable[[np.ndarray], dict[str, np.ndarray]],
        row_bytes: int,
    ) -> Store:
        """What ``compute`` makes of preprocessed images (b, H, W, 3) uint8 on the host, without a
        model. All processes call it; raises as :meth:`pooled`."""
        preprocess = preprocess.for_pixels()
        kept = self._of(name, dataset, preprocess) / name
        if _is_done(kept):
            return Store(kept)
        return self._extract(kept, preprocess, dataset, compute, row_bytes)

    def of_texts(
        self, name: str, texts: Sequence[str], compute: Callable[[], np.ndarray]
    ) -> np.ndarray:
        """What ``compute`` makes of texts (n, ...), read from disk. name: says all that it depends
        on besides the texts. All processes call it.

        Raises:
          UserError: if it cannot be written.
        """
        digest = hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).hexdigest()[:16]
        path = self.folder / "texts" / f"{name}-{digest}.npy"
        if not distributed.first_says(path.exists()):
            made = compute()
            with distributed.error_barrier():
                if jax.process_index() == 0:
                    _write_array(path, made)
        return np.load(path, mmap_mode="r")

    def remember(self, name: str, make: Callable[[], dict[str, Outcome]]) -> dict[str, Outcome]:
        """The outcomes that ``make`` gives, kept under ``name``, which says all they depend on. All
        processes call it."""
        path = self.folder / "outcomes" / f"{name}.json"
        if distributed.first_says(path.exists()):
            return outcome.read(path).baselines
        made = make()
        with distributed.error_barrier():
            if jax.process_index() == 0:
                Outcome((), {}, {}, name, baselines=made).write(path)
        return made

    def forget(self, model: Model) -> None:
        """Removes the features of a model, for which all is evaluated."""
        if jax.process_index() == 0:
            for kept in self.folder.glob(f"{model.fingerprint}-*"):
                shutil.rmtree(kept, ignore_errors=True)

    def _of(self, weights: str, dataset: Dataset, preprocess: Preprocess) -> pathlib.Path:
        view = hashlib.sha256(f"{_PROTOCOL} {preprocess}".encode()).hexdigest()[:8]
        return self.folder / f"{weights}-{dataset.identity}-{view}"

    def _extract(
        self,
        folder: pathlib.Path,
        subject: Model | Preprocess,
        dataset: Dataset,
        compute: Compute,
        row_bytes: int,
    ) -> Store:
        if isinstance(subject, Model):
            preprocess, mesh, on_devices = subject.preprocess, _mesh(subject), True
        else:
            preprocess, mesh, on_devices = subject, None, False
        share = Share.of(mesh, self.batch)
        size = max(self.batch, min(MOST_ROWS, CHUNK_BYTES // row_bytes // 256 * 256))
        chunks = [dataset.indices[i : i + size] for i in range(0, len(dataset), size)]
        with distributed.error_barrier():
            if jax.process_index() == 0:
                _begin(folder, size)
        there = np.array([_chunk(folder, i).is_dir() for i in range(len(chunks))])
        todo = np.flatnonzero(~distributed.gather(there.tolist())[0].astype(bool)).tolist()
        with distributed.error_barrier():
            if jax.process_index() == 0:
                _check_room(folder, sum(len(chunks[i]) for i in todo), row_bytes)
        shown = None if jax.process_index() == 0 else open(os.devnull, "w")
        own_total = sum(len(chunks[i]) for i in todo[share.group :: share.groups])
        each = f" of one of {share.groups} parts" if share.groups > 1 else ""
        progress = Progress(own_total, "features:", f"images{each}", shown)
        for start in range(0, len(todo), share.groups):
            now = todo[start : start + share.groups]  # one chunk for each group of processes
            own = now[share.group] if share.group < len(now) else None
            indices = chunks[own] if own is not None else np.zeros(0, int)
            see = _Stream(dataset, preprocess, indices, self.threads)
            with contextlib.closing(see):
                feed = _Feed(share.rows, preprocess.shape, on_devices, progress)
                arrays, rows = _run(see, compute, feed)
            progress.update(len(indices) - len(rows))  # passed over
            with distributed.error_barrier():
                _check(arrays, dataset, rows)
                if own is not None and share.writes:
                    _write(_chunk(folder, own), arrays, rows)
        progress.close()
        with distributed.error_barrier():
            store = Store(folder)
            if not len(store):
                raise UserError(
                    f"no {dataset.needed_word} image can be read in {len(dataset):,} records "
                    f"({dataset.source.describe(0)}, ...); give others, or leave this evaluation "
                    "out"
                )
            if jax.process_index() == 0:
                write_json(folder / _DONE, {"rows": len(store)})
        return store


class Share(NamedTuple):
    """This process's part of a batch. rows: of each batch. group, groups: processes that hold the
    same rows are one group. writes: whether this one writes for its group."""

    rows: int
    group: int
    groups: int
    writes: bool

    @classmethod
    def of(cls, mesh: Mesh | None, batch: int) -> Share:
        me, count = jax.process_index(), jax.process_count()
        if mesh is None:
            return cls(-(-batch // count), me, count, True)
        shards = meshes.batch_shards(mesh)
        if batch % shards:
            raise UserError(f"batch = {batch}: does not divide over {shards} batch shards")
        rows = meshes.local_rows(mesh, batch)
        firsts = distributed.gather(int(rows[0])).tolist()
        order = sorted(set(firsts))
        return cls(len(rows), order.index(firsts[me]), len(order), firsts.index(firsts[me]) == me)


class _Stream:
    """Preprocessed images of some records, in order, in parts of a stated number."""

    def __init__(self, dataset: Dataset, preprocess: Preprocess, indices: np.ndarray, threads: int):
        def see(record: records.Record) -> tuple[np.ndarray, str | None, tuple[str, ...]] | None:
            if not getattr(record, dataset.needed):
                return None
            return preprocess(record.image), record.label, record.captions

        numbers = [int(i) for i in indices]
        self._found = read_each(dataset.source, see, numbers, threads)

    def take(self, count: int) -> tuple[list[np.ndarray], list[Row]]:
        """At most so many more."""
        images, rows = [], []
        for index, (image, label, captions) in self._found:
            images.append(image)
            rows.append(Row(index, label, captions))
            if len(images) == count:
                break
        return images, rows

    def close(self) -> None:
        self._found.close()


class _Feed(NamedTuple):
    """How a chunk goes through: in batches of ``batch`` images of this process, of ``shape``.
    on_devices: all processes take equally many steps, with full batches."""

    batch: int
    shape: tuple[int, ...]
    on_devices: bool
    progress: Progress


def _run(stream: _Stream, compute: Compute, feed: _Feed) -> tuple[dict[str, np.ndarray], list[Row]]:
    """All batches of a chunk; the devices work on one while the host reads the next."""
    parts: list[dict[str, np.ndarray]] = []
    rows: list[Row] = []
    pending: tuple[dict[str, Any], int] | None = None

    def collect(made: dict[str, Any], n: int) -> None:
        own = {
            name: (meshes.local_part(x) if isinstance(x, jax.Array) else x)[:n]
            for name, x in made.items()
        }
        parts.append({name: np.asarray(x, np.float32) for name, x in own.items()})

    while True:
        images, found = stream.take(feed.batch)
        # As many steps as the process with the most images needs, and at least one.
        busy = distributed.gather(bool(images)).any() if feed.on_devices else bool(images)
        if pending and not busy:
            break
        rows += found
        whole = np.stack(images) if images else np.zeros((1, *feed.shape, 3), np.uint8)
        made = compute(fill_up(whole, feed.batch) if feed.on_devices else whole)
        if pending:
            collect(*pending)
        pending = made, len(images)
        feed.progress.update(len(images))
    collect(*pending)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}, rows


def _begin(folder: pathlib.Path, size: int) -> None:
    """Makes the folder for chunks of ``size`` rows. Those of another size, which a killed
    extraction with other batches may have left, do not go with them."""
    mark = folder / "chunk_rows.json"
    if mark.exists() and json.loads(mark.read_text()) != size:
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(mark, size)


def _check_room(folder: pathlib.Path, images: int, row_bytes: int) -> None:
    """Refuses before hours of work what would fill the disk."""
    needed, free = images * row_bytes, shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{folder}: features of {images:,} images need {needed / 2**30:,.1f} GiB, and "
            f"{free / 2**30:,.1f} are free; make room, or judge by fewer (max_images)"
        )


def _check(arrays: dict[str, np.ndarray], dataset: Dataset, rows: list[Row]) -> None:
    for name, array in arrays.items():
        bad = np.flatnonzero(~np.isfinite(array).all(axis=tuple(range(1, array.ndim))))
        if len(bad):
            raise UserError(
                f"evaluation: NaN or infinity in the features ({name}) of "
                f"{dataset.source.describe(rows[bad[0]].number)}; the network has diverged, or its "
                "number format is too small for it"
            )


def _write(folder: pathlib.Path, arrays: dict[str, np.ndarray], rows: list[Row]) -> None:
    staging = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        for name, array in arrays.items():
            np.save(staging / f"{name}.npy", array)
        (staging / "rows.json").write_text(json.dumps(rows))
        os.replace(staging, folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror})") from error


def _write_array(path: pathlib.Path, array: np.ndarray) -> None:
    staging = path.with_name(f"{path.stem}.{os.getpid()}.partial.npy")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(staging, array)
        os.replace(staging, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error


def _is_done(folder: pathlib.Path) -> bool:
    """On all processes what the first one sees."""
    return distributed.first_says((folder / _DONE).exists())


def _chunk(folder: pathlib.Path, number: int) -> pathlib.Path:
    return folder / f"chunk-{number:06d}"


def _mesh(model: Model) -> Mesh:
    if model.mesh is None:
        raise ValueError("the model's parameters lie on no mesh: see model.load")
    return model.mesh


def _mean(patches: jax.Array | None) -> jax.Array | None:
    """Of a grid (b, h, w, D) the mean (b, D)."""
    return patches if patches is None or patches.ndim == 2 else patches.mean(axis=(1, 2))


def _absolute(model: Model, want: Want) -> Want:
    depth = model.encoder.depth
    blocks = tuple(sorted({block % depth for block in want.blocks}))
    return dataclasses.replace(want, blocks=blocks)


def _name(want: Want) -> str:
    blocks = "+".join(map(str, want.blocks))
    return f"{'cls' if want.cls else 'no'}-{want.patches}-{blocks or 'last'}"


def _covers(name: str, want: Want) -> bool:
    """Whether the features in a folder of that name hold all that is wanted."""
    cls, _, rest = name.partition("-")
    patches, _, blocks = rest.partition("-")
    there = set() if blocks in ("", "last") else set(blocks.split("+"))
    return (
        (cls == "cls" or not want.cls)
        and patches in PATCHES[PATCHES.index(want.patches) :]
        and there >= {str(block) for block in want.blocks}
    )


def union(wants: Iterator[Want] | Sequence[Want]) -> Want:
    """The least that covers all of them."""
    wants = list(wants)
    return Want(
        cls=any(want.cls for want in wants),
        patches=max((want.patches for want in wants), key=PATCHES.index),
        blocks=tuple(sorted({block for want in wants for block in want.blocks})),
    )
