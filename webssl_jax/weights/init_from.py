"""``config.init_from`` with a weight file instead of a run, or with several and commas between them
(an encoder and its heads): foreign weights in a sharded state."""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from webssl_jax import params as params_lib
from webssl_jax.models.sizes import ViTConfig
from webssl_jax.models.text import TextConfig
from webssl_jax.sharding import distributed
from webssl_jax.sharding import mesh as meshes
from webssl_jax.telemetry.progress import Progress
from webssl_jax.weights import load, patches, positions, shapes
from webssl_jax.weights.stored import WeightsError, some
from webssl_jax.weights.tables import NotFinite

log = logging.getLogger(__name__)
# What a network must share with the weights it takes: their shapes, and what is computed with them.
_SAME: tuple[str, ...] = ("width", "depth", "heads", "hidden", "mlp", "qkv_bias", "norm_eps")
_SAME += ("key_bias", "norm", "pooling")
_SAME_DECODER = (*_SAME, "patch_size")  # an encoder's patches can be resampled
_SAME_HEAD = ("prototypes", "bottleneck", "hidden", "layers", "weight_norm")
_SAME_TEXT: tuple[str, ...] = ("width", "depth", "heads", "hidden", "mlp", "qkv_bias", "norm_eps")
_SAME_TEXT += ("context", "vocabulary", "embedding", "causal", "pooling", "projection_bias")
_SAME_LANGUAGE: tuple[str, ...] = ("width", "depth", "heads", "kv_heads", "head_dim", "hidden")
_SAME_LANGUAGE += ("vocabulary", "rope_theta", "rope_scaling", "qkv_bias", "qk_norm", "norm_eps")
_SAME_LANGUAGE += ("window", "tied_head")
_ORDER = ("encoder", "decoder", "dino_head", "ibot_head", "text", "connector", "language")
# What stands beside the networks: it is of use with the text tower alone.
_WITH_TEXT = ("projection", "logit_scale", "logit_bias")
_MASK_TOKEN = "encoder/mask_token"
_PATCHES = "encoder/patch_embed/kernel"
_LAYER_SCALES = tuple(f"encoder/blocks/layer_scale{i}/gamma" for i in (1, 2))


def from_weights(
    path: str,
    method: Any,
    trees: Mapping[str, Any],
    open_run: Callable[[str], load.Loaded | None] = lambda path: None,
) -> dict[str, Any]:
    """``trees`` with the networks that ``path`` holds taken from it: the encoder, which must be the
    same, and decoder or heads where they are the same.

    A student and its teacher begin alike, both as what the file holds. Reads leaf by leaf, block by
    block: a process holds of one stacked parameter what its own devices will hold. Everything is
    checked that the headers tell before anything is read. One line a file in the log says what was
    taken, what was left and how positions were fitted.

    Args:
      path: whatever ``load.open_`` opens (``FILE:PLACE`` too), or several of them with commas
        between, each with other networks.
      method: has the networks it trains as fields.
      trees: {name: tree of sharded arrays}: ``params``, and ``teacher`` where there is one.
      open_run: the encoder of a run, over the devices of ``trees``; None for what is no run.

    Raises:
      UserError: on every process alike, if the weights are damaged, no file has the encoder or it
        is not this one, or two files have the same network; one line. Nothing is changed then.
    """
    paths = [path] if os.path.exists(path) else [one.strip() for one in path.split(",")]
    fresh = {p.split("/")[0] for p in params_lib.flatten(trees["params"])}
    with distributed.error_barrier():
        opened = [_open(path, one, method, fresh, open_run) for one in paths]
        taken = [part for _, parts, _ in opened for part in parts]
        if twice := sorted({part for part in taken if taken.count(part) > 1}):
            raise WeightsError(f"config.init_from = {path}: two files have the {twice[0]}")
        if "encoder" not in taken:
            raise WeightsError(
                f"config.init_from = {path}: has no encoder; give ENCODER.pth,HEADS.pth"
            )
        for i, (one, (loaded, parts, left)) in enumerate(zip(paths, opened)):
            begun = fresh.difference(taken) if i + 1 == len(paths) else ()
            with _reading(one):
                trees = _from_weights(one, loaded, parts, left, method, trees, begun)
    return dict(trees)


def _open(
    given: str, path: str, method: Any, own: set[str], open_run: Callable[[str], load.Loaded | None]
) -> tuple[load.Loaded, list[str], list[str]]:
    """(a file of the list ``given``, the networks to take, what is left and why). own: what the
    run has."""
    if not path:
        raise WeightsError(f"config.init_from = {given}: an empty name between commas")
    with _reading(path):
        opens = getattr(method, "open_weights", None)
        loaded = open_run(path) or (opens and opens(path))
        loaded = loaded or load.open_(path, otherwise=method)
    return loaded, *_networks(f"config.init_from = {path}", loaded, method, own)


@contextlib.contextmanager
def _reading(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise WeightsError(f"config.init_from = {path}: cannot be read ({error})") from error


def _from_weights(
    path: str,
    loaded: load.Loaded,
    parts: Sequence[str],
    left: Sequence[str],
    method: Any,
    trees: Mapping[str, Any],
    fresh: Iterable[str],
) -> dict[str, Any]:
    """``trees`` with the networks ``parts`` of one file. For the log: ``left``, what is not taken,
    and ``fresh``, the networks that no file has."""
    where, left = f"config.init_from = {path}", list(left)
    taken, fitted = set(parts), ""
    theirs = params_lib.flatten({part: loaded.params[part] for part in parts})
    if "encoder" in taken:
        assert loaded.networks.encoder is not None  # as it is taken
        table, fitted = _positions(where, loaded, loaded.networks.encoder, method.encoder)
        theirs.pop("encoder/pos_embed", None)
        if table is not None:
            theirs["encoder/pos_embed"] = table
        fitted += _adapt(theirs, loaded.networks.encoder, method.encoder)

    flat = {name: params_lib.flatten(tree) for name, tree in trees.items()}
    own = flat["params"]
    lacking = [p for p in own if p.split("/")[0] in taken and p not in theirs]
    begun = [p for p in lacking if p == _MASK_TOKEN]  # of nothing but masked training
    lacking = [p for p in lacking if p not in begun]
    if lacking:
        raise WeightsError(f"{where}: has nothing for {some(lacking)}")
    if _MASK_TOKEN in theirs and _MASK_TOKEN not in own:
        del theirs[_MASK_TOKEN]
        left.append(_MASK_TOKEN)
    foreign = [p for p in theirs if p not in own]
    if foreign:
        raise WeightsError(f"{where}: this network has no {some(foreign)}")
    wrong = [
        f"{p} is {tuple(theirs[p].shape)}, not {own[p].shape}"
        for p in theirs
        if tuple(theirs[p].shape) != own[p].shape
    ]
    if wrong:
        raise WeightsError(f"{where}: of another shape: {some(wrong)}")
    wanted = [(name, p) for name in flat for p in flat[name] if p in theirs]
    progress = Progress(len(wanted), "reading weights:", "arrays")
    for name, p in wanted:
        try:
            flat[name][p] = load.place(theirs[p], flat[name][p].shape, flat[name][p].sharding)
        except NotFinite as error:
            raise WeightsError(f"{where}: NaN or infinity in {error}; nothing was loaded") from None
        progress.update()
    progress.close()
    begun = sorted(fresh) + begun
    details = [
        f"took the {' and the '.join(part for part in _ORDER if part in taken)}"
        + (" for student and teacher alike" if trees.get("teacher") else "")
        + f", {sum(math.prod(theirs[p].shape) for name, p in wanted if name == 'params'):,} "
        "parameters",
        fitted,
        f"fresh: {', '.join(begun)}" if begun else "",
        f"left in the file: {', '.join(left) or 'nothing'}",
        f"assumed: {', '.join(loaded.assumed)}" if loaded.assumed else "",
    ]
    what = [loaded.family, loaded.dtype]
    if loaded.networks.encoder:
        what.insert(1, shapes.size_name(loaded.networks.encoder))
    if loaded.inside not in ("", "model", "state_dict"):
        what.append(f"its {loaded.inside}")
    log.info(
        "starting from the weights of %s (%s): %s",
        path,
        ", ".join(what),
        "; ".join(filter(None, details)),
    )
    return {name: params_lib.unflatten(values) for name, values in flat.items()}


def _networks(
    where: str, loaded: load.Loaded, method: Any, own: set[str]
) -> tuple[list[str], list[str]]:
    """(names of the networks to take, what is left in the file and why)."""
    takes, left = [], [some(loaded.left)] if loaded.left else []
    beside = [part for part in _WITH_TEXT if part in loaded.params]
    for part in loaded.params:
        if part in beside:
            continue
        theirs, ours = getattr(loaded.networks, part), getattr(method, part, None)
        same = {ViTConfig: _SAME, TextConfig: _SAME_TEXT}.get(type(theirs), _SAME_HEAD)
        same = {"decoder": _SAME_DECODER, "language": _SAME_LANGUAGE}.get(part, same)
        if same is _SAME_HEAD and ours and ours.layers == theirs.layers == 1:
            same = tuple(field for field in same if field != "hidden")  # it has no hidden layer
        wrong = _differences(same, ours, theirs) if ours else ["this method has none"]
        if part not in ("encoder", "language") and "encoder" not in loaded.params:
            width = loaded.networks.head_input
            if width != method.encoder.width:
                wrong.append(f"for an encoder of width {width}")
        if part == "encoder" and wrong:
            raise WeightsError(f"{where}: holds another encoder: {'; '.join(wrong)}")
        if wrong:
            left.append(f"the {part} ({'; '.join(wrong)})")
        else:
            takes.append(part)
    if "text" in takes:
        takes += [part for part in beside if part in own]
        left += [part for part in beside if part not in own]
    else:
        left += beside
    if not takes:
        raise WeightsError(f"{where}: holds nothing that fits: {'; '.join(left)}")
    return takes, left


def _differences(fields: tuple[str, ...], ours: Any, theirs: Any) -> list[str]:
    return [
        f"{field} = {getattr(theirs, field)}, not {getattr(ours, field)}"
        for field in fields
        if not _same(getattr(ours, field), getattr(theirs, field))
    ]


def _same(ours: Any, theirs: Any) -> bool:
    """Some files hold numbers as float32: 1e-5 is 9.9999997e-06 there."""
    if isinstance(ours, float) and isinstance(theirs, float):
        return np.float32(ours) == np.float32(theirs)
    return bool(ours == theirs)


def _adapt(weights: dict[str, Any], theirs: ViTConfig, ours: ViTConfig) -> str:
    """Fits ``weights`` to an encoder of other patches, or with LayerScale where theirs has none (1
    then, which computes what theirs does). Returns what was done, for the log."""
    done = ""
    if theirs.patch_size != ours.patch_size:
        weights[_PATCHES] = patches.resample(meshes.whole(weights[_PATCHES]), ours.patch_size)
        done += f"; patches resampled from {theirs.patch_size} to {ours.patch_size} pixels"
    if theirs.layer_scale is None and ours.layer_scale is not None:
        one = np.ones((ours.depth, ours.width), np.float32)
        weights |= dict.fromkeys(_LAYER_SCALES, one)
        done += "; LayerScale begins at 1, as the file has none"
    return done


def _positions(
    where: str, loaded: load.Loaded, theirs: ViTConfig, ours: ViTConfig
) -> tuple[np.ndarray | None, str]:
    """(the table for our parameter ``encoder/pos_embed``, or None without one; what was done)."""
    old, new = (f"{c.grid[0]}x{c.grid[1]}" for c in (theirs, ours))
    if "rope" in (ours.position, theirs.position):
        if ours.rope is None or theirs.rope is None or ours.rope_base != theirs.rope_base:
            raise WeightsError(
                f"{where}: its positions are {_in_words(theirs)}, those of this run "
                f"{_in_words(ours)}"
            )
        return None, "positions are rotated in both"
    if ours.position in positions.FIXED:
        if theirs.position != ours.position:
            raise WeightsError(
                f"{where}: its positions are not {positions.FIXED[ours.position]} sin-cos table; "
                "set config.model.position=learned to take them"
            )
        if old == new:
            return None, f"positions are the sin-cos table of {new} patches in both"
        return None, (
            f"positions are the sin-cos table of {new} patches, in the file of {old} "
            f"(config.model.image_size={theirs.image_size} would stretch that one)"
        )
    if theirs.position == "learned":
        table = meshes.whole(loaded.params["encoder"]["pos_embed"])
    else:
        table = positions.table(theirs.width, theirs.grid, theirs.position)
        if theirs.pooling != "cls":  # nor has ours a row for it
            table = table[:, 1:]
    if old == new:
        return table, f"positions taken ({new} patches); {_other_sizes(theirs, ours)}"
    resized = ours.interpolation.resize_table(table, theirs.grid, ours.grid)
    return (
        np.asarray(resized),
        f"positions resized from {old} to {new} patches ({ours.position_resize}); "
        f"{_other_sizes(theirs, ours)}",
    )


def _in_words(c: ViTConfig) -> str:
    return f"rotated with rope_base = {c.rope_base:g}" if c.rope else c.position


def _other_sizes(theirs: ViTConfig, ours: ViTConfig) -> str:
    """How positions follow crops of other sizes: the run's setting, and the file's own code's."""
    same = ours.position_resize == theirs.position_resize
    return f"other sizes by model.position_resize={ours.position_resize}, " + (
        "as the file's code" if same else f"where the file's code has {theirs.position_resize}"
    )
