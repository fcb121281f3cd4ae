"""Weighted k-nearest neighbours on frozen features, as DINOv2 evaluates them (dinov2/eval/knn.py).

Features are L2-normalised. A test image is compared by cosine similarity with every training image;
the max-k most similar ones vote for their class with weight softmax(similarity / T), T = 0.07, and
for each k only the first k votes count. (The softmax runs over all max-k neighbours, but a common
factor does not change which class wins.)

DINOv2 reports several k and calls 20 the usual best. Here k = 20 makes the headline. Each feature
(CLS, mean of patches: MAE never trains its CLS token; a trivial feature) is compared as it is and
whitened, and the one for the headline is chosen by leave-one-out on training images, so that no
test label takes part.

Training images lie on all devices, each with its own rows: exact for any number of them.

Shape letters: N rows over all devices, n real ones, m queries, d columns.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from webssl_jax.evaluators import sharded
from webssl_jax.evaluators.base import FEATURES
from webssl_jax.evaluators.features import Cache, Table
from webssl_jax.evaluators.outcome import Outcome, scored
from webssl_jax.evaluators.probes.labelled import LabelledOptions, LabelledPair, Problem
from webssl_jax.model import Model
from webssl_jax.models.features import Want
from webssl_jax.weights.networks import Networks

TEMPERATURE = 0.07
KS = (10, 20, 100, 200)
HEADLINE_K = 20
# Raised whenever the same features of the same images would get another figure.
PROTOCOL = 3
# Leave-one-out over all of a large training set would cost more than the test.
_SELECTION_QUERIES = 5000
_WANT = Want(patches="mean")
Features = Mapping[str, Table]


@dataclasses.dataclass(frozen=True)
class KNNOptions(LabelledOptions):
    """The keys of a row; see :class:`LabelledOptions`.

    shots: few-shot figures besides, with so many training images a class. tries: random draws of
    them, over which the mean is taken.
    """

    shots: tuple[int, ...] = ()
    tries: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tries < 1 or any(n < 1 for n in self.shots):
            raise ValueError("tries and shots must be at least 1")


class KNN:
    """Top-1 accuracy of the class that the most similar training images vote for."""

    Options = KNNOptions
    needs = frozenset({FEATURES})

    def __init__(self, options: KNNOptions):
        self._options, self._pair = options, LabelledPair(options)
        self.data = f"{self._pair.identity}-{PROTOCOL}"
        self.datasets = self._pair.datasets

    @classmethod
    def want(cls, options: KNNOptions, networks: Networks) -> Want:
        """CLS and mean patches of the last block."""
        return _WANT

    def run(self, model: Model, cache: Cache) -> Outcome:
        """See ``base.Evaluation``."""
        train, test = (cache.pooled(model, data, _WANT) for data in self.datasets)
        problem = self._pair.problem(train, test, model.preprocess, cache)
        names = ("cls", "patches")
        of_train, of_test = ({x: store.array(x) for x in names} for store in (train, test))
        found = evaluate(problem, of_train, of_test)
        few = few_shot(problem, of_train, of_test, found.chosen["top1"], self._options)
        found = dataclasses.replace(found, metrics=found.metrics | few)
        trivial = self._pair.trivial_outcomes(problem, cache, f"knn-{PROTOCOL}", evaluate)
        return dataclasses.replace(found, baselines=trivial, chance=problem.chance())


def evaluate(problem: Problem, train: Features, test: Features) -> Outcome:
    """k-NN accuracy of each named feature and k; the headline is k = 20 with the feature chosen on
    train.

    Args:
      train, test: {name: (rows, d)} of all readable records; ``problem`` says which are labelled.
    """
    n, m = len(problem.train_labels), len(problem.test_labels)
    ks = _clip(KS, n)
    headline = _clip((HEADLINE_K,), n)[0]
    metrics: dict[str, float] = {}
    hits, on_train = {}, {}
    with sharded.exact():
        for name in train:
            bank = sharded.on_rows(problem.train_rows_of(train[name]))
            white = sharded.whitening(bank, n)
            queries = problem.test_rows_of(test[name])
            own = problem.train_rows_of(train[name])
            spaces: dict[str, Callable[[jax.Array], jax.Array]] = {
                name: lambda x: x,
                f"{name}_whitened": functools.partial(sharded.apply_whitening, white),
            }
            for space, into in spaces.items():
                there = into(bank)
                search = Search(there, problem.train_labels, problem.groups, problem.num_classes)
                predicted = search.predict(queries, (*ks, headline), into)
                for k in ks:
                    hit = predicted[k] == problem.test_labels
                    metrics[f"{space}_top1_k{k}"] = float(hit.mean())
                hits[space] = predicted[headline] == problem.test_labels
                on_train[space] = search.leave_one_out(own, into, headline)
    best = max(on_train, key=lambda space: on_train[space])
    top, items = scored("top1", hits[best])
    chosen = f"{best}, k = {headline}"
    meaning = (
        f"k-NN: share of {m:,} test images whose class, of {problem.num_classes}, the most similar "
        f"of {n:,} training images vote for (weighted, as in DINOv2; the feature is chosen by "
        "leave-one-out on training images). Nothing is learned on top of the features."
    )
    data = f"{problem.data}-{PROTOCOL}"
    return Outcome(("top1",), top | metrics, items, data, meaning, {"top1": chosen})


def few_shot(
    problem: Problem, train: Features, test: Features, chosen: str, options: KNNOptions
) -> dict[str, float]:
    """{"SHOTS_shot_top1_kK"}: accuracy where of each class so many training images vote, drawn
    ``tries`` times; a class with fewer gives all. chosen: the headline's feature, as
    :func:`evaluate` names it; here it is never whitened."""
    if not options.shots:
        return {}
    name, n = chosen.partition(",")[0].removesuffix("_whitened"), len(problem.train_labels)
    metrics: dict[str, float] = {}
    with sharded.exact():
        bank = sharded.on_rows(problem.train_rows_of(train[name]))
        queries = problem.test_rows_of(test[name])
        for shots in options.shots:
            found: dict[int, list[float]] = {}
            for seed in range(options.tries):
                drawn = draw(problem.train_labels, shots, seed)
                labels = np.full(n, -1)  # -1 has no vote
                labels[drawn] = problem.train_labels[drawn]
                search = Search(bank, labels, problem.groups, problem.num_classes)
                predicted = search.predict(queries, _clip(KS, len(drawn)))
                for k, classes in predicted.items():
                    found.setdefault(k, []).append(float((classes == problem.test_labels).mean()))
            metrics |= {f"{shots}_shot_top1_k{k}": float(np.mean(x)) for k, x in found.items()}
    return metrics


def draw(labels: np.ndarray, shots: int, seed: int) -> np.ndarray:
    """Row numbers, rising: of each class ``shots`` at random, or all that there are."""
    order = np.random.default_rng(seed).permutation(len(labels))
    rows = [order[labels[order] == label][:shots] for label in np.unique(labels)]
    return np.sort(np.concatenate(rows))


@dataclasses.dataclass(frozen=True)
class Search:
    """Training rows to search: bank (N, d) over all devices, labels (n,) int, and groups (n,) int
    of look-alikes (see ``splits.look_alikes``)."""

    bank: jax.Array
    labels: np.ndarray
    groups: np.ndarray
    num_classes: int

    def predict(
        self,
        queries: Table,
        ks: Sequence[int],
        into: Callable[[jax.Array], jax.Array] = lambda x: x,
        query_groups: np.ndarray | None = None,
        chunk: int = 256,
    ) -> dict[int, np.ndarray]:
        """{k: (m,) int, the predicted class of each query}.

        Equal similarities are ordered by position in the bank, equal votes by class number, so the
        answer is unique.

        Args:
          queries: (m, d'), which ``into`` takes to (m, d) as the bank was taken.
          ks: at most n each.
          query_groups: (m,) int; training rows of a query's own group do not vote. None: all vote.
        """
        ks, m = _clip(ks, len(self.labels)), len(queries)
        # Rows beyond n are of a group that no query has, but their label -1 keeps them from voting.
        labels = sharded.on_rows(np.asarray(self.labels, np.int32), fill=-1)
        groups = sharded.on_rows(np.asarray(self.groups, np.int32), fill=-2)
        bank = _normalise(self.bank)
        asked = np.full(m, -1) if query_groups is None else query_groups
        size, votes = min(chunk, m), []
        vote = _vote(sharded.row_mesh(), ks, self.num_classes, TEMPERATURE)
        for start in range(0, m, size):
            at = np.minimum(np.arange(start, start + size), m - 1)  # the last one fills up
            rows = _normalise(into(sharded.everywhere(queries[at])))
            own = sharded.everywhere(np.asarray(asked[at], np.int32))
            votes.append(np.asarray(vote(bank, labels, groups, rows, own)))
        found = np.concatenate(votes, axis=1)[:, :m]
        return dict(zip(ks, found, strict=True))

    def leave_one_out(
        self, rows: Table, into: Callable[[jax.Array], jax.Array] = lambda x: x, k: int = HEADLINE_K
    ) -> float:
        """k-NN accuracy of training rows among those of other groups: at most 5,000 evenly spaced
        queries. rows: (n, d'), what the bank was made of by ``into``."""
        n = len(self.labels)
        at = np.unique(np.linspace(0, n - 1, min(n, _SELECTION_QUERIES)).astype(np.int64))
        predicted = self.predict(rows[at], (k,), into, self.groups[at])
        return float((next(iter(predicted.values())) == self.labels[at]).mean())


@functools.lru_cache(maxsize=32)
def _vote(
    mesh: Mesh, ks: tuple[int, ...], num_classes: int, temperature: float
) -> Callable[..., jax.Array]:
    """(bank (N, d), labels (N,), groups (N,), queries (m, d), query_groups (m,)) -> (len(ks), m)
    classes; bank and queries normalised."""

    def nearest(
        bank: jax.Array,
        labels: jax.Array,
        groups: jax.Array,
        queries: jax.Array,
        query_groups: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        """Of this device's rows the nearest, then of all devices'."""
        similarity = queries @ bank.T
        votes = (labels[None] >= 0) & (groups[None] != query_groups[:, None])
        similarity = jnp.where(votes, similarity, -jnp.inf)
        most = min(max(ks), bank.shape[0])
        value, index = jax.lax.top_k(similarity, most)
        found = value, labels[index]
        # Devices stand in the order of their rows, so equal values stay in that order.
        value, label = (jax.lax.all_gather(x, sharded.AXIS, axis=1, tiled=True) for x in found)
        value, index = jax.lax.top_k(value, min(max(ks), value.shape[1]))
        return value, jnp.take_along_axis(label, index, axis=1)

    rows, whole = PartitionSpec(sharded.AXIS), PartitionSpec()
    search = jax.shard_map(
        nearest,
        mesh=mesh,
        in_specs=(rows, rows, rows, whole, whole),
        out_specs=whole,
        check_vma=False,
    )

    @jax.jit
    def vote(
        bank: jax.Array,
        labels: jax.Array,
        groups: jax.Array,
        queries: jax.Array,
        query_groups: jax.Array,
    ) -> jax.Array:
        value, label = search(bank, labels, groups, queries, query_groups)
        return shares(value, label, ks, num_classes, temperature).argmax(axis=-1)

    return vote


def shares(
    similarity: jax.Array,
    labels: jax.Array,
    ks: Sequence[int],
    num_classes: int,
    temperature: float = TEMPERATURE,
) -> jax.Array:
    """(len(ks), m, classes): each class's share of the votes of the first k neighbours, by weights
    that add up to 1 over all of them.

    Args:
      similarity: (m, K), falling; -inf has no vote. labels: (m, K) int.
    """
    weights = jax.nn.softmax(similarity / temperature, axis=-1)
    ballots = weights[:, :, None] * jax.nn.one_hot(labels, num_classes)
    return jnp.stack([ballots[:, :k].sum(axis=1) for k in ks])


@jax.jit
def _normalise(x: jax.Array) -> jax.Array:
    return x / jnp.maximum(jnp.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def _clip(ks: Sequence[int], n: int) -> tuple[int, ...]:
    return tuple(sorted({min(int(k), n) for k in ks}))
