"""Opens weights of any family, wherever they lie: a ``.pth`` or ``.safetensors`` file, an index of
several, or a folder of ``transformers`` or timm. ``FILE:PLACE`` is one of several state dicts in a
file (``state_dicts.py``).

    loaded = load("webssl-mae1b.pth")           # numpy arrays, the whole of it
    opened = open_("facebook-vit-mae-base/")    # the same, each parameter still in the file

The family is found by the names in the file, the networks by the shapes of its tensors
(``shapes.py``, ``towers.py``).
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from webssl_jax.weights import clip, safetensors_io, shapes, state_dicts, tables, torch_file, towers
from webssl_jax.weights.families import FAMILIES, Family, Licence
from webssl_jax.weights.given import NOTHING, Given
from webssl_jax.weights.networks import Networks, template_of
from webssl_jax.weights.stored import Opened, Tensors, WeightsError, shown

log = logging.getLogger(__name__)
TORCH_FILE = "pytorch_model.bin"
OPEN_CLIP_TORCH_FILE = "open_clip_pytorch_model.bin"


@dataclasses.dataclass(frozen=True)
class Loaded:
    """Weights and the networks they belong to.

    family: one of ``families.FAMILIES``.
    params: a tree for each network, called as the fields of ``networks``, our layout, float32; of
      numpy arrays from :func:`load`, of ``tables.Leaf`` from :func:`open_`.
    source: the path. inside: the place in the file where they stood, as "teacher", or "".
    dtype: of the weights in the file. left: tensors passed over on purpose.
    assumed: what of the networks nothing said, in words.
    """

    family: str
    networks: Networks
    params: dict[str, Any]
    source: str
    inside: str
    dtype: str
    left: tuple[str, ...] = ()
    assumed: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        return self.networks.kind


def load(path: str | os.PathLike, family: str | None = None, **options: Any) -> Loaded:
    """All weights as numpy arrays, after every check.

    Raises:
      WeightsError: as :func:`open_`, or when a tensor is damaged, NaN or infinite; one line that
        names it.
    """
    opened = open_(path, family, **options)
    return dataclasses.replace(
        opened, params=tables.read_all(f"{opened.source}: {opened.family}", opened.params)
    )


def open_(
    path: str | os.PathLike, family: str | None = None, otherwise: Any = None, **options: Any
) -> Loaded:
    """Checks everything that needs no tensor (and the position tables) and opens the rest.

    Args:
      family: one of ``families.FAMILIES``; found by the names in the file when left out.
      otherwise: a method whose heads, and kind of MLP, are taken where nothing else says them.
      **options: what the file does not say itself, the fields of ``given.Given``. They go before
        those of a published size, and are to be left out where there is no such network.

    Raises:
      UserError: if something is given that no network can have, or for a network that is not there.
      WeightsError: naming what is missing, unexpected, misshapen or contradictory; one line.
    """
    return fitted(open_files(path), family, otherwise, **options)


def fitted(
    files: Opened, family: str | None = None, otherwise: Any = None, **options: Any
) -> Loaded:
    """:func:`open_` of files whose headers were read, or of tensors that never lay in one."""
    found = best_family(files, family)
    if found.licence:
        _say(found.name, found.licence)
    networks, dtype, assumed = describe(files, found, Given(**options), otherwise)
    template = template_of(networks)
    table = found.table(networks)
    table = dataclasses.replace(table, family=f"{files.path}: {table.family}")
    fit = tables.compare(files.tensors, table, template)
    return Loaded(
        found.name,
        networks,
        tables.open_(files.tensors, table, template),
        os.fspath(files.path),
        files.inside,
        dtype,
        tuple(fit.ignored),
        (*files.choice, *assumed),
    )


@functools.cache
def _say(family: str, licence: Licence) -> None:
    """Names the licence of published weights, once a process."""
    link = f" ({licence.link})" if licence.link else ""
    log.warning("%s: of weights published in this format: %s%s", family, licence.terms, link)


def place(
    leaf: tables.Leaf | np.ndarray | jax.Array,
    shape: tuple[int, ...],
    sharding: jax.sharding.Sharding,
    dtype: Any = np.float32,
) -> jax.Array:
    """``leaf`` as an array of ``shape`` and ``dtype``, laid out by ``sharding``; every block is
    read once, and a process holds what its own devices will hold. A jax array is copied between
    the devices.

    Raises:
      NotFinite: if a block of it holds NaN or infinity.
    """

    if isinstance(leaf, jax.Array):
        return jax.jit(lambda x: jnp.array(x, dtype, copy=True), out_shardings=sharding)(leaf)

    def key(index: tuple[slice, ...] | None) -> tuple[tuple[int, int], ...]:
        assert index is not None  # each of these devices holds a part
        return tuple(s.indices(n)[:2] for s, n in zip(index, shape))

    shards: dict[Any, np.ndarray] = {}
    for index in sharding.addressable_devices_indices_map(shape).values():
        shards.setdefault(key(index), np.empty([b - a for a, b in key(index)], dtype))
    stacked = isinstance(leaf, tables.Leaf) and leaf.stacked
    for block in range(shape[0]) if stacked else [None]:
        array = np.asarray(leaf if block is None else leaf[block])
        for bounds, shard in shards.items():
            rest = tuple(slice(a, b) for a, b in (bounds if block is None else bounds[1:]))
            if block is None:
                shard[...] = array[rest]
            elif bounds[0][0] <= block < bounds[0][1]:
                shard[block - bounds[0][0]] = array[rest]
    return jax.make_array_from_callback(shape, sharding, lambda index: shards[key(index)])


def describe(
    files: Opened, family: Family, given: Given = NOTHING, otherwise: Any = None
) -> tuple[Networks, str, tuple[str, ...]]:
    """(the networks that the shapes describe, dtype of the weights, what was assumed); the rest as
    of :func:`open_`.

    Raises:
      UserError: as :func:`open_`.
      WeightsError: as :func:`open_`.
    """
    shapes.check_given(files, family, given)
    described = towers.describe if family.towers else shapes.describe
    return described(files, family, given, otherwise)


def open_files(path: str | os.PathLike) -> Opened:
    """Headers of whatever lies at ``path``.

    Raises:
      WeightsError: if there is nothing, or nothing whole.
    """
    path, place = state_dicts.split_path(path)
    if not path.exists():
        raise WeightsError(f"{path}: no such file or folder")
    folder = path if path.is_dir() else path.parent
    file = path
    if path.is_dir():
        names = [safetensors_io.SINGLE_FILE, safetensors_io.INDEX_FILE, TORCH_FILE]
        names += [clip.OPEN_CLIP_FILE, OPEN_CLIP_TORCH_FILE]
        present = [folder / name for name in names if (folder / name).exists()]
        if not present:
            raise WeightsError(f"{path}: holds none of {', '.join(names)}")
        file = present[0]
    extra: Mapping[str, Any] = {}
    if file.suffix in (".safetensors", ".json"):
        found = {"": safetensors_io.open_file(file)}
    else:
        checkpoint = torch_file.open_file(file)
        found, extra = state_dicts.places(checkpoint), checkpoint.get("webssl_jax", {})
        if not isinstance(extra, dict):
            raise WeightsError(f"{file}: 'webssl_jax' in it is no dict")
    inside, tensors, others = state_dicts.choose(file, found, place, _most_known)
    opened = Opened(path, dict(tensors), inside, others, extra=extra)
    if file.suffix not in (".safetensors", ".json", ".bin"):
        return opened  # a .pth says all it says itself
    ours = (clip.OPEN_CLIP_FILE, OPEN_CLIP_TORCH_FILE)  # which stand beside those of transformers
    config = folder / (clip.OPEN_CLIP_CONFIG if file.name in ours else "config.json")
    preprocessor = folder / "preprocessor_config.json"
    if not config.exists() and path.is_dir():
        raise WeightsError(f"{path}: has no {config.name}")
    return dataclasses.replace(
        opened,
        config=safetensors_io.parse_json(config) if config.exists() else None,
        config_file=config,
        preprocessor=safetensors_io.parse_json(preprocessor) if preprocessor.exists() else {},
    )


def _most_known(tensors: Tensors) -> int:
    """How many names the family knows that knows most of them."""
    return max(_known(tensors, family) for family in FAMILIES.values())


def best_family(files: Opened, name: str | None = None) -> Family:
    """The family that most names in the file belong to; of equals the one of fewest networks.

    Raises:
      WeightsError: if ``name`` is unknown, or no name in the file belongs to any.
    """
    if name is not None:
        if name not in FAMILIES:
            raise WeightsError(f"no weight family {name!r}; there are {', '.join(FAMILIES)}")
        return FAMILIES[name]
    counts = {family.name: _known(files.tensors, family) for family in FAMILIES.values()}
    kind = (files.config or {}).get("model_type")
    order = sorted(
        FAMILIES.values(),
        key=lambda f: (
            *(-counts[f.name], len(f.needs), kind not in f.model_types, not f.fields),
            files.config is not None and f.config is None,  # a folder is none of a single file
        ),
    )
    if not counts[order[0].name]:
        some = ", ".join(shown(name) for name in list(files.tensors)[:3])
        raise WeightsError(
            f"{files.path}: its {len(files.tensors)} tensors ({some}, ...) belong to none of "
            f"{', '.join(FAMILIES)}"
        )
    return order[0]


def _known(tensors: Tensors, family: Family) -> int:
    """How many names in the file are the family's; none if one of its networks has no name
    there."""
    most = 0
    for mlp in family.mlps:
        table = shapes.probe(family, mlp)
        names = tables.canonical_names(table, tensors, strict=False)[0]
        known = tables.names_of(table)
        found = [name for name in names if known.fullmatch(name)]
        for part in family.needs:
            rows = tuple(r for r in table.rows if any(p.startswith(f"{part}/") for p in r.paths))
            own = tables.names_of(dataclasses.replace(table, rows=rows, constants=()))
            if not any(own.fullmatch(name) for name in found):
                found = []
        most = max(most, len(found))
    return most
