"""The path language: every parameter has one name, and six tables are written in it.

A parameter tree is a plain nested dict of arrays. The path of a leaf is its keys joined with "/",
for instance ``encoder/blocks/attn/q/kernel``. Sharding, weight decay, learning-rate multipliers,
freezing, import and export all address parameters by regular expressions over these paths, so
modules carry no metadata of their own.

A *table* is an ordered sequence of ``(regex, value)``. The first regex that ``re.search`` finds in
the path wins.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from clu import parameter_overview

Tree = Any
Table = Sequence[tuple[str, Any]]


def flatten(tree: Tree) -> dict[str, Any]:
    """Returns ``{path: leaf}`` in the tree's own (sorted) order. Works on any pytree, so also on
    optimiser state."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {path_name(path): leaf for path, leaf in leaves}


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of :func:`flatten` for nested dicts.

    Raises:
      ValueError: if one path is both a leaf and a folder, e.g. ``a`` and ``a/b``.
    """
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *folders, name = path.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
            if not isinstance(node, dict):
                raise ValueError(f"parameter path {path!r} runs through the leaf {folder!r}")
        if name in node:
            raise ValueError(f"parameter path {path!r} is both a leaf and a folder")
        node[name] = leaf
    return tree


def path_name(key_path: tuple[Any, ...]) -> str:
    """Turns a jax key path into ``a/b/c``."""
    return jax.tree_util.keystr(key_path, simple=True, separator="/")


def map_with_path(fn: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """Like ``jax.tree.map``, but ``fn`` receives the leaf's path first."""
    return jax.tree_util.tree_map_with_path(lambda kp, *x: fn(path_name(kp), *x), tree, *rest)


def lookup(table: Table, path: str, default: Any = None) -> Any:
    """The value of the first row of ``table`` whose regex is found in ``path``; ``default`` when
    none is."""
    for pattern, value in table:
        if re.search(pattern, path):
            return value
    return default


def match(table: Table, tree: Tree, default: Any = None) -> Tree:
    """A tree of the same structure that holds :func:`lookup` of every leaf's path."""
    return map_with_path(lambda path, _: lookup(table, path, default), tree)


def unmatched_rows(table: Table, tree: Tree) -> list[str]:
    """Regexes of ``table`` that match no parameter at all: nearly always a typing mistake."""
    paths = list(flatten(tree))
    return [pattern for pattern, _ in table if not any(re.search(pattern, p) for p in paths)]


def count(tree: Tree) -> int:
    """Number of scalars in the tree (arrays or ``ShapeDtypeStruct``)."""
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))


def num_bytes(tree: Tree) -> int:
    """Bytes of all leaves, ignoring sharding."""
    return sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def describe(tree: Tree, stats: str | None = None) -> str:
    """A table of name, shape and size (``stats="sharding"`` adds the partition specs), one row a
    parameter."""
    table = parameter_overview.get_parameter_overview(tree, include_stats=stats or False)
    rows = table.rpartition("\n")[0]  # its own total is a float where a parameter is a scalar
    return f"{rows}\nTotal: {count(tree):,} -- {num_bytes(tree):,} bytes"
