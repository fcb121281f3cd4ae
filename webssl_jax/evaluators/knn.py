"""Weighted k-nearest neighbours on frozen features, as DINOv2 evaluates them (dinov2/eval/knn.py).

Features are L2-normalised. A test image is compared by cosine similarity with every training image;
the max-k most similar ones vote for their class with weight softmax(similarity / T), T = 0.07, and
for each k only the first k votes count. (The softmax runs over all max-k neighbours, but a common
factor does not change which class wins.)

DINOv2 reports several k and calls 20 the usual best. Here k = 20 makes the headline. Each feature
(CLS, mean of patches: MAE never trains its CLS token; a trivial feature) is compared as it is and
whitened, and the one for the headline is chosen by leave-one-out on training images, so that no
test label takes part.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from webssl_jax.evaluators.base import Score, on_one_device
from webssl_jax.evaluators.features import whiten

TEMPERATURE = 0.07
KS = (10, 20, 100, 200)
HEADLINE_K = 20
_SELECTION_QUERIES = (
    5000  # leave-one-out over all of a large training set would cost more than the test
)


def knn(
    train: Mapping[str, np.ndarray],
    train_labels: np.ndarray,
    test: Mapping[str, np.ndarray],
    test_labels: np.ndarray,
    num_classes: int,
    groups: np.ndarray | None = None,
    ks: Sequence[int] = KS,
) -> Score:
    """k-NN accuracy of each named feature and k; the headline is k = 20 with the feature chosen on
    train.

    Args:
      train, test: {name: (n, d) float32} with the same names.
      train_labels, test_labels: (n,) int.
      groups: (n,) int, near-duplicates of the training images by ``splits.look_alikes``; None if
        there are none.
      ks: numbers of neighbours; those beyond the number of training images are clipped to it.

    Returns:
      A ``Score`` whose ``by_variant`` is named ``<feature>/top1@<k>`` and
      ``<feature>_whitened/top1@<k>``.
    """
    ks = _clip(ks, len(train_labels))
    headline = _clip((HEADLINE_K,), len(train_labels))[0]
    by_variant, hits, on_train = {}, {}, {}
    for name in train:
        whitened = whiten(train[name], test[name])
        for space, (x, queries) in (
            (name, (train[name], test[name])),
            (f"{name}_whitened", whitened),
        ):
            predicted = predict(x, train_labels, queries, num_classes, (*ks, headline))
            for k in ks:
                by_variant[f"{space}/top1@{k}"] = float((predicted[k] == test_labels).mean())
            hits[space] = predicted[headline] == test_labels
            on_train[space] = leave_one_out(x, train_labels, num_classes, groups)
    best = max(on_train, key=on_train.get)
    return Score(hits[best], f"{best}, k = {headline}", by_variant)


def predict(
    train: np.ndarray,
    train_labels: np.ndarray,
    queries: np.ndarray,
    num_classes: int,
    ks: Sequence[int],
    temperature: float = TEMPERATURE,
    chunk: int = 256,
    groups: tuple[np.ndarray, np.ndarray] | None = None,
) -> dict[int, np.ndarray]:
    """Predicted class of each query for each k.

    Equal similarities are ordered by position in ``train``, equal votes by class number, so the
    answer is unique.

    Args:
      train: (n, d) float. queries: (m, d) float. Neither needs to be normalised.
      groups: ((n,), (m,)) int; training rows of a query's own group do not vote for it. None: all
        vote.

    Returns:
      {k: (m,) int32} for each of ``ks`` (clipped to the number of training rows).
    """
    ks = _clip(ks, len(train))
    m = len(queries)
    of_train, of_queries = groups or (np.zeros(len(train)), np.full(m, -1))
    of_train, of_queries = np.asarray(of_train, np.int32), np.asarray(of_queries, np.int32)
    size = min(chunk, m)
    votes = []
    with on_one_device():
        bank = jnp.asarray(_normalise(train))
        labels = jnp.asarray(train_labels, jnp.int32)
        normalised = _normalise(queries)
        for start in range(0, m, size):
            # static shape: the last image fills up
            at = np.minimum(np.arange(start, start + size), m - 1)
            best = _vote(
                bank, labels, of_train, normalised[at], of_queries[at], ks, num_classes, temperature
            )
            votes.append(np.asarray(best))
    votes = np.concatenate(votes, axis=1)[:, :m]
    return dict(zip(ks, votes, strict=True))


def leave_one_out(
    features: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    groups: np.ndarray | None = None,
    k: int = HEADLINE_K,
) -> float:
    """k-NN accuracy of training images among those of other groups: at most 5,000 evenly spaced
    queries."""
    groups = np.arange(len(labels)) if groups is None else groups
    rows = np.unique(
        np.linspace(0, len(labels) - 1, min(len(labels), _SELECTION_QUERIES)).astype(np.int32)
    )
    predicted = predict(
        features, labels, features[rows], num_classes, (k,), groups=(groups, groups[rows])
    )
    return float((next(iter(predicted.values())) == labels[rows]).mean())


@functools.partial(jax.jit, static_argnames=("ks", "num_classes", "temperature"))
def _vote(bank, labels, groups, queries, query_groups, ks, num_classes, temperature):
    """(len(ks), m) classes. bank: (n, d), queries: (m, d), both normalised."""
    similarity = queries @ bank.T
    similarity = jnp.where(groups[None, :] == query_groups[:, None], -jnp.inf, similarity)
    nearest, index = jax.lax.top_k(similarity, max(ks))
    # a row that must not vote weighs exp(-inf) = 0
    weights = jax.nn.softmax(nearest / temperature, axis=-1)
    ballots = weights[:, :, None] * jax.nn.one_hot(labels[index], num_classes)
    return jnp.stack([jnp.argmax(ballots[:, :k].sum(axis=1), axis=-1) for k in ks])


def _normalise(x: np.ndarray) -> np.ndarray:
    x = np.asarray(x, np.float32)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def _clip(ks: Sequence[int], n: int) -> tuple[int, ...]:
    return tuple(sorted({min(int(k), n) for k in ks}))
