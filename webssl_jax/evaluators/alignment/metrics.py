"""How alike two networks see the same items: the metrics of platonic-rep (Huh et al., arXiv
2405.07987, github.com/minyoungg/platonic-rep), for all pairs of layers at once.

    x = [prepare(name, layer, k) ...]    # what a metric needs of a layer (N, D)
    scores = against(name, stack(y))(stack(x))    # (L, M)

Features of a network are clamped to their 0.95 quantile first (:func:`clamp`): a few channels of
language models are huge, and cosines see little else.

Of the k nearest neighbours by cosine, or of the kernels P, Q of inner products, they are

    mutual_knn          mean share of neighbours that both have
    cycle_knn           share of items that are near, by x, one of those near them by y
    lcs_knn             mean length of the longest common subsequence of the two ordered lists
    edit_distance_knn   1 - mean edit distance of the two lists / k
    cka, unbiased_cka   HSIC(P, Q) / sqrt(HSIC(P, P) HSIC(Q, Q)), biased, and as of Song et al.
    cknna               the unbiased one, of kernels that are 0 but where both have the neighbour
    svcca               mean canonical correlation of the ten first directions of each

Shape letters: L layers of x (images), M layers of y (texts), N items, D channels, k neighbours.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

QUANTILE = 0.95
CLAMPS = ("mean", "exact", "none")
_EPS = 1e-6  # the original's, in denominators
_DIRECTIONS = 10  # of svcca
Rep = Any  # arrays whose first axis is a layer
Score = Callable[[Rep], jax.Array]


def clamp(features: np.ndarray, how: str = "mean") -> np.ndarray:
    """Features (N, L, D) of all layers of a network, clamped to plus and minus one threshold.

    how: ``mean``, of the items' own 0.95 quantiles of absolute values (the original without
      ``--precise``); ``exact``, that quantile of all values (with it); or ``none``.
    """
    features = np.asarray(features, np.float32)
    if how == "none":
        return features
    if how == "exact":
        values = np.abs(features).ravel()
        place = int(QUANTILE * values.size)
        limit = np.partition(values, place)[place]
    else:
        limit = np.mean([np.quantile(np.abs(item), QUANTILE) for item in features])
    return np.clip(features, -limit, limit)


@functools.partial(jax.jit, static_argnames=("name", "k"))
def prepare(name: str, layer: jax.Array, k: int) -> Rep:
    """What the metric ``name`` needs of a layer (N, D): after rows have the length 1, the
    neighbours (N, k) int32, nearest first; kernels (N, N); or directions (N, 10)."""
    norms = jnp.linalg.norm(layer, axis=1, keepdims=True)
    layer = layer / jnp.maximum(norms, 1e-12)
    if name == "svcca":
        spread = layer.std(axis=0, ddof=1) + 1e-8
        scaled = (layer - layer.mean(axis=0)) / spread
        return jnp.linalg.svd(scaled, full_matrices=False)[0][:, :_DIRECTIONS]
    kernel = layer @ layer.T
    if name == "cka":
        return _centre(kernel)
    if name == "unbiased_cka":
        return _centre_without_diagonal(kernel)
    alone = jnp.where(jnp.eye(len(layer), dtype=bool), -jnp.inf, kernel)
    near = jax.lax.top_k(alone, k)[1].astype(jnp.int32)
    return (kernel, near) if name == "cknna" else near


def _centre(kernel: jax.Array) -> jax.Array:
    """H K H, so that inner products of two of them are tr(K H L H)."""
    rows = kernel.mean(axis=0)
    return kernel - rows - rows[:, None] + kernel.mean()


def _centre_without_diagonal(kernel: jax.Array) -> jax.Array:
    """The kernel without its diagonal, so centred that inner products of two of them are n (n - 3)
    times the unbiased HSIC (Szekely and Rizzo, arXiv 1310.2926). Cosines of real features are
    nearly alike; subtracting first keeps float32's digits."""
    n = len(kernel)
    outside = ~jnp.eye(n, dtype=bool)
    kernel = jnp.where(outside, kernel - kernel.mean(), 0)
    rows = kernel.sum(axis=0) / (n - 2)
    centred = kernel - rows - rows[:, None] + kernel.sum() / ((n - 1) * (n - 2))
    return jnp.where(outside, centred, 0)


def against(name: str, y: Rep) -> Score:
    """The metric ``name`` of any x and these layers y: a function from x, stacked along L, to
    (L, M). Metrics of neighbours have :func:`item_scores` behind them."""
    if name in ITEMS:
        items = ITEMS[name](y)
        return lambda x: items(x).mean(axis=1)
    return _WHOLE[name](y)


def item_scores(name: str, x: Rep, y: Rep) -> jax.Array:
    """(L, N, M): the value of each item, whose mean is the score. Of metrics in :data:`ITEMS`."""
    return ITEMS[name](y)(x)


def shuffle(name: str, x: Rep, order: jax.Array) -> Rep:
    """What :func:`prepare` and a stack would give of items in another order. order: (N,) int."""

    def near(x: jax.Array) -> jax.Array:  # neighbours, too, have new numbers
        return jnp.argsort(order)[x[:, order]].astype(x.dtype)

    def kernel(x: jax.Array) -> jax.Array:
        return x[:, order][:, :, order]

    if name in ITEMS:
        return near(x)
    if name == "cknna":
        return kernel(x[0]), near(x[1])
    return x[:, order] if name == "svcca" else kernel(x)


@functools.partial(jax.jit, static_argnames=("name", "count"))
def shuffled_best(name: str, x: Rep, y: Rep, seed: jax.Array, count: int) -> jax.Array:
    """(count,): the best score of all pairs of layers, when images are dealt to texts at random."""
    score, items = against(name, y), jax.tree.leaves(x)[0].shape[1]

    def once(key: jax.Array) -> jax.Array:
        return score(shuffle(name, x, jax.random.permutation(key, items))).max()

    return jax.lax.map(once, jax.random.split(seed, count))


def _membership(near: jax.Array) -> jax.Array:
    """(L, N, k) -> (N, N, L) bool: whether j is among the neighbours of i."""
    layers, n, _ = near.shape
    whose = jnp.arange(n)[None, :, None], near, jnp.arange(layers)[:, None, None]
    return jnp.zeros((n, n, layers), bool).at[whose].set(True)


def _mutual(y: jax.Array) -> Score:
    member, own = _membership(y), jnp.arange(y.shape[1])[:, None]

    def items(x: jax.Array) -> jax.Array:
        return jax.lax.map(lambda near: member[own, near].mean(axis=1, dtype=jnp.float32), x)

    return items


def _cycle(y: jax.Array) -> Score:
    own = jnp.arange(y.shape[1])[:, None]

    def items(x: jax.Array) -> jax.Array:
        member = _membership(x)
        found = jax.lax.map(lambda near: member[near, own].any(axis=1), y)  # (M, N, L)
        return found.transpose(2, 1, 0).astype(jnp.float32)

    return items


def _of_lists(first: int, extend: Callable[..., jax.Array], y: jax.Array) -> Score:
    """The table of two lists that is filled row by row, of all items of M layers at once. first:
    what a place more in one list alone counts at the border. extend: (same, above, left, corner)
    -> the entry."""
    k = y.shape[2]

    def one(near: jax.Array) -> jax.Array:
        shape = y.shape[:2]

        def row(above: tuple[jax.Array, ...], i: jax.Array) -> tuple[tuple[jax.Array, ...], None]:
            out = [jnp.full(shape, first * (i + 1), jnp.int32)]
            for j in range(k):
                same = near[:, i] == y[:, :, j]
                out.append(extend(same, above[j + 1], out[j], above[j]))
            return tuple(out), None

        border = tuple(jnp.full(shape, first * j, jnp.int32) for j in range(k + 1))
        return jax.lax.scan(row, border, jnp.arange(k))[0][k].T

    return lambda x: jax.lax.map(one, x)


def _lcs(y: jax.Array) -> Score:
    def extend(same: jax.Array, above: jax.Array, left: jax.Array, corner: jax.Array) -> jax.Array:
        return jnp.where(same, corner + 1, jnp.maximum(above, left))

    found = _of_lists(0, extend, y)
    return lambda x: found(x).astype(jnp.float32)


def _edit_distance(y: jax.Array) -> Score:
    def extend(same: jax.Array, above: jax.Array, left: jax.Array, corner: jax.Array) -> jax.Array:
        return jnp.minimum(jnp.minimum(above, left) + 1, corner + ~same)

    found = _of_lists(1, extend, y)
    return lambda x: 1 - found(x) / y.shape[2]


def _inner(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum("lij,mij->lm", x, y)


def _cka(y: jax.Array, scale: float = 1.0) -> Score:
    own = scale * jnp.square(y).sum(axis=(1, 2))

    def score(x: jax.Array) -> jax.Array:
        theirs = scale * jnp.square(x).sum(axis=(1, 2))
        return scale * _inner(x, y) / (jnp.sqrt(theirs[:, None] * own) + _EPS)

    return score


def _unbiased_cka(y: jax.Array) -> Score:
    n = y.shape[1]
    return _cka(y, 1 / (n * (n - 3)))


def _hsic(p: jax.Array, q: jax.Array) -> jax.Array:
    """The unbiased HSIC of two kernels (N, N) without diagonals; they need not be symmetric."""
    n = len(p)
    found = (p * q.T).sum() + p.sum() * q.sum() / ((n - 1) * (n - 2))
    found -= 2 * (p.sum(axis=0) * q.sum(axis=1)).sum() / (n - 2)
    return found / (n * (n - 3))


def _masked(rep: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """(a kernel, where it has neighbours)."""
    kernel, near = rep
    return kernel, jnp.zeros(kernel.shape, bool).at[jnp.arange(len(near))[:, None], near].set(True)


def _cknna(y: tuple[jax.Array, jax.Array]) -> Score:
    def own(rep: tuple[jax.Array, jax.Array]) -> jax.Array:
        kernel, mask = _masked(rep)
        kept = jnp.where(mask, kernel, 0)
        return _hsic(kept, kept)

    own_y = jax.lax.map(own, y)

    def score(x: tuple[jax.Array, jax.Array]) -> jax.Array:
        def of_layer(rep: tuple[jax.Array, jax.Array]) -> jax.Array:
            kernel, mask = _masked(rep)

            def pair(other: tuple[jax.Array, jax.Array]) -> jax.Array:
                their_kernel, their_mask = _masked(other)
                both = mask & their_mask
                return _hsic(jnp.where(both, kernel, 0), jnp.where(both, their_kernel, 0))

            return jax.lax.map(pair, y)

        found, own_x = jax.lax.map(of_layer, x), jax.lax.map(own, x)
        return found / (jnp.sqrt(own_x[:, None] * own_y) + _EPS)

    return score


def _svcca(y: jax.Array) -> Score:
    """Canonical correlations of orthonormal directions are the singular values of their products:
    exact, where the original has a randomised SVD and an iteration."""

    def score(x: jax.Array) -> jax.Array:
        products = jnp.einsum("lnd,mne->lmde", x, y)
        return jnp.linalg.svd(products, compute_uv=False).mean(axis=-1)

    return score


ITEMS: dict[str, Callable[[Rep], Score]] = {
    "mutual_knn": _mutual,
    "cycle_knn": _cycle,
    "lcs_knn": _lcs,
    "edit_distance_knn": _edit_distance,
}
_WHOLE: dict[str, Callable[[Rep], Score]] = {
    "cka": _cka,
    "unbiased_cka": _unbiased_cka,
    "cknna": _cknna,
    "svcca": _svcca,
}
METRICS = (*ITEMS, *_WHOLE)
