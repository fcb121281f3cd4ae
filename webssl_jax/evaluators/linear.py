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

Everything lives in memory: for some 100,000 images, not for ImageNet at 7B.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from webssl_jax.evaluators.base import Score, on_one_device, standard_error
from webssl_jax.evaluators.features import eigenbasis
from webssl_jax.evaluators.splits import hold_out

# Multiplies |W|^2 / 2 against the mean cross-entropy, for features scaled to a mean squared length
# of 1.
PENALTIES = tuple(float(p) for p in 10.0 ** np.arange(-6.0, -2.4, 0.5))
ITERATIONS = 40  # accuracies on the embedded corpus stop moving at 30
HELD_OUT = 0.2
# one split's choice among so many heads is noisy, and the noise does not show in the standard error
SPLITS = 3


class Selection(NamedTuple):
    """What the held-out training images chose. penalties: {variant: penalty}; accuracies: held out,
    at that penalty."""

    variant: str
    penalties: dict[str, float]
    accuracies: dict[str, float]


def variants(features: Mapping[str, np.ndarray], layers: Sequence[int]) -> dict[str, np.ndarray]:
    """The probe's inputs from ``features.extract``'s output. ``layers`` are the last blocks, in
    order of depth.

    Returns {"cls", "cls+patches", "patches", and with several blocks "cls_x4", "cls_x4+patches",
    "patches_x4"}.
    """
    out = {
        "cls": features["cls"],
        "cls+patches": np.concatenate([features["cls"], features["patches"]], axis=1),
        "patches": features["patches"],
    }
    if len(layers) > 1:
        cls = [features[f"cls@{layer}"] for layer in layers]
        patches = [features[f"patches@{layer}"] for layer in layers]
        n = len(layers)
        out[f"cls_x{n}"] = np.concatenate(cls, axis=1)
        out[f"cls_x{n}+patches"] = np.concatenate([*cls, features["patches"]], axis=1)
        out[f"patches_x{n}"] = np.concatenate(patches, axis=1)
    return out


def probe(
    train: Mapping[str, np.ndarray],
    train_labels: np.ndarray,
    test: Mapping[str, np.ndarray],
    test_labels: np.ndarray,
    num_classes: int,
    groups: np.ndarray | None = None,
    seed: int = 0,
) -> Score:
    """Chooses on train, refits on train, looks at test once.

    Args:
      train, test: {variant: (n, d) float} with the same names.
      train_labels, test_labels: (n,) int in [0, num_classes).
      groups: (n,) int, near-duplicates of the training images by ``splits.look_alikes``; None if
        there are none.

    Returns:
      A ``Score``; ``by_variant`` holds each variant's test accuracy at the penalty chosen for it on
      train.
    """
    chosen = select(train, train_labels, num_classes, groups, seed)
    hits = {}
    for name in train:
        penalty = (chosen.penalties[name],)
        logits = fit_and_apply(train[name], train_labels, test[name], num_classes, penalty)[0]
        hits[name] = logits.argmax(axis=-1) == test_labels
    words = f"{chosen.variant}, penalty {chosen.penalties[chosen.variant]:.0e}"
    return Score(
        hits[chosen.variant], words, {name: float(hit.mean()) for name, hit in hits.items()}
    )


def select(
    train: Mapping[str, np.ndarray],
    labels: np.ndarray,
    num_classes: int,
    groups: np.ndarray | None = None,
    seed: int = 0,
) -> Selection:
    """Fits the whole grid on 80 % of the training images and reads accuracy off the others, for
    three random splits.

    For each variant the largest penalty within one standard error of its best; then the variant
    with the highest accuracy, the first of equals.
    """
    groups = np.arange(len(labels)) if groups is None else groups
    splits = [hold_out(labels, groups, HELD_OUT, seed * SPLITS + i) for i in range(SPLITS)]
    judged = sum(len(held_out) for _, held_out in splits)
    penalties, accuracies = {}, {}
    for name, x in train.items():
        hits = np.zeros(len(PENALTIES))
        for fit, held_out in splits:  # of nearly always equal sizes, so one compilation serves
            logits = fit_and_apply(x[fit], labels[fit], x[held_out], num_classes, PENALTIES)
            hits += (logits.argmax(axis=-1) == labels[held_out]).sum(axis=1)
        accuracy = hits / judged
        good = accuracy >= accuracy.max() - standard_error(accuracy.max(), judged)
        best = int(np.flatnonzero(good)[-1])
        penalties[name], accuracies[name] = PENALTIES[best], float(accuracy[best])
    return Selection(max(accuracies, key=accuracies.get), penalties, accuracies)


def fit_and_apply(
    x: np.ndarray,
    labels: np.ndarray,
    queries: np.ndarray,
    num_classes: int,
    penalties: Sequence[float],
    iterations: int = ITERATIONS,
) -> np.ndarray:
    """Softmax regression of ``labels`` (n,) on ``x`` (n, d) for each penalty p, applied to
    ``queries`` (m, d).

    Minimises mean cross-entropy + p/2 |W|^2 (the bias is free) over standardised features divided
    by sqrt(d).

    Returns:
      Logits (len(penalties), m, num_classes), float32.
    """
    x, queries = _standardise(np.asarray(x, np.float32), np.asarray(queries, np.float32))
    # The penalty is blind to rotations, and the optimum lies in the span of the rows: nothing is
    # lost.
    basis, curvature = eigenbasis(x)
    with on_one_device():
        weights, bias = _solve(
            x @ basis,
            np.asarray(labels, np.int32),
            curvature,
            np.asarray(penalties, np.float32),
            num_classes,
            iterations,
        )
        weights, bias = np.asarray(weights), np.asarray(bias)
    logits = np.tensordot(queries @ basis, weights, axes=1) + bias
    return logits.transpose(1, 0, 2)


def _standardise(x: np.ndarray, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Zero mean and unit variance by ``x``'s statistics, over sqrt(d) so that penalties mean the
    same at any d."""
    mean, std = x.mean(axis=0, dtype=np.float64), x.std(axis=0, dtype=np.float64)
    # A column that is constant up to rounding carries nothing; dividing by its std would blow
    # rounding up.
    scale = np.where(std > 1e-6 * np.maximum(np.abs(mean), 1e-6), 1 / np.maximum(std, 1e-30), 0.0)
    scale = (scale / np.sqrt(x.shape[1])).astype(np.float32)
    mean = mean.astype(np.float32)
    return (x - mean) * scale, (queries - mean) * scale


@functools.partial(jax.jit, static_argnames=("num_classes", "iterations"))
def _solve(x, labels, curvature, penalties, num_classes, iterations):
    """Weights (r, P, C) and biases (P, C) for rotated features x (n, r) with
    x'x/n = diag(curvature)."""
    target = jax.nn.one_hot(labels, num_classes)[:, None, :]
    n, r = x.shape
    step = 1 / (0.5 * curvature[:, None, None] + penalties[None, :, None])  # (r, P, 1)

    def gradient(w, b):
        excess = (jax.nn.softmax(jnp.tensordot(x, w, axes=1) + b) - target) / n  # (n, P, C)
        return jnp.tensordot(x.T, excess, axes=1) + penalties[None, :, None] * w, excess.sum(axis=0)

    def iterate(carry, _):
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
