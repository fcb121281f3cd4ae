"""The one train step, for every method: a pure function of (state, batch).

Order within a step, as in DINOv2's loop: schedules for step k -> loss and gradients (accumulated
over microbatches) -> clip -> guard -> AdamW -> teacher. The loss uses the teacher of before this
step's update.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from webssl_jax.methods.base import LossOutput, Method
from webssl_jax.optim.optimizer import Optimizer
from webssl_jax.optim.schedules import Schedule
from webssl_jax.sharding import mesh as meshes
from webssl_jax.sharding import rules
from webssl_jax.train_state import TrainState

Batch = Mapping[str, jax.Array]


def make_train_step(
    method: Method,
    optimizer: Optimizer,
    schedules: Mapping[str, Schedule],
    mesh: Mesh,
    accumulation_steps: int = 1,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict]]:
    """Builds ``step(state, batch) -> (state, metrics)``, not yet jitted.

    Args:
      schedules: {name: f(step)}; must hold "learning_rate" and "weight_decay".
      accumulation_steps: microbatches a step. Every microbatch is spread over all devices.

    The metrics are float32 scalars by their final names (``train/loss``, ``optim/grad_norm``, ...).
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # for models/layers.on_batch
            return _step(state, batch)

    def _step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        rng = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
        values = {name: schedule(state.step) for name, schedule in schedules.items()}
        rows = jax.tree.leaves(batch)[0].shape[0]
        batch = {**batch, "position": jnp.arange(rows, dtype=jnp.int32)}

        grads, out = gradients(state, batch, rng, values)
        grads = optimizer.mask_frozen(grads)
        grads, norms = optimizer.clip_gradients(grads)
        params, opt_state = optimizer.update(
            grads, state.opt_state, state.params, values["learning_rate"], values["weight_decay"]
        )
        teacher = method.update_teacher(state.teacher, params, values)

        # A step that is not finite changes nothing but the counters: one bad batch must not end a
        # run.
        finite = jnp.isfinite(out.loss) & jnp.isfinite(norms["all"])
        new = (params, teacher, opt_state, out.aux)
        old = (state.params, state.teacher, state.opt_state, state.aux)
        params, teacher, opt_state, aux = jax.tree.map(
            lambda n, o: jnp.where(finite, n, o), new, old
        )
        skipped = state.skipped + jnp.where(finite, 0, 1).astype(jnp.int32)
        update_norm = optax.tree.norm(jax.tree.map(jnp.subtract, params, state.params))

        metrics = {
            "train/loss": out.loss,
            "train/skipped_steps": skipped,
            "optim/param_norm": optax.tree.norm(params),
            "optim/update_norm": update_norm,
            "optim/grad_norm": norms.pop("all"),
        }
        metrics |= {f"optim/grad_norm_{name}": norm for name, norm in norms.items()}
        metrics |= {f"train/{name}": value for name, value in (out.terms | out.report).items()}
        metrics |= {f"optim/{name}": value for name, value in values.items()}
        metrics = {name: jnp.asarray(value, jnp.float32) for name, value in metrics.items()}
        return state._replace(
            step=state.step + 1,
            params=params,
            teacher=teacher,
            opt_state=opt_state,
            aux=aux,
            skipped=skipped,
        ), metrics

    def gradients(state, batch, rng, values) -> tuple[dict, LossOutput]:
        def loss(params, aux, microbatch):
            out = method.loss(params, state.teacher, aux, microbatch, rng, values)
            return out.loss, out

        grad = jax.grad(loss, has_aux=True)
        if accumulation_steps == 1:
            return grad(state.params, state.aux, batch)

        def microbatches(x):
            # Microbatch a takes rows a, a + A, ...: these lie on every device, so nothing moves
            # between devices.
            return jnp.swapaxes(
                x.reshape(x.shape[0] // accumulation_steps, accumulation_steps, *x.shape[1:]), 0, 1
            )

        def body(carry, microbatch):
            total, aux = carry
            grads, out = grad(state.params, aux, microbatch)
            total = jax.tree.map(lambda t, g: t + g / accumulation_steps, total, grads)
            return (rules.constrain(total, mesh), out.aux), (out.loss, out.terms, out.report)

        zeros = rules.constrain(jax.tree.map(jnp.zeros_like, state.params), mesh)
        (total, aux), scalars = jax.lax.scan(
            body, (zeros, state.aux), jax.tree.map(microbatches, batch)
        )
        loss_value, terms, report = jax.tree.map(jnp.mean, scalars)
        return total, LossOutput(loss_value, terms, report, aux)

    return step


def jit_train_step(step: Callable, abstract_state: TrainState, mesh: Mesh):
    """Jits ``step`` with the state's shardings on both sides and the old state's memory given to
    the new one."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state)
    return jax.jit(
        step,
        in_shardings=(shardings, meshes.batch_sharding(mesh)),
        out_shardings=(shardings, meshes.replicated(mesh)),
        donate_argnums=0,
    )
