"""The one train step, for every method: a pure function of (state, batch).

Order within a step, as in DINOv2's loop: schedules for step k -> loss and gradients (accumulated
over microbatches) -> clip -> guard -> AdamW -> teacher. The loss uses the teacher of before this
step's update. A step that the guard refuses changes nothing but ``step``, ``skipped`` and the
guard's own memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from webssl_jax import config as configs
from webssl_jax import params as paths
from webssl_jax.methods.base import LossOutput, Method, Params
from webssl_jax.optim.guard import FINE, Guard
from webssl_jax.optim.optimizer import Optimizer
from webssl_jax.optim.schedules import Schedule, warmup_constant, warmup_cosine
from webssl_jax.sharding import compiler_options, rules
from webssl_jax.sharding import mesh as meshes
from webssl_jax.train_state import TrainState

Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]  # float32 scalars by their final names


class Health(NamedTuple):
    """How a step went. cause: () int32, why it changed nothing, an index of ``optim.guard.CAUSES``;
    0: it did. grad_norms: {parameter path: () float32}, before clipping."""

    cause: jax.Array
    grad_norms: dict[str, jax.Array]


# (state, batch, previous) -> (state, metrics, health); make_train_step says more
Step = Callable[[TrainState, Batch, jax.Array], tuple[TrainState, Metrics, Health]]


def run_schedules(config: ConfigDict, method: Method) -> dict[str, Schedule]:
    """{name: f(step)} of a run: the method's own, the learning rate and the weight decay."""
    total_steps = configs.total_steps(config)
    decay, last_decay = configs.weight_decays(config)
    return method.schedules(total_steps, config.global_batch) | {
        "learning_rate": _rate(config, total_steps),
        "weight_decay": warmup_cosine(decay, last_decay, total_steps),
    }


def _rate(config: ConfigDict, total_steps: int) -> Schedule:
    optim = config.optim
    peak, last, early = configs.learning_rate(config), optim.final_lr, optim.warmup_ends_at_peak
    warmup = configs.steps(optim, "warmup", config)
    if optim.lr_schedule == "constant":
        cooldown = configs.steps(optim, "cooldown", config)
        return warmup_constant(peak, last, total_steps, warmup, cooldown, early)
    return warmup_cosine(peak, last, total_steps, warmup, reach_base_in_warmup=early)


def make_train_step(
    method: Method,
    optimizer: Optimizer,
    guard: Guard,
    schedules: Mapping[str, Schedule],
    mesh: Mesh,
    accumulation_steps: int = 1,
) -> Step:
    """Builds ``step(state, batch, previous) -> (state, metrics, health)``, not yet jitted.

    ``previous`` is the cause in the health of the call before. Where that is not 0, this call
    changes nothing at all, and the same step must be called again with 0. So the host, which reads
    a verdict only when the next call is under way, still finds the state of the refused step, and
    can save exactly what that step was computed from (bad_steps/saving.py).

    Args:
      schedules: {name: f(step)}; must hold "learning_rate" and "weight_decay".
      accumulation_steps: microbatches a step. Every microbatch is spread over all devices.

    The metrics are float32 scalars by their final names (``train/loss``, ``optim/grad_norm``, ...).
    """

    def step(
        state: TrainState, batch: Batch, previous: jax.Array
    ) -> tuple[TrainState, Metrics, Health]:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # for models/layers.on_batch
            return _step(state, batch, previous)

    def _step(
        state: TrainState, batch: Batch, previous: jax.Array
    ) -> tuple[TrainState, Metrics, Health]:
        rng = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
        values = {name: schedule(state.step) for name, schedule in schedules.items()}
        rows = jax.tree.leaves(batch)[0].shape[0]
        batch = {**batch, "position": jnp.arange(rows, dtype=jnp.int32)}

        grads, out = gradients(state, batch, rng, values)
        grads = optimizer.mask_frozen(grads)
        leaf_norms = {path: optax.tree.norm(g) for path, g in paths.flatten(grads).items()}
        grads, norms = optimizer.clip_gradients(grads)
        params, opt_state = optimizer.update(grads, state.opt_state, state.params, values)
        teacher = method.update_teacher(state.teacher, params, values)

        # A step that the guard refuses changes nothing but the counters: one bad batch must not end
        # a run.
        cause, memory = guard.judge(state.guard, out.loss, norms["all"])
        void = previous != FINE
        new = (params, teacher, opt_state, out.aux)
        old = (state.params, state.teacher, state.opt_state, state.aux)
        params, teacher, opt_state, aux = jax.tree.map(
            lambda n, o: jnp.where((cause == FINE) & ~void, n, o), new, old
        )
        memory = jax.tree.map(lambda n, o: jnp.where(void, o, n), memory, state.guard)
        skipped = state.skipped + ((cause != FINE) & ~void).astype(jnp.int32)
        updates = jax.tree.map(jnp.subtract, params, state.params)

        metrics = {
            "train/loss": out.loss,
            "train/skipped_steps": skipped,
            "optim/param_norm": optax.tree.norm(params),
            "optim/update_norm": optax.tree.norm(updates),
            "optim/grad_norm": norms.pop("all"),
        }
        metrics |= {f"optim/grad_norm_{name}": norm for name, norm in norms.items()}
        metrics |= {f"optim/update_norm_{name}": optax.tree.norm(x) for name, x in updates.items()}
        metrics |= {f"train/{name}": value for name, value in (out.terms | out.report).items()}
        metrics |= {f"optim/{name}": value for name, value in values.items()}
        metrics = {name: jnp.asarray(value, jnp.float32) for name, value in metrics.items()}
        state = state._replace(
            step=state.step + (~void).astype(jnp.int32),
            params=params,
            teacher=teacher,
            opt_state=opt_state,
            aux=aux,
            skipped=skipped,
            guard=memory,
        )
        return state, metrics, Health(cause, leaf_norms)

    def gradients(
        state: TrainState, batch: Batch, rng: jax.Array, values: Mapping[str, jax.Array]
    ) -> tuple[Params, LossOutput]:
        def loss(params: Params, aux: Params, microbatch: Batch) -> tuple[jax.Array, LossOutput]:
            out = method.loss(params, state.teacher, aux, microbatch, rng, values)
            return out.loss, out

        grad = jax.grad(loss, has_aux=True)
        if accumulation_steps == 1:
            return grad(state.params, state.aux, batch)

        def microbatches(x: jax.Array) -> jax.Array:
            # Microbatch a takes rows a, a + A, ...: these lie on every device, so nothing moves
            # between devices.
            return jnp.swapaxes(
                x.reshape(x.shape[0] // accumulation_steps, accumulation_steps, *x.shape[1:]), 0, 1
            )

        def body(carry: tuple[Params, Params], microbatch: Batch) -> tuple[Any, Any]:
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


def jit_train_step(
    step: Step, abstract_state: TrainState, mesh: Mesh, donate: bool = True
) -> jax.stages.Wrapped:
    """Jits ``step`` with the state's shardings on both sides, (``donate``) the old state's memory
    given to the new one, and the compiler's options for the chips of ``mesh``."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state)
    everywhere = meshes.replicated(mesh)
    return jax.jit(
        step,
        in_shardings=(shardings, meshes.batch_sharding(mesh), everywhere),
        out_shardings=(shardings, everywhere, everywhere),
        donate_argnums=0 if donate else (),
        compiler_options=compiler_options.of(mesh),
    )


def lower_train_step(
    config: ConfigDict, method: Method, optimizer: Optimizer, abstract_state: TrainState, mesh: Mesh
) -> jax.stages.Lowered:
    """The step of a run, traced for ``mesh`` and ready to compile; nothing is allocated, so the
    mesh may be of devices that are not here (plan.py)."""
    sharding = meshes.batch_sharding(mesh)
    batch = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        for name, x in method.batch_spec(config.global_batch).items()
    }
    step = make_train_step(
        method,
        optimizer,
        Guard.from_config(config.guard),
        run_schedules(config, method),
        mesh,
        config.accumulation_steps,
    )
    cause = jax.ShapeDtypeStruct((), np.int32, sharding=meshes.replicated(mesh))
    return jit_train_step(step, abstract_state, mesh).lower(abstract_state, batch, cause)


def by_shapes(steps: Sequence[tuple[Mapping[str, Any], Step]]) -> Step:
    """One step out of several, each for batches of the shapes that stand beside it."""

    def shapes(batch: Mapping[str, Any]) -> frozenset[tuple[str, tuple[int, ...]]]:
        return frozenset((name, tuple(x.shape)) for name, x in batch.items())

    known = {shapes(spec): step for spec, step in steps}

    def step(
        state: TrainState, batch: Batch, previous: jax.Array
    ) -> tuple[TrainState, Metrics, Health]:
        return known[shapes(batch)](state, batch, previous)

    return step


def verdict(cause: int, mesh: Mesh) -> jax.Array:
    """A cause as the step takes it, on every device of ``mesh``."""
    value = np.asarray(cause, np.int32)
    return jax.make_array_from_callback((), meshes.replicated(mesh), lambda index: value[index])
