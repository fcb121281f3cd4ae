"""Linear probe on frozen, cached features: a grid of feature variants and penalties, chosen without
test labels.

Variants (DINOv2 paper, appendix B.3, and dinov2/eval/linear.py): CLS of the last block, or of the
last four blocks concatenated, each with and without the mean over the last block's patch tokens;
and, because MAE never trains its CLS token, the mean over patch tokens of the last and of the last
four blocks.

The head is softmax regression with an L2 penalty (dinov2/eval/log_regression.py), features
standardised by the training images as in MAE's probe (BatchNorm without affine,
mae/main_linprobe.py). It departs from both in how it is solved. SGD over a grid of learning rates
is what fits ImageNet with augmentation; on a few thousand cached features its result hangs on step
counts, because small learning rates merely stop early. The penalised problem is convex, so we solve
it: the multinomial Hessian is bounded by 1/2 X'X/n (Boehning, "Multinomial logistic regression
algorithm", Ann. Inst. Stat. Math. 1992), which is diagonal in the eigenbasis of X'X, so each step
is an exact minimisation of an upper bound, with Nesterov's momentum and restarts on top (O'Donoghue
& Candes 2015). No learning rate, no seed but that of the split, and the whole grid of penalties
moves in one matrix product.

DINOv2 picks the best of its 52 heads on the validation set that it then reports. Here variant and
penalty are chosen on *training* images: mean accuracy over three stratified splits that hold out a
fifth, near-duplicates together. The penalty is the largest one within a standard error of the best
(the "one standard error rule", Breiman et al. 1984; Hastie et al., Elements of Statistical
Learning, 7.10): what look-alikes remain reward memory, hence small penalties. The chosen heads are
refitted on all training images, and the test set is looked at once.

Features lie on all devices, each with its own rows. Held-out rows stay where they are, with
weight 0.

Shape letters: N rows over all devices, n real ones, m test rows, d columns, r rank, P penalties,
C classes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from webssl_jax.evaluators import datasets, sharded
from webssl_jax.evaluators.base import FEATURES
from webssl_jax.evaluators.features import Cache, Rows, Table
from webssl_jax.evaluators.outcome import Outcome, scored
from webssl_jax.evaluators.probes.labelled import LabelledOptions, LabelledPair, Problem
from webssl_jax.evaluators.probes.splits import hold_out
from webssl_jax.model import Model
from webssl_jax.models.features import Want
from webssl_jax.sharding import mesh as meshes
from webssl_jax.weights.networks import Networks, encoder_of

# Raised whenever the same features of the same images would get another figure.
PROTOCOL = 3
# Multiplies |W|^2 / 2 against the mean cross-entropy, for features scaled to a mean squared length
# of 1.
PENALTIES = tuple(float(p) for p in 10.0 ** np.arange(-6.0, -2.4, 0.5))
ITERATIONS = 40  # accuracies on the embedded corpus stop moving at 30
HELD_OUT = 0.2
# one split's choice among so many heads is noisy, and the noise does not show in the standard error
SPLITS = 3


OWN, DINOV2 = "own", "dinov2"


class Rules(NamedTuple):
    """How a head is fitted and its penalty is chosen.

    strengths: penalties p (:data:`PENALTIES`); where ``of_sum`` is True, C of the other way to
      write it, C * the sum of cross-entropies + |W|^2 / 2: so p = 1 / (C n).
    standardise: whether features are. cautious: the largest penalty within a standard error of the
      best, instead of the best.
    """

    strengths: tuple[float, ...] = PENALTIES
    of_sum: bool = False
    standardise: bool = True
    cautious: bool = True
    held_out: float = HELD_OUT
    splits: int = SPLITS
    iterations: int = ITERATIONS

    def penalties(self, n: int) -> tuple[float, ...]:
        """Those of the mean over ``n`` images."""
        return tuple(1 / (c * n) for c in self.strengths) if self.of_sum else self.strengths


# dinov2/eval/log_regression.py: 45 values of C, at most 1,000 steps. Its solver is L-BFGS; the
# problem is convex, so the optimum is the same.
_C = tuple(float(c) for c in 10.0 ** np.linspace(-6, 5, 45))
RULES = {OWN: Rules(), DINOV2: Rules(_C, True, False, False, 0.1, 1, 1000)}


@dataclasses.dataclass(frozen=True)
class LogisticOptions(LabelledOptions):
    """The keys of a row; see :class:`LabelledOptions`.

    last_blocks: the probe is offered the last block, and so many of the last ones together; a
      network with fewer gives all it has.
    protocol: ``own``, or ``dinov2``: CLS as it is, 45 penalties, the best of them on a tenth of the
      training images.
    """

    last_blocks: int = 4
    protocol: str = OWN

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.last_blocks < 1:
            raise ValueError(f"last_blocks = {self.last_blocks} must be at least 1")
        if self.protocol not in RULES:
            raise ValueError(f"protocol = {self.protocol!r} is not one of {', '.join(RULES)}")


class LogisticRegression:
    """Top-1 accuracy of one linear layer on the frozen features."""

    Options = LogisticOptions
    needs = frozenset({FEATURES})

    def __init__(self, options: LogisticOptions):
        self._options, self._pair = options, LabelledPair(options)
        self.data = f"{self._pair.identity}-{PROTOCOL}"
        self.datasets = self._pair.datasets

    @classmethod
    def want(cls, options: LogisticOptions, networks: Networks) -> Want:
        """CLS and mean patches of the last blocks."""
        if options.protocol == DINOV2:
            return Want(patches="none")
        depth = encoder_of(networks).depth
        first = depth - min(options.last_blocks, depth)
        return Want(patches="mean", blocks=tuple(range(first, depth)))

    def run(self, model: Model, cache: Cache) -> Outcome:
        """See ``base.Evaluation``."""
        want = self.want(self._options, model.networks)
        train, test = (cache.pooled(model, data, want) for data in self.datasets)
        problem = self._pair.problem(train, test, model.preprocess, cache)
        o = self._options
        names = {"cls": ("cls",)} if o.protocol == DINOV2 else variants(want.blocks)
        of_train, of_test = (
            {name: Joined(tuple(map(store.array, parts))) for name, parts in names.items()}
            for store in (train, test)
        )
        judge = functools.partial(evaluate, rules=RULES[o.protocol])
        found = judge(problem, of_train, of_test)
        rules = f"logistic-{PROTOCOL}" + (f"-{o.protocol}" if o.protocol != OWN else "")
        trivial = self._pair.trivial_outcomes(problem, cache, rules, judge)
        return dataclasses.replace(found, baselines=trivial, chance=problem.chance())


@dataclasses.dataclass(frozen=True)
class Joined:
    """Several arrays side by side, (n, sum of d_i), read where they are asked for."""

    parts: tuple[Rows, ...]

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.parts[0]), sum(part.shape[1] for part in self.parts)

    @property
    def dtype(self) -> np.dtype:
        return self.parts[0].dtype

    def __len__(self) -> int:
        return len(self.parts[0])

    def pick(self, rows: np.ndarray) -> Joined:
        return Joined(tuple(part.pick(rows) for part in self.parts))

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        return np.concatenate([part[rows] for part in self.parts], axis=1)


def variants(blocks: Sequence[int]) -> dict[str, tuple[str, ...]]:
    """{variant: the arrays of ``Cache.pooled`` that it joins}: "cls", "cls+patches", "patches", and
    with several ``blocks`` "cls_x4", "cls_x4+patches", "patches_x4"."""
    out: dict[str, tuple[str, ...]] = {
        "cls": ("cls",),
        "cls+patches": ("cls", "patches"),
        "patches": ("patches",),
    }
    if (n := len(blocks)) > 1:
        cls, patches = (tuple(f"{x}@{block}" for block in blocks) for x in ("cls", "patches"))
        out |= {f"cls_x{n}": cls, f"cls_x{n}+patches": (*cls, "patches"), f"patches_x{n}": patches}
    return out


class Selection(NamedTuple):
    """What the held-out training images chose. penalties: {variant: penalty}; accuracies: held out,
    at that penalty."""

    variant: str
    penalties: dict[str, float]
    accuracies: dict[str, float]


def evaluate(
    problem: Problem,
    train: Mapping[str, Table],
    test: Mapping[str, Table],
    rules: Rules = RULES[OWN],
) -> Outcome:
    """Chooses on train, refits on train, looks at test once.

    Args:
      train, test: {variant: (rows, d)} of all readable records; ``problem`` says which are
        labelled.
    """
    penalties, accuracies, hits = {}, {}, {}
    n, m = len(problem.train_labels), len(problem.test_labels)
    with sharded.exact():
        for name in train:  # one variant at a time lies on the devices
            x = sharded.on_rows(problem.train_rows_of(train[name]))
            penalties[name], accuracies[name] = choose_penalty(
                x, problem.train_labels, problem.num_classes, problem.groups, rules=rules
            )
            head = fit(
                x, problem.train_labels, problem.num_classes, (penalties[name],), rules=rules
            )
            queries = sharded.on_rows(problem.test_rows_of(test[name]))
            predicted = predict(head, queries, m)[0]
            hits[name] = predicted == problem.test_labels
    chosen = Selection(max(accuracies, key=lambda x: accuracies[x]), penalties, accuracies)
    top, items = scored("top1", hits[chosen.variant])
    # TensorBoard takes no + in a name.
    metrics = {f"{x.replace('+', '_and_')}_top1": float(hit.mean()) for x, hit in hits.items()}
    words = f"{chosen.variant}, penalty {chosen.penalties[chosen.variant]:.0e}"
    meaning = (
        f"logistic regression: share of {m:,} test images put into the right one of "
        f"{problem.num_classes} classes by one linear layer trained on the frozen features of "
        f"{n:,} images (features and penalty are chosen on held-out training images, never on the "
        "test images)."
    )
    kind = "" if rules == RULES[OWN] else f"-{datasets.fingerprint(rules)}"
    data = f"{problem.data}-{PROTOCOL}{kind}"
    return Outcome(("top1",), top | metrics, items, data, meaning, {"top1": words})


def choose_penalty(
    x: jax.Array,
    labels: np.ndarray,
    num_classes: int,
    groups: np.ndarray,
    seed: int = 0,
    rules: Rules = RULES[OWN],
) -> tuple[float, float]:
    """(penalty, held-out accuracy): by default of all :data:`PENALTIES` the largest within one
    standard error of the best on the held-out fifth of the training rows, over three random splits.

    Args:
      x: (N, d) over all devices. labels, groups: (n,) int.
    """
    first = seed * rules.splits
    splits = [hold_out(labels, groups, rules.held_out, first + i) for i in range(rules.splits)]
    judged = sum(len(held_out) for _, held_out in splits)
    hits = np.zeros(len(rules.strengths))
    for kept, held_out in splits:
        penalties = rules.penalties(len(kept))
        head = fit(x, labels, num_classes, penalties, kept, rules)
        predicted = predict(head, x, len(labels))
        hits += (predicted[:, held_out] == labels[held_out]).sum(axis=1)
    accuracy = hits / judged
    best = accuracy.max()
    good = accuracy >= best - np.sqrt(best * (1 - best) / judged)
    chosen = int(np.flatnonzero(good)[-1] if rules.cautious else accuracy.argmax())
    return rules.penalties(len(labels))[chosen], float(accuracy[chosen])


class Head(NamedTuple):
    """weights (r, P, C) and bias (P, C) of features that were scaled and rotated into ``basis``
    (d, r)."""

    scaling: sharded.Scaling
    basis: jax.Array
    weights: jax.Array
    bias: jax.Array


def fit(
    x: jax.Array,
    labels: np.ndarray,
    num_classes: int,
    penalties: Sequence[float],
    kept: np.ndarray | None = None,
    rules: Rules = RULES[OWN],
) -> Head:
    """Softmax regression for each penalty p: minimises mean cross-entropy + p/2 |W|^2 (the bias is
    free) over features as they are, or standardised and divided by sqrt(d).

    Args:
      x: (N, d) over all devices.
      labels: (n,) int in [0, num_classes).
      kept: numbers of the rows to fit; None for all.
    """
    n = len(labels)
    kept = np.arange(n) if kept is None else kept
    weights = np.zeros(n, np.float32)
    weights[kept] = 1 / len(kept)
    weights_on = sharded.on_rows(weights)
    scaling = sharded.scaling(x, weights_on)
    if not rules.standardise:  # the mean goes into the bias, which is free
        scaling = scaling._replace(scale=jnp.ones_like(scaling.scale))
    x = sharded.apply_scaling(scaling, x)
    # The penalty is blind to rotations, and the optimum lies in the span of the rows: nothing is
    # lost.
    gram = np.asarray(sharded.gram(x, weights_on))
    basis, curvature = (sharded.everywhere(a) for a in sharded.eigenbasis(gram, len(kept)))
    classes = sharded.on_rows(np.asarray(labels, np.int32))
    asked = sharded.everywhere(np.asarray(penalties, np.float32))
    solution = _solve(
        x @ basis, classes, weights_on, curvature, asked, num_classes, rules.iterations
    )
    return Head(scaling, basis, *solution)


def predict(head: Head, x: jax.Array, n: int) -> np.ndarray:
    """(P, n) int: the most likely class of the first ``n`` rows of x (N, d), on every process."""
    return meshes.whole(_classify(head, x))[:, :n]


@jax.jit
def _classify(head: Head, x: jax.Array) -> jax.Array:
    rotated = sharded.apply_scaling(head.scaling, x) @ head.basis
    return (jnp.tensordot(rotated, head.weights, axes=1) + head.bias).argmax(axis=-1).T


@functools.partial(jax.jit, static_argnames=("num_classes", "iterations"))
def _solve(
    x: jax.Array,
    labels: jax.Array,
    row_weights: jax.Array,
    curvature: jax.Array,
    penalties: jax.Array,
    num_classes: int,
    iterations: int,
) -> tuple[jax.Array, jax.Array]:
    """Weights (r, P, C) and biases (P, C) for rotated features x (N, r) with x'Wx = diag(curvature)
    under the row weights W (N,), which add up to 1."""
    target = jax.nn.one_hot(labels, num_classes)[:, None, :]
    r, row_weights = x.shape[1], row_weights[:, None, None]
    step = 1 / (0.5 * curvature[:, None, None] + penalties[None, :, None])  # (r, P, 1)

    def gradient(w: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
        excess = jax.nn.softmax(jnp.tensordot(x, w, axes=1) + b) - target  # (N, P, C)
        excess = excess * row_weights
        return jnp.tensordot(x.T, excess, axes=1) + penalties[None, :, None] * w, excess.sum(axis=0)

    def iterate(carry: Any, _: None) -> tuple[Any, None]:
        (w, b), (look_w, look_b), momentum = carry
        grad_w, grad_b = gradient(look_w, look_b)
        # the bias' curvature is 1, its bound 1/2
        new_w, new_b = (look_w - step * grad_w, look_b - 2 * grad_b)
        # Restart the momentum of each penalty's problem when it points uphill.
        uphill = (
            jnp.einsum("rpc,rpc->p", grad_w, new_w - w) + ((new_b - b) * grad_b).sum(axis=1)
        ) > 0
        grown = 0.5 * (1 + jnp.sqrt(1 + 4 * momentum**2))
        beta = jnp.where(uphill, 0.0, (momentum - 1) / grown)
        momentum = jnp.where(uphill, 1.0, grown)
        look = new_w + beta[None, :, None] * (new_w - w), new_b + beta[:, None] * (new_b - b)
        return ((new_w, new_b), look, momentum), None

    start = jnp.zeros((r, len(penalties), num_classes)), jnp.zeros((len(penalties), num_classes))
    carry = (start, start, jnp.ones(len(penalties)))
    (solution, _, _), _ = jax.lax.scan(iterate, carry, length=iterations)
    return solution
