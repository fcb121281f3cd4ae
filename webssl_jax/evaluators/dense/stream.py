"""Records with a value for each pixel, read, checked and sent through a network: whatever their
sizes, the network sees batches of one shape."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

from webssl_jax.config import UserError
from webssl_jax.data import records
from webssl_jax.data.pipeline import DAMAGE, read_each
from webssl_jax.evaluators import work
from webssl_jax.evaluators.batches import calls_of
from webssl_jax.evaluators.datasets import Dataset
from webssl_jax.evaluators.dense import windows
from webssl_jax.evaluators.features import Share
from webssl_jax.evaluators.fit import Fitted, Grid, Recipe
from webssl_jax.model import Model, fill_up
from webssl_jax.models.features import Features, Want
from webssl_jax.sharding import distributed
from webssl_jax.sharding import mesh as meshes
from webssl_jax.telemetry.progress import Progress

Key = TypeVar("Key")
# From images (b, H, W, 3) uint8, cut over the mesh, to an array (b, ...) that is cut so too.
Compute = Callable[[jax.Array], jax.Array]


def read_all(
    dataset: Dataset, see: Callable[[records.Record], Any], indices: np.ndarray, threads: int
) -> Iterator[tuple[int, Any]]:
    """(index, ``see(record)``) of all these records.

    Raises:
      UserError: for the first record that is damaged: a published figure is of all of them.
    """

    def careful(record: records.Record) -> Any:
        try:
            return see(record)
        except DAMAGE as error:
            return error

    expected = iter(indices.tolist())
    for index, found in read_each(dataset.source, careful, indices.tolist(), threads):
        _refuse_gap(dataset, index, next(expected, None))
        if isinstance(found, Exception):
            reason = " ".join(str(found).split())
            raise UserError(
                f"{dataset.source.describe(index)}: {reason}; convert it again, or leave it out"
            )
        yield index, found
    _refuse_gap(dataset, None, next(expected, None))


def _refuse_gap(dataset: Dataset, index: int | None, expected: int | None) -> None:
    if expected is not None and index != expected:
        raise UserError(
            f"{dataset.source.describe(expected)}: damaged record; convert the shard again, or "
            "copy it again"
        )


def program(
    model: Model, fitted: Fitted, grid: str, want: Want, finish: Callable[[Any], jax.Array]
) -> Compute:
    """From images to what ``finish`` makes of the outputs of the first head of a grid."""
    apply = head_program(model, grid, finish)
    return lambda images: apply(fitted, model.features(images, want))


def head_program(model: Model, grid: str, finish: Callable[[Any], jax.Array]) -> Any:
    """The jitted part of :func:`program` that comes after the network: of heads and features."""

    @functools.partial(jax.jit, out_shardings=meshes.batch_sharding(_mesh(model)))
    def apply(fitted: Fitted, features: Features) -> jax.Array:
        of, (params, stats) = dict(fitted.grids)[grid], fitted.head(grid, 0)
        return finish(of.head.apply(params, stats, of.see(features), False)[0])

    return apply


def work_of(
    model: Model,
    want: Want,
    grids: Mapping[str, Grid],
    recipe: Recipe,
    train: tuple[tuple[int, int], int, dict[str, Any]],
    test: tuple[tuple[int, int], int],
    finish: Callable[[Any], jax.Array],
) -> list[work.Program]:
    """What a dense row with one head has the devices do.

    train: (height, width) that the network sees, images of an update, and {name: type} of what is
    told of each of their pixels. test: (height, width), and how many such views there are.
    """
    (height, width), batch, types = train
    calls_of(_mesh(model), batch)  # refused as in training
    images = recipe.steps * batch
    seen, features = work.through("training images", model, want, train[0], images, batch)
    targets = {name: ((batch, height, width), dtype) for name, dtype in types.items()}
    update, fitted = work.updates(model, grids, recipe, features, 1, targets)
    views, made = work.through("test views", model, want, *test, model.rounded_batch(batch))
    (name,) = grids
    apply = head_program(model, name, finish)
    said = work.Program("heads on test views", views.calls, apply, (fitted, made), model.params)
    state = update.arguments[0]
    seen, views = (dataclasses.replace(x, beside=state) for x in (seen, views))
    return [seen, update, views, said]


def enlarged(grid: np.ndarray, height: int, width: int) -> np.ndarray:
    """(h, w) -> (height, width), bilinear, on the host."""
    rows, columns = (windows.interpolation(*x) for x in zip(grid.shape, (height, width)))
    return (rows @ grid @ columns.T).astype(np.float32)


def progress(total: int, what: str) -> Progress:
    """Of this process's images; shown by the first process alone."""
    shown = None if jax.process_index() == 0 else open(os.devnull, "w")
    return Progress(total, what, "images", shown)


def own_share(model: Model, batch: int) -> Share:
    """Which of a batch's rows, and of the images, are this process's."""
    return Share.of(_mesh(model), batch)


def _mesh(model: Model) -> Mesh:
    assert model.mesh is not None  # evaluations lay their models
    return model.mesh


def through(
    model: Model,
    compute: Compute,
    items: Iterator[tuple[Key, np.ndarray]],
    shape: tuple[int, int],
    batch: int,
) -> Iterator[tuple[Key, np.ndarray]]:
    """Yields (key, outputs (k, ...)) of items (key, images (k, H, W, 3) uint8), in order.

    Images of several items share batches. All processes call it, each with its own items, and go
    through to the end.

    Args:
      shape: (H, W) of all images. batch: images a call, over all processes.
    """
    assert model.mesh is not None
    rows = own_share(model, batch).rows
    waiting: list[np.ndarray] = []  # images that were not sent yet
    counts: list[tuple[Key, int]] = []
    made: list[np.ndarray] = []  # outputs of items that are not complete yet
    pending: tuple[jax.Array, int] | None = None
    while True:
        while len(waiting) < rows:
            key_and_images = next(items, None)
            if key_and_images is None:
                break
            key, images = key_and_images
            counts.append((key, len(images)))
            waiting += list(images)
        busy = bool(distributed.gather(bool(waiting)).any())
        if busy:
            now, waiting = waiting[:rows], waiting[rows:]
            whole = np.stack(now) if now else np.zeros((1, *shape, 3), np.uint8)
            placed = meshes.to_global({"x": fill_up(whole, rows)}, model.mesh)["x"]
            sent = compute(placed), len(now)  # the devices work on it while the last is collected
        if pending:
            made += list(meshes.local_part(pending[0])[: pending[1]])
        while counts and len(made) >= counts[0][1]:
            key, count = counts.pop(0)
            yield key, np.stack(made[:count])
            made = made[count:]
        if not busy:
            return
        pending = sent
