"""Vital signs: the logged figures that tell a healthy run from a sick one, and the alarms on them,
as a method declares both. telemetry/alarms.py watches them; visuals/health.py draws them.

A run can train to the end with a falling loss and learn nothing: self-distillation has two trivial
solutions, the same prototype for every image and no preference at all (Caron et al., arXiv
2104.14294, section 5.3). No single figure tells these from a healthy start, which has no preference
either, so an alarm is several limits crossed together.
"""

from __future__ import annotations

import math
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from webssl_jax.methods.losses import entropy
from webssl_jax.models.layers import l2_normalise

# What one eigendecomposition of a TPU step takes without a loop in the program: for 512 rows XLA
# compiles 40 seconds longer, for 256 one or two (v5p, libtpu 0.0.42).
_RANK_ROWS = 256
_Figures = TypeVar("_Figures", float, np.ndarray)


class Sign(NamedTuple):
    """A figure of the log.

    metric: its name in metrics.jsonl. title: what it is, for people. least, most: what is possible
    for this batch and network (of a loss, ``most`` is that of a network that knows nothing). Limits
    are shares of the way from one to the other, and so are the curves of runs that differ in size.
    most None: there is no such value; the figure is drawn as it is and no limit can stand on it.
    """

    metric: str
    title: str
    most: float | None = None
    least: float = 0.0

    def share(self, value: _Figures) -> _Figures:
        """``value``, a number or an array, on the scale from ``least`` = 0 to ``most`` = 1."""
        return value if self.most is None else (value - self.least) / (self.most - self.least)

    def value(self, share: float) -> float:
        """The inverse of :meth:`share`."""
        return share if self.most is None else self.least + share * (self.most - self.least)


class Limit(NamedTuple):
    """Crossed when the share of the sign ``metric`` lies below ``below`` or above ``above``."""

    metric: str
    below: float = -math.inf
    above: float = math.inf


class Alarm(NamedTuple):
    """A sickness. It is there when every one of ``limits`` is crossed.

    name: a few words. says: one clause, what it means. knobs: what to look at, as config keys with
    a reason each. waits: the share of the warm-up in which a healthy run may look like this, too.
    """

    name: str
    limits: tuple[Limit, ...]
    says: str
    knobs: str
    waits: float = 1.0


class Vitals(NamedTuple):
    """What a method declares. Limits name metrics of ``signs``."""

    signs: tuple[Sign, ...] = ()
    alarms: tuple[Alarm, ...] = ()


def effective_rank(features: jax.Array) -> jax.Array:
    """RankMe (Garrido et al., arXiv 2210.02885, eq. 1): the effective number of directions that
    features span. X are the L2-normalised rows, p its singular values divided by their sum; the
    result is exp(entropy(p)): 1 if all rows are equal, at most :func:`most_rank`.

    features: (R, D). If R > 256, every n-th row is used, which bounds the cost and the rows that
    any device receives. Returns a float32 scalar, the same on any number of devices.
    """
    rows, stride = _sample(features.shape[0])
    # Reshaped and not strided, so that a sharded batch is picked from without being gathered.
    x = rearrange(features[: rows * stride], "(r s) d -> r s d", r=rows)[:, 0]
    x = l2_normalise(jax.lax.stop_gradient(x).astype(jnp.float32), 1e-8)
    x = x if rows <= x.shape[1] else x.T
    gram = jnp.einsum("id,jd->ij", x, x, precision=jax.lax.Precision.HIGHEST)
    values = jnp.sqrt(jnp.maximum(jnp.linalg.eigvalsh(gram), 0.0))
    return jnp.exp(entropy(values / values.sum()))


def most_rank(rows: int, width: int) -> int:
    """The largest :func:`effective_rank` of (rows, width) features."""
    return min(_sample(rows)[0], width)


def _sample(rows: int) -> tuple[int, int]:
    """(how many of ``rows`` are looked at, every how many-th)."""
    stride = -(-rows // _RANK_ROWS)
    return rows // stride, stride
