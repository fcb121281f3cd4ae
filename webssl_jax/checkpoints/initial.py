"""Networks of a fresh state that are not drawn but taken from a run or from weights, as a method
asks for (``methods.base.initial_weights``): a frozen teacher, a Gram teacher."""

from __future__ import annotations

import logging
from typing import Any

import jax

from webssl_jax import params as paths
from webssl_jax import runs
from webssl_jax.config import UserError
from webssl_jax.methods.base import Method, initial_weights
from webssl_jax.sharding import distributed
from webssl_jax.train_state import TrainState
from webssl_jax.weights import load
from webssl_jax.weights.stored import some

log = logging.getLogger(__name__)


def filled(state: TrainState, method: Method, mesh: jax.sharding.Mesh) -> TrainState:
    """``state`` with the trees that the method names.

    Raises:
      UserError: if there are no such weights, or their encoder is another one. On all processes.
    """
    for where, path in initial_weights(method).items():
        field, name = where.split("/")
        trees = getattr(state, field)
        own = paths.flatten(trees[name])
        with distributed.error_barrier():
            theirs = paths.flatten(_encoder(path, mesh))
            _check(path, where, own, theirs)
        placed = {p: load.place(theirs[p], x.shape, x.sharding) for p, x in own.items()}
        log.info("%s begins as the encoder of %s", where, path)
        state = state._replace(**{field: trees | {name: paths.unflatten(placed)}})
    return state


def _encoder(path: str, mesh: jax.sharding.Mesh) -> Any:
    """The parameters of the encoder: of a run those that it evaluates."""
    loaded = runs.open_encoder(path, mesh) or load.open_(path)
    if "encoder" not in loaded.params:
        raise UserError(f"{path}: has no encoder")
    return loaded.params["encoder"]


def _check(path: str, where: str, own: dict[str, Any], theirs: dict[str, Any]) -> None:
    lacking = [p for p in own if p not in theirs]
    more = [p for p in theirs if p not in own]
    wrong = [
        f"{p} is {tuple(theirs[p].shape)}, not {own[p].shape}"
        for p in own
        if p in theirs and tuple(theirs[p].shape) != own[p].shape
    ]
    if lacking or more or wrong:
        what = {"nothing for": lacking, "foreign": more, "of another shape": wrong}
        words = "; ".join(f"{key} {some(rows)}" for key, rows in what.items() if rows)
        raise UserError(f"{path}: its encoder is not the one of {where}: {words}")
