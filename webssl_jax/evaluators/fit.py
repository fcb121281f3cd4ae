"""The one trainer of heads on frozen features: many at once, sharded, and resumed after a kill.

A probe differs from another in a head, in what the head sees, in a loss and in a recipe. Here is
what they share: batches whose features are made in passing or read from the cache, the optimiser,
and a state that is saved. All heads of a grid (learning rates x weight decays) are one array with a
leading axis, computed by ``vmap``; grids that see other parts of the same features share one pass
of the network. Each head has its own parameters and its own loss, so that none knows of another.

A head for dense outputs, with BatchNorm, on a loss that leaves pixels out:

    @dataclasses.dataclass(frozen=True)
    class PixelHead:
        classes: int

        def init(self, rng, features):                  # (b, h, w, D): their shape alone
            d = features.shape[-1]
            kernel = 0.01 * jax.random.normal(rng, (d, self.classes))
            params = {"scale": jnp.ones(d), "shift": jnp.zeros(d), "kernel": kernel}
            return params, {"mean": jnp.zeros(d), "var": jnp.ones(d)}

        def apply(self, params, stats, features, train):
            if train:                                   # of the whole batch, over all devices
                mean, var = features.mean((0, 1, 2)), features.var((0, 1, 2))
                moved = lambda old, new: 0.9 * old + 0.1 * new
                stats = {"mean": moved(stats["mean"], mean), "var": moved(stats["var"], var)}
            else:
                mean, var = stats["mean"], stats["var"]
            x = (features - mean) * jax.lax.rsqrt(var + 1e-5) * params["scale"] + params["shift"]
            return x @ params["kernel"], stats          # logits (b, h, w, classes)

    def loss(logits, batch):                            # a scalar; batch["mask"]: (b, H, W)
        ...

    grid = Grid(PixelHead(150), see=lambda features: features.patches, loss=loss, rates=(1e-3,))
    data = batches.Images(model, source, view, Want(cls=False), batch=16, seed=0)
    recipe = Recipe(40_000, poly, optimizer="adamw", decay=1e-4)    # poly: step -> factor
    fitted = fit({"lin": grid}, data, recipe, folder)
    params, stats = fitted.head("lin", 0)               # for PixelHead.apply(..., train=False)

``view`` sees the encoded image, or, as a ``RecordView`` of ``data.views``, the record with its
masks. It returns ``image`` (H, W, 3) uint8 and what the loss wants, of one shape for all.

Shape letters: b images of a batch, K heads of a grid, D width.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from webssl_jax import params as paths
from webssl_jax.checkpoints import Checkpointer
from webssl_jax.evaluators.batches import Batch, Batches, Parts
from webssl_jax.optim.schedules import Schedule
from webssl_jax.sharding import mesh as meshes
from webssl_jax.telemetry.progress import Progress

OPTIMIZERS = ("sgd", "adamw", "lars")
TRUST = 0.001  # of LARS
_WHOLE = 2**16  # numbers of a head's array below which every device has all of it
_BIAS = "bias"
AHEAD = 2  # steps that the host may be ahead of the devices
Params = Any
Stats = Any


class Head(Protocol):
    """What is learned on frozen features. A frozen dataclass, because it is part of a program."""

    def init(self, rng: jax.Array, features: Any) -> tuple[Params, Stats]:
        """Its parameters, and what it counts of batches (BatchNorm's statistics; {} for none).
        ``features``: the shapes and types of what it sees, ``jax.ShapeDtypeStruct``."""

    def apply(self, params: Params, stats: Stats, features: Any, train: bool) -> tuple[Any, Stats]:
        """(outputs, new statistics)."""


@dataclasses.dataclass(frozen=True)
class Grid:
    """Heads of one kind that differ in learning rate and weight decay alone, and start alike.

    see: what they see, out of the features of a batch.
    loss: (outputs, what else the batch holds) -> (), the mean over the batch.
    rates: peak learning rates. decays: weight decays. The heads are all pairs of them, in this
      order: all decays of the first rate come first.
    at_once: heads that are computed at once; 0 for all. What does not fit is done in turns.
    """

    head: Head
    see: Callable[[Any], Any]
    loss: Callable[[Any, Batch], jax.Array]
    rates: tuple[float, ...]
    decays: tuple[float, ...] = (0.0,)
    at_once: int = 0

    @property
    def pairs(self) -> tuple[tuple[float, float], ...]:
        """(learning rate, weight decay) of each head."""
        return tuple((rate, decay) for rate in self.rates for decay in self.decays)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How heads are trained.

    steps: updates. schedule: of the step, a factor of all learning rates.
    optimizer: ``sgd`` and ``adamw`` as torch has them; ``lars`` as MoCo v3 and MAE have it: vectors
      get their plain gradient, without trust ratio and decay.
    momentum: of sgd and lars. b1, b2, eps: of adamw; ``b1`` may be a schedule.
    decay_biases: whether parameters called ``bias`` are decayed too (sgd, adamw).
    save_every: steps between two saves, from which training goes on after a kill.
    """

    steps: int
    schedule: Schedule
    optimizer: str = "sgd"
    momentum: float = 0.9
    b1: float | Schedule = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    decay_biases: bool = True
    save_every: int = 500

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer = {self.optimizer!r} is not {', '.join(OPTIMIZERS)}")
        if self.steps < 1 or self.save_every < 1:
            raise ValueError("steps and save_every must be at least 1")


Grids = tuple[tuple[str, Grid], ...]


class State(NamedTuple):
    """All that a training of heads is. step: () int32. params, stats, moments: {grid: tree}, every
    leaf with a leading axis K."""

    step: jax.Array
    params: dict[str, Params]
    stats: dict[str, Stats]
    moments: dict[str, Any]

    @property
    def sound(self) -> bool:
        """For the checkpointer: a head that diverges harms no other."""
        return True


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("params", "stats"), meta_fields=("grids",)
)
@dataclasses.dataclass(frozen=True)
class Fitted:
    """Trained heads. A pytree: give it to a jitted function as an argument. grids: ((name, grid),
    ...). params, stats: {name: tree}, every leaf with a leading axis K."""

    grids: Grids
    params: dict[str, Params]
    stats: dict[str, Stats]

    def head(self, name: str, number: int) -> tuple[Params, Stats]:
        """Of one head of a grid what ``apply`` takes."""
        take = functools.partial(jax.tree.map, lambda x: x[number])
        return take(self.params[name]), take(self.stats[name])

    def only(self, chosen: Mapping[str, tuple[str, int]]) -> Fitted:
        """Some heads alone. chosen: {new name: (grid, number of the head)}."""
        of = dict(self.grids)
        grids, params, stats = [], {}, {}
        for new, (name, number) in chosen.items():
            rate, decay = of[name].pairs[number]
            alone = dataclasses.replace(of[name], rates=(rate,), decays=(decay,), at_once=0)
            grids.append((new, alone))
            params[new], stats[new] = jax.tree.map(
                lambda x, i=number: x[i : i + 1], (self.params[name], self.stats[name])
            )
        return Fitted(tuple(grids), params, stats)

    def diverged(self) -> dict[str, np.ndarray]:
        """{grid: (K,) bool}, whether a head holds numbers that are not finite."""

        @jax.jit
        def find(params: dict[str, Params]) -> dict[str, list[jax.Array]]:
            return {
                name: [~jnp.isfinite(x).all(axis=range(1, x.ndim)) for x in jax.tree.leaves(tree)]
                for name, tree in params.items()
            }

        found = find(self.params)
        return {name: np.any([meshes.whole(x) for x in bad], axis=0) for name, bad in found.items()}

    def measure(self, features: Any, measure: Callable[[Any], Any]) -> dict[str, Any]:
        """{grid: ``measure(outputs)`` of each of its heads, with a leading axis K}, under jit."""

        def each(name: str, grid: Grid) -> Any:
            seen = grid.see(features)

            def one(held: tuple[Params, Stats]) -> Any:
                return measure(grid.head.apply(*held, seen, False)[0])

            return _over_heads(one, (self.params[name], self.stats[name]), grid)

        with jax.default_matmul_precision("highest"):
            return {name: each(name, grid) for name, grid in self.grids}


def fit(
    grids: Mapping[str, Grid],
    data: Batches,
    recipe: Recipe,
    folder: str | os.PathLike,
    seed: int = 0,
) -> Fitted:
    """Trains all heads of all grids. All processes call it.

    A head whose loss is not finite goes on so and harms no other; its outputs are NaN.

    Args:
      folder: that every process sees, for saves. It is used for these heads, data and recipe alone:
        where it holds a save, training goes on from it, and where that is the last step there is
        nothing left to do.
      seed: of the heads' first parameters.

    Raises:
      UserError: if saves cannot be written, or none of them can be read.
    """
    named = tuple(grids.items())
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.closing(data.start(0)) as batches:
        features, _ = next(batches)[0]
    made = program(named, recipe, features, data.mesh, seed)
    del features  # they may be large
    with contextlib.closing(Checkpointer(folder, keep_last=1)) as checkpointer:
        saved = checkpointer.restore_newest(made.state._asdict())
        state = State(**saved) if saved else made.start()
        with contextlib.closing(data.start(int(state.step))) as batches:
            state = _train(state, made.update, batches, recipe, checkpointer)
    return Fitted(named, state.params, state.stats)


class Program(NamedTuple):
    """What trains heads. state: shapes, types, and where they lie on devices. start: makes the
    first state. update: jitted, (state, batch in parts) -> (state, a loss)."""

    state: State
    start: Callable[[], State]
    update: Any


def program(grids: Grids, recipe: Recipe, features: Any, mesh: Mesh, seed: int) -> Program:
    """The training of ``grids`` on batches whose ``features`` are of these shapes and types;
    nothing runs."""
    seen = {name: jax.eval_shape(grid.see, features) for name, grid in grids}
    make = functools.partial(_start, grids, recipe, seed, seen)
    shapes = jax.eval_shape(make)
    laid = _layout(shapes, mesh)
    update = jax.jit(
        functools.partial(_update, grids, recipe, mesh),
        donate_argnums=0,
        out_shardings=(laid, meshes.replicated(mesh)),
    )
    start = jax.jit(make, out_shardings=laid)
    return Program(jax.tree.map(_with_sharding, shapes, laid), start, update)


def _train(
    state: State,
    update: Callable[[State, Parts], tuple[State, jax.Array]],
    batches: Iterator[Parts],
    recipe: Recipe,
    checkpointer: Checkpointer,
) -> State:
    at = int(state.step)
    shown = None if jax.process_index() == 0 else open(os.devnull, "w")
    progress = Progress(recipe.steps, "heads:", "steps", shown, done=at)
    pending: collections.deque[jax.Array] = collections.deque()
    while at < recipe.steps:
        state, done = update(state, next(batches))
        at += 1
        pending.append(done)
        if len(pending) > AHEAD:
            pending.popleft().block_until_ready()
        progress.update()
        if at % recipe.save_every == 0 or at == recipe.steps:
            checkpointer.save(state)
    progress.close()
    return state


def _start(grids: Grids, recipe: Recipe, seed: int, seen: Mapping[str, Any]) -> State:
    params, stats, moments = {}, {}, {}
    for number, (name, grid) in enumerate(grids):
        rng = jax.random.fold_in(jax.random.key(seed), number)
        one = grid.head.init(rng, seen[name])
        alike = functools.partial(_repeated, len(grid.pairs))
        params[name], stats[name] = jax.tree.map(alike, one)
        moments[name] = jax.vmap(_transform(recipe, jnp.int32(0)).init)(params[name])
    return State(jnp.int32(0), params, stats, moments)


def _update(
    grids: Grids, recipe: Recipe, mesh: Mesh, state: State, parts: Parts
) -> tuple[State, jax.Array]:
    """(state, a loss), by which the host sees that the step is done."""
    features, batch = jax.tree.map(lambda *x: jnp.concatenate(x), *parts)
    factor = recipe.schedule(state.step)
    transform = _transform(recipe, state.step)
    made = {}
    with jax.default_matmul_precision("highest"):
        for name, grid in grids:
            rates, decays = (jnp.array(x) for x in zip(*grid.pairs, strict=True))
            held = state.params[name], state.stats[name], state.moments[name]
            seen = _cut(grid.see(features), mesh)
            one = functools.partial(_update_one, grid, recipe, transform, seen, batch)
            made[name] = _over_heads(one, (*held, rates * factor, decays), grid)
    params, stats, moments, losses = ({name: x[i] for name, x in made.items()} for i in range(4))
    return State(state.step + 1, params, stats, moments), losses[grids[0][0]][0]


def _update_one(
    grid: Grid,
    recipe: Recipe,
    transform: optax.GradientTransformation,
    seen: Any,
    batch: Batch,
    held: tuple[Params, Stats, Any, jax.Array, jax.Array],
) -> tuple[Params, Stats, Any, jax.Array]:
    """One step of one head: (parameters, statistics, moments, loss)."""
    params, stats, moments, rate, decay = held

    def compute(params: Params) -> tuple[jax.Array, Stats]:
        outputs, new = grid.head.apply(params, stats, seen, True)
        return grid.loss(outputs, batch), new

    def decayed(path: str, change: jax.Array, param: jax.Array) -> jax.Array:
        if recipe.optimizer == "lars":
            spared = param.ndim < 2
        else:
            spared = not recipe.decay_biases and path.rpartition("/")[2] == _BIAS
        return change if spared else change + decay * param

    (loss, stats), grads = jax.value_and_grad(compute, has_aux=True)(params)
    decoupled = recipe.optimizer == "adamw"
    if not decoupled:
        grads = paths.map_with_path(decayed, grads, params)
    changes, moments = transform.update(grads, moments, params)
    if decoupled:
        changes = paths.map_with_path(decayed, changes, params)
    params = jax.tree.map(lambda param, change: param - rate * change, params, changes)
    return params, stats, moments, loss


def _transform(recipe: Recipe, step: jax.Array) -> optax.GradientTransformation:
    """From gradients to what the learning rate is multiplied by."""
    if recipe.optimizer == "adamw":
        b1 = recipe.b1(step) if callable(recipe.b1) else recipe.b1
        return optax.scale_by_adam(b1, recipe.b2, recipe.eps)
    momentum = optax.trace(recipe.momentum)
    if recipe.optimizer == "sgd":
        return momentum
    trust = optax.scale_by_trust_ratio(trust_coefficient=TRUST)
    matrices = functools.partial(jax.tree.map, lambda x: x.ndim > 1)
    return optax.chain(optax.masked(trust, matrices), momentum)


def _over_heads(one: Callable[[Any], Any], held: Any, grid: Grid) -> Any:
    """``one`` of each head: all at once, or so many in turn."""
    if 0 < grid.at_once < len(grid.pairs):
        return jax.lax.map(one, held, batch_size=grid.at_once)
    return jax.vmap(one)(held)


def _repeated(count: int, x: jax.Array) -> jax.Array:
    return jnp.broadcast_to(x, (count, *x.shape))


def _with_sharding(x: jax.ShapeDtypeStruct, place: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)


def _cut(seen: Any, mesh: Mesh) -> Any:
    """Vectors (b, D) that are fewer than they are wide are cut over ``fsdp`` along D, as kernels
    are: outputs cost less to exchange than kernels then. Anything else stays cut along b."""

    def place(x: jax.Array) -> jax.Array:
        few = x.ndim == 2 and len(x) < x.shape[1] and not x.shape[1] % mesh.shape["fsdp"]
        spec = PartitionSpec("replica", "fsdp") if few else PartitionSpec(meshes.BATCH_AXES)
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

    return jax.tree.map(place, seen)


def _layout(shapes: Any, mesh: Mesh) -> Any:
    """Large arrays are cut over ``fsdp`` along their longest axis that divides, but not along the
    heads'."""

    def place(x: jax.ShapeDtypeStruct) -> NamedSharding:
        ways = mesh.shape["fsdp"]
        axes: list[str | None] = [None] * len(x.shape)
        cut = [i for i in range(1, len(x.shape)) if x.shape[i] % ways == 0]
        if cut and x.size >= _WHOLE:
            axes[max(cut, key=lambda i: x.shape[i])] = "fsdp"
        return NamedSharding(mesh, PartitionSpec(*axes))

    return jax.tree.map(place, shapes)
