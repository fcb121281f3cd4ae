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
    fall = max(total_steps - warmup_steps, 1)

    def after(step: jax.Array) -> jax.Array:
        progress = jnp.clip((step - warmup_steps) / fall, 0.0, 1.0)
        return final + 0.5 * (base - final) * (1 + jnp.cos(jnp.pi * progress))

    return _after_warmup(after, base, warmup_steps, start, reach_base_in_warmup)


def warmup_constant(
    base: float,
    final: float,
    total_steps: int,
    warmup_steps: int = 0,
    cooldown_steps: int = 0,
    reach_base_in_warmup: bool = False,
) -> Schedule:
    """Linear from 0 to ``base`` as in :func:`warmup_cosine`, then ``base``, and over the last
    ``cooldown_steps`` linear to ``final``, which it is from ``total_steps`` on. Before the cooldown
    nothing depends on ``total_steps``. (Zhai et al., arXiv 2106.04560; Haegele et al., 2405.18392.)
    """

    def after(step: jax.Array) -> jax.Array:
        if not cooldown_steps:
            return jnp.full((), base, jnp.float32)
        left = jnp.clip((total_steps - step) / cooldown_steps, 0.0, 1.0)
        return final + (base - final) * left

    return _after_warmup(after, base, warmup_steps, 0.0, reach_base_in_warmup)


def _after_warmup(
    after: Schedule, base: float, warmup_steps: int, start: float, reach_base_in_warmup: bool
) -> Schedule:
    rise = max(warmup_steps - 1, 1) if reach_base_in_warmup else max(warmup_steps, 1)

    def schedule(step: jax.Array) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        warm = start + (base - start) * step / rise
        return jnp.where(step < warmup_steps, warm, after(step))

    return schedule
