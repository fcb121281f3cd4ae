"""What trained heads say of labelled images: of records, through a model, or of features that are
there already.

Shape letters: n images, K heads of a grid.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from webssl_jax.evaluators import datasets
from webssl_jax.evaluators.datasets import Dataset
from webssl_jax.evaluators.features import Cache, Store, Table
from webssl_jax.evaluators.fit import Fitted
from webssl_jax.evaluators.probes.labelled import pick
from webssl_jax.model import Model, fill_up, to_host
from webssl_jax.models.features import Want
from webssl_jax.sharding import mesh as meshes

TOP = 5
_A_CALL = 1024  # rows of features that are there already


class Judged(NamedTuple):
    """Of some labelled images what heads say. labels: (n,) int. said: {grid: (n, K, 5)}, the most
    likely classes of each head, the first one first."""

    labels: np.ndarray
    said: dict[str, np.ndarray]

    def hits(self, grid: str, most: int = 1) -> np.ndarray:
        """(n, K) bool: whether the class is among the ``most`` likely ones."""
        return (self.said[grid][:, :, :most] == self.labels[:, None, None]).any(axis=2)


def judge_images(
    model: Model,
    cache: Cache,
    dataset: Dataset,
    want: Want,
    fitted: Fitted,
    classes: tuple[str, ...],
    known: str,
    allowed: np.ndarray | None = None,
) -> Judged:
    """What heads say of labelled records, as a model sees them. All processes call it.

    Args:
      known: of what the heads depend on besides the model.
      allowed: (C,) bool, the classes that may be said; None: all.

    Raises:
      UserError: for a label that is none of the ``classes``.
    """
    assert model.mesh is not None
    judge = judging(model.mesh)
    may = np.ones(len(classes), bool) if allowed is None else allowed

    def compute(images: jax.Array) -> dict[str, jax.Array]:
        return judge(fitted, model.features(images, want), may)

    heads = sum(len(grid.pairs) for _, grid in fitted.grids)
    name = f"heads-{known}-{datasets.fingerprint(may, [name for name, _ in fitted.grids])}"
    store = cache.of_model(name, model, dataset, compute, 4 * TOP * heads)
    rows, labels = datasets.class_ids(store.labels, classes, dataset)
    said = {name: store.array(name)[rows].astype(int) for name, _ in fitted.grids}
    return Judged(labels, said)


def judge_store(
    mesh: Mesh,
    store: Store,
    dataset: Dataset,
    fitted: Fitted,
    parts: Collection[str],
    classes: tuple[str, ...],
    allowed: np.ndarray | None = None,
) -> Judged:
    """:func:`judge_images` where the features of labelled records are kept. parts: those that heads
    see."""
    rows, labels = datasets.class_ids(store.labels, classes, dataset)
    tables = {part: pick(store.array(part), rows) for part in parts}
    return judge_tables(mesh, fitted, tables, labels, len(classes), allowed)


def judge_tables(
    mesh: Mesh,
    fitted: Fitted,
    tables: Mapping[str, Table],
    labels: np.ndarray,
    classes: int,
    allowed: np.ndarray | None = None,
) -> Judged:
    """What heads say of features that are there already, rows of ``labels`` (n,). allowed: as of
    :func:`judge_images`."""
    may = np.ones(classes, bool) if allowed is None else allowed
    batch = -(-_A_CALL // meshes.batch_shards(mesh)) * meshes.batch_shards(mesh)
    parts = []
    for start in range(0, len(labels), batch):
        rows = {name: x[start : start + batch] for name, x in tables.items()}
        count = len(next(iter(rows.values())))
        placed = {name: meshes.from_whole(fill_up(x, batch), mesh) for name, x in rows.items()}
        said = to_host(judging(mesh)(fitted, placed, may))
        parts.append({name: x[:count] for name, x in said.items()})
    return Judged(labels, {name: np.concatenate([x[name] for x in parts]) for name in parts[0]})


@functools.lru_cache(maxsize=8)
def judging(mesh: Mesh) -> Callable[[Fitted, Any, np.ndarray], dict[str, jax.Array]]:
    """(heads, features, allowed classes (C,) bool) -> {grid: (b, K, 5) int}."""

    def judge(fitted: Fitted, features: Any, allowed: jax.Array) -> dict[str, jax.Array]:
        def say(logits: jax.Array) -> jax.Array:
            _, classes = jax.lax.top_k(jnp.where(allowed, logits, -jnp.inf), min(TOP, len(allowed)))
            return classes

        said = fitted.measure(features, say)
        return {name: jnp.moveaxis(x, 0, 1) for name, x in said.items()}

    return jax.jit(judge, out_shardings=meshes.batch_sharding(mesh))


def mean_per_class(said: np.ndarray, labels: np.ndarray) -> float:
    """The mean over classes of the share of their images (n) of which ``said`` (n, most) holds the
    class, ``labels`` (n,). A class without an image is left out; but with ``most`` = 1 it counts as
    0 where an image is taken for it, as in DINOv2 (torchmetrics)."""
    hits = (said == labels[:, None]).any(axis=1)
    counts = np.bincount(labels, minlength=int(said.max()) + 1)
    share = np.bincount(labels, hits, len(counts)) / np.maximum(counts, 1)
    return float(share[np.union1d(labels, said) if said.shape[1] == 1 else counts > 0].mean())
