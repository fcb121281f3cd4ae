"""The whole state of a run between two steps. It is created sharded: no device ever holds all of
it."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from webssl_jax.methods.base import Method, Variables
from webssl_jax.optim import guard
from webssl_jax.optim.optimizer import Optimizer
from webssl_jax.sharding import rules


class TrainState(NamedTuple):
    """Progress through the data is not in it: that is ``step x global batch``.

    step: () int32, optimiser steps taken, skipped ones included.
    params, teacher, aux: the method's trees ({} where unused).
    opt_state: Adam's moments.
    rng: (2,) uint32 key data of the run's seed; step k uses ``fold_in(rng, k)``.
    skipped: () int32, steps that the guard refused: they changed only ``step`` and its own state.
    guard: the state of ``optim/guard.py``.
    """

    step: jax.Array
    params: Any
    teacher: Any
    opt_state: Any
    aux: Any
    rng: jax.Array
    skipped: jax.Array
    guard: guard.State

    @property
    def variables(self) -> Variables:
        """What the functions of a method take."""
        return Variables(self.params, self.teacher, self.aux)

    @property
    def sound(self) -> bool:
        """Whether no step was refused lately."""
        return int(self.guard["trouble"]) == 0


def _init(method: Method, optimizer: Optimizer, seed: int, batch: int) -> TrainState:
    init_key, step_key = jax.random.split(jax.random.key(seed))
    variables = method.init(init_key, method.batch_spec(batch))
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=variables.params,
        teacher=variables.teacher,
        opt_state=optimizer.init(variables.params),
        aux=variables.aux,
        rng=jax.random.key_data(step_key),
        skipped=jnp.zeros((), jnp.int32),
        guard=guard.init(),
    )


def abstract(method: Method, optimizer: Optimizer, seed: int, batch: int, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state; nothing is allocated. ``batch`` is in images."""
    shapes = jax.eval_shape(lambda: _init(method, optimizer, seed, batch))
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        shapes,
        rules.shardings(shapes, mesh),
    )


def device_bytes(state: Any) -> int:
    """Bytes that each device holds of a sharded state or another tree, abstract or not."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(state)
    )


def create_aux(method: Method, seed: int, batch: int, template: Any) -> Any:
    """The ``aux`` of a fresh state, laid out as ``template``."""

    def make() -> Any:
        init_key, _ = jax.random.split(jax.random.key(seed))
        return method.init(init_key, method.batch_spec(batch)).aux

    return jax.jit(make, out_shardings=jax.tree.map(lambda x: x.sharding, template))()


def create(method: Method, optimizer: Optimizer, seed: int, batch: int, mesh: Mesh) -> TrainState:
    """A fresh state, each shard created on the device that keeps it. The same values on every
    mesh."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract(method, optimizer, seed, batch, mesh))
    return jax.jit(lambda: _init(method, optimizer, seed, batch), out_shardings=shardings)()
