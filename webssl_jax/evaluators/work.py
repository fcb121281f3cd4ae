"""What a row has the devices do, as programs that can be compiled for devices that are not here
(``plan --eval``). No data are opened, and nothing runs.

A kind that does more than have features made says so by a class method ``work(options, model,
size)``, which returns programs of these; ``model`` holds shapes instead of parameters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from webssl_jax.config import UserError
from webssl_jax.evaluators import fit
from webssl_jax.model import Model, feature_program
from webssl_jax.models.features import Features, Want
from webssl_jax.sharding import mesh as meshes


class Size(NamedTuple):
    """How much there is to do. images, test_images: of the two sets. classes: of labels. batch:
    images a call of the network, where the row does not say."""

    images: int
    test_images: int
    classes: int
    batch: int


@dataclasses.dataclass(frozen=True)
class Program:
    """name: for people. calls: how often it runs. function: jitted. arguments: shapes, types and
    places. beside: of what lies on the devices meanwhile. images: that a call sends through the
    network, of ``shape`` (height, width); 0 of what sees features alone."""

    name: str
    calls: int
    function: Any
    arguments: tuple[Any, ...]
    beside: Any = ()
    images: int = 0
    shape: tuple[int, int] = (0, 0)


def through(
    name: str, model: Model, want: Want, shape: Sequence[int], images: int, batch: int
) -> tuple[Program, Features]:
    """The program that makes features of so many images, and what comes out of a call.

    Raises:
      UserError: if the batch does not divide over the devices.
    """
    assert model.mesh is not None  # shapes have places
    shards = meshes.batch_shards(model.mesh)
    if batch < 1 or batch % shards:
        raise UserError(f"{name}: {batch} a call do not divide over {shards} devices")
    height, width = shape[:2]
    pixels = on_batch(model, {"x": ((batch, height, width, 3), jnp.uint8)})["x"]
    function = feature_program(model.mesh, want)
    made = jax.eval_shape(function, model, pixels)
    calls = -(-images // batch)
    program = Program(
        *(name, calls, function, (model, pixels)), images=batch, shape=(height, width)
    )
    place = meshes.batch_sharding(model.mesh)
    return program, jax.tree.map(lambda x: _placed(x, place), made)


def updates(
    model: Model,
    grids: Mapping[str, fit.Grid],
    recipe: fit.Recipe,
    features: Any,
    calls: int,
    targets: Mapping[str, tuple[tuple[int, ...], Any]],
) -> tuple[Program, fit.Fitted]:
    """The program that trains heads, and its heads.

    features: those of a call, of which ``calls`` make a batch. targets: {name: (shape, type)}, what
    else such a part of a batch holds.
    """
    assert model.mesh is not None
    named = tuple(grids.items())
    made = fit.program(named, recipe, features, model.mesh, 0)
    parts = [(features, on_batch(model, targets))] * calls
    waiting = [features] * calls * fit.AHEAD  # of the next batches
    beside = (model.params, waiting)
    fitted = fit.Fitted(named, made.state.params, made.state.stats)
    arguments = (made.state, parts)
    return Program("updates of heads", recipe.steps, made.update, arguments, beside), fitted


def on_batch(
    model: Model, arrays: Mapping[str, tuple[tuple[int, ...], Any]]
) -> dict[str, jax.ShapeDtypeStruct]:
    """Arrays of these shapes and types, cut over the model's mesh as a batch is."""
    assert model.mesh is not None
    place = meshes.batch_sharding(model.mesh)
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=place)
        for name, (shape, dtype) in arrays.items()
    }


def _placed(x: Any, place: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
