"""What DINO and iBOT do with the logits of their prototypes, without ever needing all logits at
once.

A head gives :class:`~webssl_jax.models.heads.Scores`, logits that are not multiplied out yet. The
teacher's targets are softmaxes of its logits with a term for every row and one for every prototype,
whichever way they are centred, and these terms are all that is kept of them (:class:`Targets`).
Every function here takes the prototypes ``chunk`` at a time and adds up over the chunks what it
needs of each row; the backward pass multiplies a chunk out again. ``chunk`` = 0 takes all
prototypes as one chunk and, figures of the log apart, nothing twice: the plain computation. Any
chunk gives the same results up to the rounding of float32.

Chunks are for few chips or small backbones, where the logits are what does not fit. They take R x
chunk floats instead of R x K, a few times over, and multiply the teacher's logits out five times
and the student's twice instead of once each (three iterations of Sinkhorn, loss, its gradient).

Shape letters: R rows (CLS tokens or masked patches), b bottleneck, K prototypes; B images, T views
of the teacher, S views of the student.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from einops import rearrange

from webssl_jax.models.heads import Scores

_Carry = TypeVar("_Carry")
# log sum exp, a chunk at a time: (the largest value so far, the sum of exp(x - largest))
_Sums = tuple[jax.Array, jax.Array]
# of statistics(), each (R,): sums, mean, entropy, product, best, favourite
_Figures = tuple[_Sums, jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]


class Targets(NamedTuple):
    """The teacher's targets, (R, K): exp(logits / temperature + rows + columns).

    scores: (R, K). temperature: a scalar. rows: (R,), with Sinkhorn -inf at padding, whose targets
    are 0; with a running centre padding has targets too, and the loss's weights leave it out.
    columns: (K,).
    """

    scores: Scores
    temperature: jax.Array
    rows: jax.Array
    columns: jax.Array

    def logs(self) -> jax.Array:
        """Their logarithms, (R, K)."""
        return self.scores.logits() / self.temperature + self.rows[:, None] + self.columns

    def of(self, kernel: jax.Array, columns: jax.Array) -> Targets:
        """The same rows for some of the prototypes."""
        return self._replace(scores=self.scores._replace(kernel=kernel), columns=columns)


def sinkhorn_knopp(
    scores: Scores,
    temperature: jax.Array,
    *,
    valid: jax.Array | None = None,
    iterations: int = 3,
    chunk: int = 0,
) -> Targets:
    """Assigns rows to prototypes so that all prototypes get equal shares (Caron et al.,
    arXiv 2006.09882, eq. 3 to 5, as in DINOv2): normalises exp(logits / temperature) over the rows
    of every prototype, then over the prototypes of every row, ``iterations`` times.

    scores: (R, K), all rows of the global batch. valid: (R,) bool, false where a row is padding and
    takes no part. The targets of a valid row add up to 1.

    In logarithms, where nothing overflows. A prototype has all rows in its chunk, so one run over
    the chunks is an iteration.
    """
    features = scores.features
    if valid is None:
        valid = jnp.ones(features.shape[:1], bool)
    rows = jnp.where(valid, 0.0, -jnp.inf)

    def iterate(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        def share(total: jax.Array, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
            scaled = Scores(features, kernel).logits() / temperature + rows[:, None]
            # finite, for a batch without one valid row
            largest = jnp.maximum(scaled.max(axis=0), jnp.finfo(jnp.float32).min)
            parts = jnp.exp(scaled - largest)
            columns = _log_inverse(parts.sum(axis=0))
            return total + (parts * jnp.exp(columns)).sum(axis=1), columns - largest

        total, columns = _over_chunks(share, jnp.zeros_like(rows), scores.kernel, chunk)
        return rows + _log_inverse(total), columns

    for _ in range(iterations):
        rows, columns = iterate(rows)
    return Targets(scores, temperature, rows, columns)


def _log_inverse(x: jax.Array) -> jax.Array:
    """log(1 / x), and -inf where x is 0: there is nothing to share there."""
    return jnp.where(x > 0, -jnp.log(jnp.where(x > 0, x, 1.0)), -jnp.inf)


def centred_softmax(
    scores: Scores, centre: jax.Array, temperature: jax.Array, *, chunk: int = 0
) -> Targets:
    """DINO's teacher (Caron et al., arXiv 2104.14294, eq. 1 and 4): softmax((logits - centre) /
    temperature). scores: (R, K). ``centre`` (K,) is that of the steps before."""
    columns = -centre / temperature

    def add(sums: _Sums, piece: tuple[jax.Array, jax.Array]) -> tuple[_Sums, None]:
        kernel, columns = piece
        scaled = Scores(scores.features, kernel).logits() / temperature + columns
        return _add_exp(*sums, scaled), None

    sums, _ = _over_chunks(add, _no_exp(scores.features.shape[:1]), (scores.kernel, columns), chunk)
    return Targets(scores, temperature, -_log(*sums), columns)


def next_centre(
    centre: jax.Array, scores: Scores, weights: jax.Array, momentum: float
) -> jax.Array:
    """The centre (K,) for the step after this one: momentum * centre + (1 - momentum) * mean, the
    mean of the rows' logits with ``weights`` (R,) that add up to 1.

    The mean of products is the product of the mean, so no logits are needed.
    """
    kernel, highest = scores.kernel, jax.lax.Precision.HIGHEST
    features = scores.features.astype(kernel.dtype).astype(jnp.float32)
    mean = jnp.matmul(weights, features, precision=highest)
    mean = jnp.matmul(mean, kernel.astype(jnp.float32), precision=highest)
    return momentum * centre + (1 - momentum) * mean


def cross_entropies(
    targets: Targets, student: Scores, temperature: float, *, chunk: int = 0
) -> jax.Array:
    """-sum_k target log softmax(logits / temperature), of every teacher view with every student
    view of the same image: (B, T, S) float32.

    targets: (B * T, K), the views of an image together. student: (B, S, K).
    """
    b, s, _ = student.features.shape
    t = targets.rows.shape[0] // b

    def add(
        carry: tuple[_Sums, jax.Array, jax.Array], piece: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[tuple[_Sums, jax.Array, jax.Array], None]:
        sums, mass, products = carry
        kernel, columns, student_kernel = piece
        wanted = jnp.exp(targets.of(kernel, columns).logs())
        wanted = rearrange(wanted, "(b t) k -> b t k", b=b)
        scaled = student._replace(kernel=student_kernel).logits() / temperature
        products += jnp.einsum("btk,bsk->bts", wanted, scaled, precision=jax.lax.Precision.HIGHEST)
        return (_add_exp(*sums, scaled), mass + wanted.sum(axis=-1), products), None

    start = (_no_exp((b, s)), jnp.zeros((b, t)), jnp.zeros((b, t, s)))
    pieces = (targets.scores.kernel, targets.columns, student.kernel)
    (sums, mass, products), _ = _over_chunks(add, start, pieces, chunk)
    return mass[:, :, None] * _log(*sums)[:, None, :] - products


def statistics(
    targets: Targets, student: Scores, temperature: float, *, chunk: int = 0
) -> dict[str, jax.Array]:
    """How sure and how varied both are, as scalars without gradients: the mean entropies in nats
    ``teacher_entropy`` and ``student_entropy``, the mean divergence ``teacher_student_kl`` =
    KL(teacher || student), and ``prototypes_used``, the number of those that some target favours.

    targets, student: (R, K), the same crops in the same order, none of them padding.
    """
    targets, student = jax.lax.stop_gradient((targets, student))
    r, k = targets.rows.shape[0], targets.columns.shape[0]

    def add(carry: _Figures, piece: tuple[jax.Array, ...]) -> tuple[_Figures, None]:
        (largest, total), mean, entropy, product, best, favourite = carry
        kernel, columns, index, student_kernel = piece
        logs = targets.of(kernel, columns).logs()
        wanted = jnp.exp(logs)
        entropy -= (wanted * jnp.where(wanted > 0, logs, 0.0)).sum(axis=-1)
        favourite = jnp.where(logs.max(axis=-1) > best, index[logs.argmax(axis=-1)], favourite)
        best = jnp.maximum(best, logs.max(axis=-1))
        scaled = student._replace(kernel=student_kernel).logits() / temperature
        new, total = _add_exp(largest, total, scaled)
        mean = mean * jnp.exp(largest - new)
        mean += (jnp.exp(scaled - new[:, None]) * scaled).sum(axis=-1)
        product += (wanted * scaled).sum(axis=-1)
        return ((new, total), mean, entropy, product, best, favourite), None

    zeros, index = jnp.zeros(r), jnp.arange(k, dtype=jnp.int32)
    start = (_no_exp((r,)), zeros, zeros, zeros, zeros - jnp.inf, jnp.zeros(r, jnp.int32))
    pieces = (targets.scores.kernel, targets.columns, index, student.kernel)
    (sums, mean, entropy, product, _, favourite), _ = _over_chunks(add, start, pieces, chunk)
    return {
        "teacher_entropy": entropy.mean(),
        "student_entropy": (_log(*sums) - mean / sums[1]).mean(),
        "teacher_student_kl": (_log(*sums) - product - entropy).mean(),
        "prototypes_used": jnp.zeros(k, bool).at[favourite].set(True).sum(),
    }


def _no_exp(shape: tuple[int, ...]) -> _Sums:
    return jnp.full(shape, -jnp.inf), jnp.zeros(shape)


def _add_exp(largest: jax.Array, total: jax.Array, x: jax.Array) -> _Sums:
    # What is subtracted drops out, so it needs no gradient.
    new = jnp.maximum(largest, jax.lax.stop_gradient(x).max(axis=-1))
    return new, total * jnp.exp(largest - new) + jnp.exp(x - new[..., None]).sum(axis=-1)


def _log(largest: jax.Array, total: jax.Array) -> jax.Array:
    return largest + jnp.log(total)


def _over_chunks(
    body: Callable[[_Carry, Any], tuple[_Carry, Any]], carry: _Carry, arrays: Any, chunk: int
) -> tuple[_Carry, Any]:
    """``carry, out = body(carry, piece)`` for one piece after another of ``arrays`` (..., K), cut
    on their last axis. Returns the last carry and the outs (..., K) put together."""
    size = jax.tree.leaves(arrays)[0].shape[-1]
    if chunk in (0, size):
        return body(carry, arrays)

    # A chunk is not a run of neighbours but every n-th prototype: where they are cut over devices,
    # each device has its part of every chunk.
    pieces = jax.tree.map(lambda x: rearrange(x, "... (c n) -> n ... c", c=chunk), arrays)
    carry, out = jax.lax.scan(jax.checkpoint(body, prevent_cse=False), carry, pieces)
    return carry, jax.tree.map(lambda x: rearrange(x, "n ... c -> ... (c n)"), out)
