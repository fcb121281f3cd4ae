"""k-means over features that lie on all devices: greedy k-means++ (Arthur and Vassilvitskii 2007),
then Lloyd's steps. And a sample that is even in the clusters of several levels, as Vo et al. (2024,
arXiv 2405.15613) draw it.

Shape letters: N rows, filled up so that they divide over the devices, n of them real; D columns, K
clusters.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from webssl_jax.evaluators.sharded import AXIS, exact, row_mesh

CHUNK = 4096  # rows a device compares to all centroids at a time
STEPS = 25  # of Lloyd's, at most
TOLERANCE = 1e-4  # of the inertia: a step that lowers it by less is the last


class KMeans(NamedTuple):
    """centroids (K, D) float32; sizes (K,): rows of each; inertia: their mean squared distance to
    it; steps: of Lloyd's."""

    centroids: np.ndarray
    sizes: np.ndarray
    inertia: float
    steps: int


def kmeans(rows: np.ndarray, count: int, seed: int, mesh: Mesh | None = None) -> KMeans:
    """(n, D) float32, all at once on the devices. The result does not depend on how many these
    are, up to rounding. A cluster that loses all its rows keeps its centroid.

    Raises:
      ValueError: for fewer rows than clusters.
    """
    if len(rows) < count:
        raise ValueError(f"{len(rows)} rows cannot be {count} clusters")
    mesh = mesh or row_mesh()
    with exact(), jax.set_mesh(mesh):
        x, real = _laid(rows, mesh)
        centroids = _seed(x, real, jax.random.key(seed), count)
        last = np.inf
        for step in range(1, STEPS + 1):
            sums, sizes, inertia = map(np.asarray, _step(mesh)(x, real, centroids))
            now = float(inertia) / len(rows)
            found = KMeans(np.asarray(centroids), sizes.astype(np.int64), now, step)
            if last - now <= TOLERANCE * now:
                break
            last = now
            means = sums / np.maximum(sizes, 1)[:, None]
            centroids = jnp.asarray(np.where(sizes[:, None] > 0, means, centroids))
        return found


def _laid(rows: np.ndarray, mesh: Mesh) -> tuple[jax.Array, jax.Array]:
    """(N, D) and (N,) bool, cut over the mesh, each part in whole chunks."""
    part = -(-len(rows) // mesh.size)
    part = -(-part // min(part, CHUNK)) * min(part, CHUNK)
    filled = np.zeros((part * mesh.size, rows.shape[1]), np.float32)
    filled[: len(rows)] = rows
    sharding = NamedSharding(mesh, PartitionSpec(AXIS))
    real = np.arange(len(filled)) < len(rows)
    return jax.device_put(filled, sharding), jax.device_put(real, sharding)


@functools.partial(jax.jit, static_argnames="count")
def _seed(x: jax.Array, real: jax.Array, key: jax.Array, count: int) -> jax.Array:
    """(K, D): each a row. Some are drawn by their squared distance to the nearest of those before,
    and the one that lowers the inertia most is taken (greedy k-means++)."""
    trials = min(2 + int(math.log(count)), len(x))
    squares = jnp.square(x).sum(axis=1)

    def draw(i: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        found, distance = state
        noise = jax.random.gumbel(jax.random.fold_in(key, i), distance.shape)
        drawn = x[jax.lax.top_k(jnp.where(real, jnp.log(distance) + noise, -jnp.inf), trials)[1]]
        gaps = squares[:, None] + jnp.square(drawn).sum(axis=1) - 2 * x @ drawn.T
        left = jnp.where(real[:, None], jnp.minimum(distance[:, None], gaps), 0).sum(axis=0)
        centroid = drawn[left.argmin()]
        nearer = jnp.minimum(distance, jnp.square(x - centroid).sum(axis=1))
        return found.at[i].set(centroid), nearer

    first = jnp.full(len(x), 1e30, jnp.float32)  # all alike
    empty = jnp.zeros((count, x.shape[1]), jnp.float32)
    return jax.lax.fori_loop(0, count, draw, (empty, first))[0]


@functools.lru_cache(8)
def _step(mesh: Mesh) -> Callable:
    """(x, real, centroids) -> sums (K, D) and sizes (K,) of the rows nearest to each, inertia."""

    def own(x: jax.Array, real: jax.Array, centroids: jax.Array) -> tuple[jax.Array, ...]:
        size = min(len(x), CHUNK)

        def add(total: tuple, chunk: tuple) -> tuple[tuple, None]:
            rows, there = chunk
            label, distance = _nearest(rows, centroids)
            one_hot = jax.nn.one_hot(label[:, 0], len(centroids)) * there[:, None]
            made = one_hot.T @ rows, one_hot.sum(axis=0), (distance[:, 0] * there).sum()
            return jax.tree.map(jnp.add, total, made), None

        zero = jnp.zeros_like(centroids), jnp.zeros(len(centroids)), jnp.zeros(())
        zero = jax.tree.map(lambda leaf: jax.lax.pcast(leaf, AXIS, to="varying"), zero)
        chunks = x.reshape(-1, size, x.shape[1]), real.reshape(-1, size)
        return jax.lax.psum(jax.lax.scan(add, zero, chunks)[0], AXIS)

    cut, whole = PartitionSpec(AXIS), PartitionSpec()
    return jax.jit(jax.shard_map(own, mesh=mesh, in_specs=(cut, cut, whole), out_specs=whole))


def _nearest(rows: jax.Array, centroids: jax.Array, count: int = 1) -> tuple[jax.Array, jax.Array]:
    """The nearest centroids of each row, nearest first, and the squared distances to them."""
    half = rows @ centroids.T - jnp.square(centroids).sum(axis=1) / 2
    found, labels = jax.lax.top_k(half, count)
    return labels, jnp.maximum(jnp.square(rows).sum(axis=1)[:, None] - 2 * found, 0)


_closest = jax.jit(_nearest, static_argnames="count")


def closest(
    blocks: Iterable[np.ndarray], centroids: np.ndarray, count: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """The ``count`` nearest centroids of rows that come in blocks, nearest first, (n, count) int32,
    and the squared distances, (n, count) float32."""
    mesh, labels, distances = row_mesh(), [], []
    with exact():
        laid = jax.device_put(centroids, NamedSharding(mesh, PartitionSpec()))
        for block in blocks:
            for start in range(0, len(block), CHUNK * mesh.size):
                rows = block[start : start + CHUNK * mesh.size]
                label, distance = _closest(_laid(rows, mesh)[0], laid, count)
                labels.append(np.asarray(label)[: len(rows)])
                distances.append(np.asarray(distance)[: len(rows)])
    return np.concatenate(labels), np.concatenate(distances)


# ---------------------------------------------------------------------------------------- sampling


def shares(sizes: np.ndarray, budget: int, rng: np.random.Generator) -> np.ndarray:
    """How many to take of each of some clusters, (K,): all of the small ones, equally many of the
    others, ``budget`` together. Equally means up to one, who gets it is drawn."""
    if budget >= sizes.sum():
        return sizes.copy()
    low, high = 0, int(sizes.max())
    while high - low > 1:  # the largest level that the budget reaches
        middle = (low + high) // 2
        low, high = (middle, high) if np.minimum(sizes, middle).sum() <= budget else (low, middle)
    taken = np.minimum(sizes, low)
    left = rng.permutation(np.flatnonzero(sizes > low))[: budget - taken.sum()]
    taken[left] += 1
    return taken


def sample(levels: Sequence[np.ndarray], budget: int, seed: int) -> np.ndarray:
    """(n,) bool: ``budget`` rows, shared evenly among the clusters of the highest level, in each
    among its clusters of the level below, and drawn at random within those of the lowest.

    Args:
      levels: from the lowest on, (n,) the cluster of each row. Clusters lie whole in those above.
    """
    rng = np.random.default_rng(seed)
    kept = np.zeros(len(levels[0]), bool)

    def take(rows: np.ndarray, level: int, count: int) -> None:
        if level < 0:
            kept[rng.permutation(rows)[:count]] = True
            return
        order = rows[np.argsort(levels[level][rows], kind="stable")]
        _, starts, sizes = np.unique(levels[level][order], return_index=True, return_counts=True)
        for start, size, n in zip(starts, sizes, shares(sizes, count, rng), strict=True):
            if n:
                take(order[start : start + size], level - 1, int(n))

    take(np.arange(len(kept)), len(levels) - 1, budget)
    return kept
