"""Schedules of mmcv, by which dense heads are trained: factors of the learning rate, by step.

Its warm-up multiplies the decayed rate and not the base, so the rate never reaches its base.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from webssl_jax.optim.schedules import Schedule


def poly(steps: int, warmup: int, warmup_from: float) -> Schedule:
    """A straight line from 1 to 0 (``poly`` with power 1)."""

    def schedule(step: jax.Array) -> jax.Array:
        return (1 - step / steps) * _warmup(step, warmup, warmup_from)

    return schedule


def cosine(steps: int, warmup: int, warmup_from: float, final: float = 1e-8) -> Schedule:
    """Half a cosine from 1 to ``final``."""

    def schedule(step: jax.Array) -> jax.Array:
        fall = final + (1 - final) * (1 + jnp.cos(jnp.pi * step / steps)) / 2
        return fall * _warmup(step, warmup, warmup_from)

    return schedule


def one_cycle(steps: int, low: float = 0.85, high: float = 0.95, share: float = 0.3) -> Schedule:
    """A momentum that falls from ``high`` to ``low`` within that share of the steps, and rises
    again: half a cosine each way (mmcv's OneCycle, which so replaces Adam's beta1)."""
    turn = share * steps - 1
    last = steps - 1

    def schedule(step: jax.Array) -> jax.Array:
        down = jnp.clip(step / max(turn, 1), 0, 1)
        up = jnp.clip((step - turn) / max(last - turn, 1), 0, 1)
        place = jnp.where(step < turn, down, 1 - up)  # 0 at both ends, 1 at the turn
        return high + (low - high) * (1 - jnp.cos(jnp.pi * place)) / 2

    return schedule


def _warmup(step: jax.Array, steps: int, first: float) -> jax.Array:
    return jnp.where(step < steps, first + (1 - first) * step / max(steps, 1), 1.0)
