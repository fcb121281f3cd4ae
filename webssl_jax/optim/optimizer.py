"""AdamW over paths: which parameters decay, at which rate they learn and which are frozen is said
by tables.

The learning rate and the weight decay come in as values of the step's schedules, so the optimiser
state holds only moments, and changing a schedule never invalidates a checkpoint. Decoupled decay as
in torch's AdamW: ``p <- p - lr * m_lr * (adam(g) + wd * m_wd * p)``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from webssl_jax import params as paths
from webssl_jax.config import ConfigError
from webssl_jax.optim.tables import Tables

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """AdamW with the multipliers of ``tables``. ``clip``: "none", "global" or "per_module"
    (top-level groups)."""

    b1: float
    b2: float
    eps: float
    clip: str
    clip_norm: float
    moment_dtype: str
    tables: Tables

    @classmethod
    def from_config(cls, optim: ConfigDict, tables: Tables) -> Optimizer:
        """Rows of ``optim.frozen`` and ``optim.lr_multipliers`` come before the method's own."""
        tables = dataclasses.replace(
            tables,
            frozen=tuple((pattern, True) for pattern in optim.frozen) + tuple(tables.frozen),
            learning_rate=tuple(map(tuple, optim.lr_multipliers)) + tuple(tables.learning_rate),
        )
        return cls(
            b1=optim.b1,
            b2=optim.b2,
            eps=optim.eps,
            clip=optim.clip,
            clip_norm=optim.clip_norm,
            moment_dtype=optim.moment_dtype,
            tables=tables,
        )

    def check(self, params: Params) -> None:
        """Refuses table rows that match no parameter.

        Raises:
          ConfigError: naming the regex.
        """
        for key, table in (
            ("frozen", self.tables.frozen),
            ("lr_multipliers", self.tables.learning_rate),
        ):
            for pattern in paths.unmatched_rows(table, params):
                raise ConfigError(
                    f"config.optim.{key}: {pattern!r} matches no parameter; "
                    f"paths look like {', '.join(list(paths.flatten(params))[:3])}"
                )

    def _frozen(self, params: Params) -> Params:
        return paths.match(self.tables.frozen, params, False)

    def _adam(self, params: Params) -> optax.GradientTransformation:
        adam = optax.scale_by_adam(self.b1, self.b2, self.eps, mu_dtype=self.moment_dtype)
        return optax.masked(adam, jax.tree.map(lambda frozen: not frozen, self._frozen(params)))

    def init(self, params: Params) -> optax.OptState:
        """Moments of the trained parameters; frozen ones hold none."""
        return self._adam(params).init(params)

    def mask_frozen(self, grads: Params) -> Params:
        """Zeroes the gradients of frozen parameters, so that they enter no norm and XLA drops their
        computation."""
        return jax.tree.map(
            lambda g, frozen: jnp.zeros_like(g) if frozen else g, grads, self._frozen(grads)
        )

    def clip_gradients(self, grads: Params) -> tuple[Params, dict[str, jax.Array]]:
        """Clips by L2 norm. Returns the gradients and the norms from before: "all" and one per
        top-level module."""
        norms = {name: optax.tree.norm(group) for name, group in grads.items()}
        norms["all"] = optax.tree.norm(grads)
        if self.clip == "none":
            return grads, norms

        def scaled(group: paths.Tree, norm: jax.Array) -> paths.Tree:
            # torch.nn.utils.clip_grad_norm_ divides by norm + 1e-6
            scale = jnp.minimum(1.0, self.clip_norm / (norm + 1e-6))
            return jax.tree.map(lambda g: g * scale, group)

        if self.clip == "global":
            return scaled(grads, norms["all"]), norms
        return {name: scaled(group, norms[name]) for name, group in grads.items()}, norms

    def update(
        self,
        grads: Params,
        opt_state: optax.OptState,
        params: Params,
        schedule_values: Mapping[str, jax.Array],
    ) -> tuple[Params, optax.OptState]:
        """One AdamW step; ``grads`` are already clipped. ``schedule_values`` holds "learning_rate",
        "weight_decay" and what rows of the table of learning rates name. Returns new parameters and
        state."""
        directions, opt_state = self._adam(params).update(grads, opt_state, params)

        def step(path: str, param: jax.Array, direction: jax.Array) -> jax.Array:
            if paths.lookup(self.tables.frozen, path, False):
                return param
            multiplier = paths.lookup(self.tables.learning_rate, path, 1.0)
            if isinstance(multiplier, str):
                multiplier = schedule_values[multiplier]
            elif isinstance(multiplier, tuple):  # one for each of the stacked blocks
                per_block = np.asarray(multiplier, np.float32)
                multiplier = per_block.reshape((-1,) + (1,) * (param.ndim - 1))
            lr = schedule_values["learning_rate"] * multiplier
            decay = schedule_values["weight_decay"] * paths.lookup(self.tables.decay, path, 1.0)
            new = param - lr * (direction + decay * param)
            bounds = paths.lookup(self.tables.bounds, path)
            return new if bounds is None else jnp.clip(new, *bounds)

        return paths.map_with_path(step, params, directions), opt_state
