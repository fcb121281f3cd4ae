"""Rows of features on all devices: statistics, whitening, products. A set of features may be larger
than a device, or a host, can hold; here each device has its own rows.

Shape letters: N rows, filled up so that they divide over the devices, n of them real; d columns.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from webssl_jax.evaluators.features import Table

AXIS = "rows"
# Of the mean eigenvalue. Directions that carry less are noise and are not blown up.
SHRINKAGE = 0.01


def row_mesh() -> Mesh:
    """All devices of all processes in a row."""
    return Mesh(np.array(jax.devices()), (AXIS,), axis_types=(AxisType.Auto,))


@contextlib.contextmanager
def exact() -> Iterator[None]:
    """Products in full float32: a TPU's are of bfloat16 by default, which reorders near
    neighbours."""
    with jax.set_mesh(row_mesh()), jax.default_matmul_precision("highest"):
        yield


def on_rows(rows: Table, fill: float = 0.0) -> jax.Array:
    """(n, ...) as an array (N, ...) cut over all devices; each process reads its own part. ``fill``
    stands in the rows beyond n."""
    mesh, n = row_mesh(), len(rows)
    size = -(-n // mesh.size) * mesh.size

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        start, stop, _ = (index or (slice(None),))[0].indices(size)
        out = np.full((stop - start, *rows.shape[1:]), fill, rows.dtype)
        if start < n:
            out[: min(stop, n) - start] = rows[start : min(stop, n)]
        return out

    sharding = NamedSharding(mesh, PartitionSpec(AXIS))
    return jax.make_array_from_callback((size, *rows.shape[1:]), sharding, part)


def everywhere(array: np.ndarray) -> jax.Array:
    """A small array whole on every device."""
    sharding = NamedSharding(row_mesh(), PartitionSpec())
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


class Whitening(NamedTuple):
    """x -> (x - mean) @ projection: mean (d,), projection (d, r), float32."""

    mean: jax.Array
    projection: jax.Array


def whitening(x: jax.Array, n: int) -> Whitening:
    """PCA whitening by the first ``n`` rows of x (N, d).

    (x - mean) B / sqrt(v + ``SHRINKAGE`` mean(v)), with B, v the eigenbasis of the covariance. A
    few directions carry most of the variance of masked-autoencoder features, and cosine similarity
    sees little else; whitening is retrieval's usual answer (Jegou & Chum, "Negative evidences and
    co-occurrences in image retrieval: the benefit of PCA and whitening", ECCV 2012).
    """
    mean, covariance = _moments(x, on_rows(np.full(n, 1 / n, np.float32)))
    basis, values = eigenbasis(np.asarray(covariance), n)
    # Where all rows are equal there is nothing to whiten, and nothing to divide by.
    floor = SHRINKAGE * values.sum() / max(len(values), 1)
    scale = 1 / np.sqrt(np.maximum(values + floor, 1e-12))
    return Whitening(mean, everywhere((basis * scale).astype(np.float32)))


@jax.jit
def apply_whitening(white: Whitening, x: jax.Array) -> jax.Array:
    """(N, d) -> (N, r)."""
    return (x - white.mean) @ white.projection


@jax.jit
def _moments(x: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Weighted mean (d,) and covariance (d, d); the weights (N,) add up to 1."""
    mean = weights @ x
    centred = (x - mean) * jnp.sqrt(weights)[:, None]
    return mean, centred.T @ centred


class Scaling(NamedTuple):
    """x -> (x - mean) * scale: both (d,) float32."""

    mean: jax.Array
    scale: jax.Array


@jax.jit
def scaling(x: jax.Array, weights: jax.Array) -> Scaling:
    """Zero mean and unit variance under the weights (N,), which add up to 1; over sqrt(d), so that
    penalties mean the same at any d.

    A column that is constant up to rounding carries nothing, and is set to 0.
    """
    mean = weights @ x
    std = jnp.sqrt(weights @ jnp.square(x - mean))
    alive = std > 1e-6 * jnp.maximum(jnp.abs(mean), 1e-6)
    scale = jnp.where(alive, 1 / jnp.maximum(std, 1e-30), 0.0)
    return Scaling(mean, scale / np.sqrt(x.shape[1]))


@jax.jit
def apply_scaling(by: Scaling, x: jax.Array) -> jax.Array:
    """(N, d) -> (N, d)."""
    return (x - by.mean) * by.scale


@jax.jit
def gram(x: jax.Array, weights: jax.Array) -> jax.Array:
    """x' W x (d, d)."""
    weighted = x * jnp.sqrt(weights)[:, None]
    return weighted.T @ weighted


def eigenbasis(gram: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Orthonormal basis (d, r) and eigenvalues (r,) of x'x / n (d, d), of n rows, in float32;
    r = min(n, d). Rising eigenvalues; the decomposition is in float64."""
    values, basis = np.linalg.eigh(gram.astype(np.float64))
    rank = min(n, len(values))
    values, basis = values[-rank:], basis[:, -rank:]
    return basis.astype(np.float32), np.maximum(values, 0).astype(np.float32)
