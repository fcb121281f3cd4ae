"""SIGReg, the regulariser of LeJEPA (Balestriero and LeCun, arXiv 2511.08544, section 4): how far
embeddings are from a standard normal distribution, by tests along random directions.

Shape letters: V views, B images, E channels, S directions, K knots of the integral.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

_KNOTS, _LAST = 17, 3.0


def _knots() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(t, the characteristic function of a standard normal at t, weights of the integral), each
    (K,): the trapezoid from 0 to 3, doubled for the negative side, under that function."""
    t, step = np.linspace(0.0, _LAST, _KNOTS, retstep=True)
    normal = np.exp(-(t**2) / 2)
    trapezoid = np.full(_KNOTS, 2 * step)
    trapezoid[[0, -1]] = step
    return t, normal, trapezoid * normal


def directions(rng: jax.Array, channels: int, count: int) -> jax.Array:
    """(E, S): unit vectors, uniform on the sphere."""
    drawn = jax.random.normal(rng, (channels, count))
    return drawn / jnp.linalg.norm(drawn, axis=0, keepdims=True)


def sigreg(embeddings: jax.Array, directions: jax.Array) -> jax.Array:
    """The statistic of Epps and Pulley, mean over views and directions: B times the integral of the
    squared distance between the characteristic functions of the projected embeddings and of a
    standard normal. About 1 for normal ones, whatever B; :func:`most` for a single point at 0.

    embeddings: (V, B, E) float32. directions: (E, S). A loop over the knots keeps memory at one
    (V, B, S) array.
    """
    t, normal, weights = (jnp.asarray(x, jnp.float32) for x in _knots())
    projected = jnp.einsum("vbe,es->vbs", embeddings, directions, precision="highest")

    def add(total: jax.Array, knot: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        at, wanted, weight = knot
        even, odd = jnp.cos(at * projected).mean(axis=1), jnp.sin(at * projected).mean(axis=1)
        return total + weight * ((even - wanted) ** 2 + odd**2).mean(), None

    body = jax.checkpoint(add, prevent_cse=False)
    total, _ = jax.lax.scan(body, jnp.zeros(()), (t, normal, weights))
    return embeddings.shape[1] * total


def most(images: int) -> float:
    """:func:`sigreg` of embeddings that are all 0."""
    _, normal, weights = _knots()
    return images * float((weights * (1 - normal) ** 2).sum())
