"""``config.init_from`` with a weight file instead of a run: foreign weights in a sharded state."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from webssl_jax import params as params_lib
from webssl_jax.models import position
from webssl_jax.models.sizes import ViTConfig
from webssl_jax.sharding import distributed
from webssl_jax.telemetry.progress import Progress
from webssl_jax.weights import load, positions
from webssl_jax.weights.stored import WeightsError, shown
from webssl_jax.weights.tables import Leaf, NotFinite

log = logging.getLogger(__name__)
# What a network must share with the weights it takes: their shapes, and what is computed with them.
_SAME = ("width", "depth", "heads", "patch_size", "hidden", "mlp", "qkv_bias", "norm_eps")


def from_weights(path: str, method: Any, trees: Mapping[str, Any]) -> dict[str, Any]:
    """``trees`` with the encoder, and the decoder where it is the same, taken from ``path``.

    Reads leaf by leaf, block by block: a process holds of one stacked parameter what its own
    devices will hold. Everything is checked that the headers tell before anything is read. One line
    in the log says what was taken, what was left and how positions were fitted.

    Args:
      path: whatever ``load.open_`` opens.
      method: has an ``encoder``, and a ``decoder`` if it trains one.
      trees: {name: tree of sharded arrays}: ``params``, and ``teacher`` where there is one.

    Raises:
      UserError: on every process alike, if the weights are damaged or their encoder is not this
        one; one line. Nothing is changed then.
    """
    with distributed.together():
        try:
            return _from_weights(path, method, trees)
        except OSError as error:
            raise WeightsError(f"config.init_from = {path}: cannot be read ({error})") from error


def _from_weights(path: str, method: Any, trees: Mapping[str, Any]) -> dict[str, Any]:
    decoder = getattr(method, "decoder", None)
    loaded = load.open_(path, otherwise=method)
    where = f"config.init_from = {path}"
    wrong = _differences(method.encoder, loaded.vit)
    if wrong:
        raise WeightsError(f"{where}: holds another encoder: {'; '.join(wrong)}")
    takes, left = ["encoder"], list(map(shown, loaded.left))
    if loaded.decoder is not None:
        wrong = _differences(decoder, loaded.decoder) if decoder else ["this method has none"]
        if wrong:
            left.append(f"the decoder ({'; '.join(wrong)})")
        else:
            takes.append("decoder")
    theirs = params_lib.flatten({part: loaded.params[part] for part in takes})
    table, fitted = _positions(where, loaded, method.encoder)
    theirs.pop("encoder/pos_embed", None)
    if table is not None:
        theirs["encoder/pos_embed"] = table

    flat = {name: params_lib.flatten(tree) for name, tree in trees.items()}
    lacking = [p for p in flat["params"] if p.split("/")[0] in takes and p not in theirs]
    if lacking:
        raise WeightsError(f"{where}: has nothing for {', '.join(lacking[:6])}")
    wanted = [(name, p) for name in flat for p in flat[name] if p in theirs]
    progress = Progress(len(wanted), "reading weights:", "arrays")
    for name, p in wanted:
        try:
            flat[name][p] = _place(theirs[p], flat[name][p])
        except NotFinite as error:
            raise WeightsError(f"{where}: NaN or infinity in {error}; nothing was loaded") from None
        progress.update()
    progress.close()
    fresh = sorted({p.split("/")[0] for p in flat["params"]} - set(takes))
    log.info(
        "starting from the weights of %s (%s, %s, %s): took the %s, %s parameters; %s%s; left in "
        "the file: %s%s",
        path,
        loaded.family,
        load.size_name(loaded.vit),
        loaded.dtype,
        " and the ".join(takes),
        f"{sum(int(np.prod(theirs[p].shape)) for name, p in wanted if name == 'params'):,}",
        fitted,
        f"; fresh: {', '.join(fresh)}" if fresh else "",
        ", ".join(left) or "nothing",
        f"; assumed: {', '.join(loaded.assumed)}" if loaded.assumed else "",
    )
    return {name: params_lib.unflatten(values) for name, values in flat.items()}


def _differences(ours: ViTConfig, theirs: ViTConfig) -> list[str]:
    return [
        f"{field} = {getattr(theirs, field)}, not {getattr(ours, field)}"
        for field in _SAME
        if getattr(ours, field) != getattr(theirs, field)
    ]


def _positions(where: str, loaded: load.Loaded, ours: ViTConfig) -> tuple[np.ndarray | None, str]:
    """(the table for our parameter ``encoder/pos_embed``, or None without one; what was done)."""
    theirs = loaded.vit
    old, new = (f"{c.grid[0]}x{c.grid[1]}" for c in (theirs, ours))
    if ours.position == "sincos":
        if theirs.position != "sincos":
            raise WeightsError(
                f"{where}: its positions are not MAE's sin-cos table; set "
                "config.model.position=learned to take them"
            )
        if old == new:
            return None, f"positions are the sin-cos table of {new} patches in both"
        return None, (
            f"positions are the sin-cos table of {new} patches, in the file of {old} "
            f"(config.model.image_size={theirs.image_size} would stretch that one)"
        )
    if theirs.position == "learned":
        table = np.asarray(loaded.params["encoder"]["pos_embed"])
    else:
        table = positions.table(theirs.width, theirs.grid)
    if old == new:
        return table, f"positions taken ({new} patches)"
    patches = position.resize(table[0, 1:], theirs.grid, ours.grid, ours.position_resize)
    table = np.concatenate([table[:, :1], np.asarray(patches)[None]], axis=1)
    return table, f"positions resized from {old} to {new} patches ({ours.position_resize})"


def _place(leaf: Leaf | np.ndarray, like: jax.Array) -> jax.Array:
    """``leaf`` as an array sharded as ``like``; every block is read once."""
    if tuple(leaf.shape) != like.shape:
        raise WeightsError(f"a parameter of shape {tuple(leaf.shape)} where {like.shape} is wanted")
    sharding = like.sharding

    def key(index: tuple[slice, ...]) -> tuple[tuple[int, int], ...]:
        return tuple(s.indices(n)[:2] for s, n in zip(index, like.shape))

    shards: dict[Any, np.ndarray] = {}
    for index in sharding.addressable_devices_indices_map(like.shape).values():
        shards.setdefault(key(index), np.empty([b - a for a, b in key(index)], np.float32))
    stacked = isinstance(leaf, Leaf) and leaf.stacked
    for block in range(like.shape[0]) if stacked else [None]:
        array = np.asarray(leaf if block is None else leaf[block])
        for bounds, shard in shards.items():
            rest = tuple(slice(a, b) for a, b in (bounds if block is None else bounds[1:]))
            if block is None:
                shard[...] = array[rest]
            elif bounds[0][0] <= block < bounds[0][1]:
                shard[block - bounds[0][0]] = array[rest]
    return jax.make_array_from_callback(like.shape, sharding, lambda index: shards[key(index)])
