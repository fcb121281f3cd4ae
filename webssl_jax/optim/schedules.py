"""Schedules: functions of the step (0-based, the one about to be taken) that trace under jit."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

Schedule = Callable[[jax.Array], jax.Array]


def constant(value: float) -> Schedule:
    """``value`` at every step."""
    return lambda step: jnp.full((), value, jnp.float32)


def warmup_cosine(
    base: float,
    final: float,
    total_steps: int,
    warmup_steps: int = 0,
    start: float = 0.0,
    reach_base_in_warmup: bool = False,
) -> Schedule:
    """Linear from ``start`` to ``base``, then half a cosine to ``final``; ``final`` from
    ``total_steps`` on.

    The originals differ by one step. MAE (util/lr_sched.py) rises by ``step / warmup_steps`` and so
    is at ``base`` in the first step after the warm-up. DINOv2 (CosineScheduler) takes a
    ``linspace`` that includes its end point, so the last warm-up step is already at ``base``:
    ``reach_base_in_warmup=True``.
    """
    rise = max(warmup_steps - 1, 1) if reach_base_in_warmup else max(warmup_steps, 1)
    fall = max(total_steps - warmup_steps, 1)

    def schedule(step: jax.Array) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        warm = start + (base - start) * step / rise
        progress = jnp.clip((step - warmup_steps) / fall, 0.0, 1.0)
        cosine = final + 0.5 * (base - final) * (1 + jnp.cos(jnp.pi * progress))
        return jnp.where(step < warmup_steps, warm, cosine)

    return schedule
