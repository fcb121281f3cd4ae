"""Whether a step may change the state: not when it is not finite, and not, if the config asks for
it, when its gradient stands out from those before it.

A spike is a step whose gradient norm (before clipping) exceeds ``spike_factor`` times the running
geometric mean of the accepted steps. The gradient and not the loss is watched, because it is the
gradient of one odd batch that does the harm, and the loss shows it one step later. The mean, of the
logarithm of the norm, is a plain average over the first ``window_steps`` accepted steps and forgets
at the rate 1 / window_steps from then on; before that no step is called a spike. After
``max_skips`` spikes in a row the norm has a new level: the step is accepted and the mean begins
again.

Related rules: OLMo-core and levanter skip at 6 standard deviations of the last 128 steps; ZClip
(arXiv 2504.02507) clips by the z-score of an exponential average.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

CAUSES = ("", "not finite", "spike")
FINE, NOT_FINITE, SPIKE = range(3)
State = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Guard:
    """The rule above. ``spike_factor`` 0: the mean is kept, but nothing is a spike."""

    spike_factor: float = 0.0
    window_steps: int = 128
    max_skips: int = 3

    @classmethod
    def from_config(cls, guard: ConfigDict) -> Guard:
        """Reads ``config.guard``."""
        return cls(guard.spike_factor, guard.spike_window_steps, guard.spike_max_skips)

    def judge(self, state: State, loss: jax.Array, norm: jax.Array) -> tuple[jax.Array, State]:
        """(cause () int32, an index of ``CAUSES``; the state after this step), from the step's loss
        and gradient norm. Traceable."""
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        log_norm, mean, seen = jnp.log(norm), state["log_norm"], state["seen"]
        high = jnp.zeros((), bool)
        if self.spike_factor:
            above = log_norm - mean > jnp.log(self.spike_factor)
            high = finite & (seen >= self.window_steps) & above
        spike = high & (state["skips"] < self.max_skips)

        taken = finite & ~spike & (norm > 0)  # a gradient of zero has no logarithm
        seen = jnp.where(high, 0, seen)  # accepted though high: a new level
        average = mean + (log_norm - mean) / jnp.minimum(seen + 1, self.window_steps)
        after = {
            "log_norm": jnp.where(taken, average, mean),
            "seen": jnp.where(taken, jnp.minimum(seen + 1, self.window_steps), state["seen"]),
            "skips": jnp.where(spike, state["skips"] + 1, jnp.where(taken, 0, state["skips"])),
            "trouble": jnp.where(
                finite & ~spike, jnp.maximum(state["trouble"] - 1, 0), self.window_steps
            ),
        }
        cause = jnp.where(finite, jnp.where(spike, SPIKE, FINE), NOT_FINITE)
        return cause.astype(jnp.int32), after


def init() -> State:
    """The state of a guard that has seen nothing. log_norm: () float32, mean logarithm of the
    accepted norms; seen: () int32, accepted steps, up to the window; skips: () int32, in a row;
    trouble: () int32, how many more steps must be accepted, in a row, until the run is sound again
    after one that was refused: a window of them."""
    zero = jnp.zeros((), jnp.int32)
    norm = jnp.zeros((), jnp.float32)
    return {"log_norm": norm, "seen": zero, "skips": zero, "trouble": zero}
