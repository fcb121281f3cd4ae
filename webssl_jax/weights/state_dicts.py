"""Which of the state dicts in a checkpoint is meant.

Programs save several beside each other: plain and averaged weights, student and teacher, and all of
a module under a prefix (Lightning). Each has a place: the keys that lead to it, and the prefix of
its names, with slashes between (``state_dict_ema``, ``state_dict/model_ema``). ``FILE:PLACE`` takes
one; else it is the one that the writers' own loaders take (timm's the averaged, DINOv2's the
teacher), where that is known.
"""

from __future__ import annotations

import os
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

from webssl_jax.weights.stored import Stored, WeightsError, some

# What loaders take first: timm's the averaged weights, before the plain ones; DINOv2's the teacher,
# I-JEPA's the target encoder.
_ORDER = (
    *("state_dict_ema", "model_ema", "state_dict", "model"),
    *("teacher", "target_encoder", "student"),
)
_DEPTH = 3  # of dicts in dicts
_OWN = "webssl_jax"  # what our exports keep beside the tensors
# The patch embedding of an encoder, by any of its names: what stands before it is a prefix.
_ENCODER = re.compile(
    r"(.*?)(patch_embed\.proj|(visual\.)?conv1|embeddings\.(patch_embeddings\.projection"
    r"|patch_embedding))\.weight"
)

Tensors = Mapping[str, Stored]


def split_path(path: str | os.PathLike) -> tuple[pathlib.Path, str]:
    """(file, place) of ``FILE:PLACE``; place "" where none is named."""
    whole = pathlib.Path(path)
    file, colon, place = os.fspath(path).rpartition(":")
    if colon and not whole.exists() and pathlib.Path(file).exists():
        return pathlib.Path(file), place
    return whole, ""


def places(checkpoint: Mapping[Any, Any]) -> dict[str, dict[str, Stored]]:
    """The dicts of tensors in a checkpoint by place; what else stands in them is read past. Those
    of an optimiser are left out."""
    found: dict[str, dict[str, Stored]] = {}

    def walk(where: tuple[str, ...], node: Mapping[Any, Any]) -> None:
        named = {key: value for key, value in node.items() if isinstance(key, str)}
        tensors = {key: value for key, value in named.items() if isinstance(value, Stored)}
        if tensors:
            found["/".join(where)] = tensors
        for key, value in named.items():
            inner = isinstance(value, dict) and key != _OWN and "optim" not in key
            if inner and len(where) < _DEPTH:
                walk((*where, key), value)

    walk((), checkpoint)
    return found


def choose(
    file: pathlib.Path, found: Mapping[str, Tensors], place: str, known: Callable[[Tensors], int]
) -> tuple[str, Tensors, tuple[str, ...]]:
    """(place, tensors of it, the places of all others).

    Args:
      found: of :func:`places`.
      place: that was asked for, or "".
      known: how many of the names belong to a family of weights.

    Raises:
      WeightsError: if there is no such place, or several networks and none is the first choice.
    """
    if not found:
        raise WeightsError(f"{file}: holds no tensors")
    every = dict(found)
    for outer, tensors in found.items():
        for prefix, own in _networks(tensors, known).items():
            every["/".join(filter(None, (outer, prefix)))] = own
    if place:
        if place not in every:
            raise WeightsError(f"{file}: has no {place!r}; there are {some(list(every))}")
        taken = place
    else:
        largest = max(found, key=lambda key: len(found[key]))
        taken = next((key for key in _ORDER if key in found), largest)
        within = [key for key in every if key not in found and _is_within(key, taken)]
        if not known(found[taken]) and within:
            if len(within) > 1:
                names = ", ".join(f"{file.name}:{key}" for key in within)
                raise WeightsError(f"{file}: holds several networks; name one: {names}")
            taken = within[0]
    others = (key for key in every if key != taken and not _is_within(taken, key))
    return taken, every[taken], tuple(others)


def _is_within(place: str, outer: str) -> bool:
    return not outer or place.startswith(f"{outer}/")


def _networks(tensors: Tensors, known: Callable[[Tensors], int]) -> dict[str, dict[str, Stored]]:
    """The parts of a dict that are networks of their own, by the prefix of their names: several
    encoders each, one only where no family knows the dict as it is."""
    matches = (_ENCODER.fullmatch(name) for name in tensors)
    prefixes = sorted({match[1].removesuffix(".") for match in matches if match} - {""})

    def part(prefix: str) -> dict[str, Stored]:
        inner = f"{prefix}."
        return {k.removeprefix(inner): x for k, x in tensors.items() if k.startswith(inner)}

    if len(prefixes) == 1 and not known(tensors):
        words = prefixes[0].split(".")
        cut = [".".join(words[:n]) for n in range(1, len(words) + 1)]
        most, best = max((known(part(prefix)), prefix) for prefix in cut)  # of equals the longest
        return {best: part(best)} if most else {}
    if len(prefixes) > 1:
        split = [prefix.split(".") for prefix in prefixes]
        for n in range(1, max(map(len, split)) + 1):
            cut = [".".join(words[:n]) for words in split]
            if len(set(cut)) == len(cut):
                return {prefix: part(prefix) for prefix in cut}
    return {}
