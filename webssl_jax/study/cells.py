"""What a study is: cells, each an experiment with its seeds, and findings that are asked of them.

    def get_config(arg=None):
        return ConfigDict({
            "title": "Does MAE get better with size?",
            "cells": {
                "small": {"config": "web_mae:size=tiny", "overrides": {"model": {"width": 96}}},
                "large": {"config": "web_mae:size=tiny", "overrides": {"model": {"width": 192}}},
            },
            "overrides": {"total_images": 100_000, ...},
            "seeds": 3,
            "findings": {
                "size": {"kind": "slope", "x": "parameters", "metric": "probe/top1", "cells": "*"},
            },
        })

``config`` is what ``train --config`` takes; ``overrides`` are keys of it, in groups as there, those
of a cell over those of the study. The evaluations of a cell are the rows of its config. ``labels``
of a cell ({"method": "Web-MAE", "data": "all"}) stand in the table of runs; these two name its
colour in pictures. Cells are sorted by name. ``references`` ({"dinov2_s": {"model": PATH, "name":
"DINOv2 S/14", "eval_size": 98}}) are weights that are not trained here, judged by the rows that all
cells share, on images of that size (their own without), and drawn as levels.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from webssl_jax import config as configs
from webssl_jax import config_files, methods
from webssl_jax.config import ConfigError
from webssl_jax.errors import suggest
from webssl_jax.weights.networks import Networks, template_of

TEXT, GROUP, TEXTS, SWITCH = "a text", "a group of keys", "a list of texts", "True or False"
COUNT, RATE = "a whole number, at least 1", "a number above 0"
NAMES = "a name, a pattern or a list of them"
_KEYS = {
    **{"title": TEXT, "cells": GROUP, "overrides": GROUP, "seeds": COUNT, "findings": GROUP},
    **{"references": GROUP, "order": TEXTS, "categories": GROUP},
}
_REFERENCE_KEYS = {"model": TEXT, "name": TEXT, "eval_size": COUNT}
_CELL_KEYS = {
    **{"config": TEXT, "overrides": GROUP, "seeds": COUNT, "labels": GROUP, "images_per_s": RATE}
}
# Of a cell or reference: it is the name of a folder, and may stand in a pattern.
_NAME = re.compile(r"\w[\w +=,-]*")


@dataclasses.dataclass(frozen=True)
class Cell:
    """name: also of its folder. spec: of a config. overrides: ``key=value`` texts. labels: what it
    stands for. images_per_s: that one core trains; None: not known."""

    name: str
    spec: str
    overrides: tuple[str, ...]
    seeds: tuple[int, ...]
    labels: Mapping[str, str]
    images_per_s: float | None = None

    @functools.cached_property
    def config(self) -> ConfigDict:
        """The resolved config, of seed 0."""
        return configs.load(self.spec, self.overrides)

    @property
    def steps(self) -> int:
        return configs.total_steps(self.config)

    @property
    def images(self) -> int:
        """That a run sees."""
        return self.steps * self.config.global_batch

    @functools.cached_property
    def parameters(self) -> int:
        """Of the network that is judged: the image encoder."""
        tree = template_of(Networks.of(methods.create(self.config)))["encoder"]
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


@dataclasses.dataclass(frozen=True)
class Run:
    """One seed of a cell, and its folder."""

    cell: Cell
    seed: int
    workdir: Path

    @property
    def name(self) -> str:
        return f"{self.cell.name}/seed{self.seed}"

    def arguments(self) -> list[str]:
        """Of ``python -m webssl_jax.train``."""
        keys = [*self.cell.overrides, f"seed={self.seed}"]
        flags = ["--config", self.cell.spec, "--workdir", str(self.workdir)]
        return [*flags, *(f"--config.{key}" for key in keys)]


@dataclasses.dataclass(frozen=True)
class Reference:
    """key: of its folder. name: in tables. model: a path of weights. eval_size: of images, in
    pixels; None: the model's own."""

    key: str
    name: str
    model: str
    eval_size: int | None


@dataclasses.dataclass(frozen=True)
class Study:
    """findings: {name: row}, see findings.py. categories: {name: ``ROW/METRIC`` of it}."""

    name: str
    title: str
    cells: tuple[Cell, ...]
    findings: Mapping[str, Mapping[str, Any]]
    references: tuple[Reference, ...] = ()
    categories: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)

    def runs(self, folder: Path) -> list[Run]:
        """In the order in which they are started: the first seed of all cells first, so that a
        first answer comes early."""
        most = max(len(cell.seeds) for cell in self.cells)
        order = [(c, c.seeds[i]) for i in range(most) for c in self.cells if i < len(c.seeds)]
        return [Run(c, seed, folder / "cells" / c.name / f"seed{seed}") for c, seed in order]


def load(spec: str) -> Study:
    """Reads ``NAME[:ARG]``, a shipped study, or ``FILE.py[:ARG]``, and checks every cell's config.

    Raises:
      ConfigError: naming the key, or as ``config.load`` with the cell's name.
    """
    where, _, arg = spec.partition(":")
    place = f"--study {where}: "
    given = checked(config_files.get_config(where, arg, "--study").to_dict(), _KEYS, place)
    if not given.get("cells"):
        raise ConfigError(f"{place}has no cells")
    shared, seeds = given.get("overrides", {}), given.get("seeds", 1)
    cells = [
        _cell(name, row, shared, seeds, f"{place}cells.{name}")
        for name, row in given["cells"].items()
    ]
    references = [
        _reference(key, row, f"{place}references.{key}")
        for key, row in given.get("references", {}).items()
    ]
    cells = _in_order(cells, given.get("order", []), f"{place}order")
    name, asked = Path(where).stem, given.get("findings", {})
    shown = given.get("title", name), tuple(cells), asked, tuple(references)
    return Study(name, *shown, given.get("categories", {}))


def _cell(name: str, row: Any, shared: dict[str, Any], seeds: int, place: str) -> Cell:
    row = _named(name, row, _CELL_KEYS, place)
    if not row.get("config"):
        raise ConfigError(f"{place}.config: name the config that it trains")
    groups = ConfigDict(shared), ConfigDict(row.get("overrides", {}))
    keys = dict(leaf for group in groups for leaf in configs.leaves(group))
    texts = tuple(f"{key}={value}" for key, value in keys.items())
    labels = row.get("labels", {})
    labels = checked(labels, dict.fromkeys(labels, TEXT), f"{place}.labels.")
    count = range(row.get("seeds", seeds))
    cell = Cell(name, row["config"], texts, tuple(count), labels, row.get("images_per_s"))
    try:
        cell.config  # noqa: B018  an error in the last cell comes before the first is run
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from None
    return cell


def _reference(key: str, row: Any, place: str) -> Reference:
    row = _named(key, row, _REFERENCE_KEYS, place)
    if not row.get("model"):
        raise ConfigError(f"{place}.model: name a file or folder of weights")
    return Reference(key, row.get("name", key), row["model"], row.get("eval_size"))


def chosen(cells: Sequence[Cell], names: str | Sequence[str]) -> list[Cell]:
    """Those that a name, a pattern (``mae_*``), or some of them mean, in the study's order."""
    patterns = [names] if isinstance(names, str) else list(names)
    return [c for c in cells if any(fnmatch.fnmatchcase(c.name, p) for p in patterns)]


def _in_order(cells: Sequence[Cell], first: Sequence[str], where: str) -> list[Cell]:
    found: dict[str, Cell] = {}
    for name in first:
        own = chosen(cells, name)
        if not own:
            raise ConfigError(f"{where} = {name}: {suggest(name, [c.name for c in cells])}")
        found |= {cell.name: cell for cell in own if cell.name not in found}
    return list((found | {cell.name: cell for cell in cells if cell.name not in found}).values())


def _named(name: str, row: Any, known: Mapping[str, str], place: str) -> dict[str, Any]:
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{place}: a folder gets its name, so it must begin with a letter or digit and have no "
            "other signs than spaces and _+=,-"
        )
    return checked(row, known, f"{place}.")


def checked(row: Any, known: Mapping[str, str], where: str) -> dict[str, Any]:
    """The keys of ``row`` that have a value; None is as good as no key.

    Args:
      known: {key: kind}, of those above.
      where: what stands before a key in an error.

    Raises:
      ConfigError: for what is no group of keys, a key that is not known, or a value of another
        kind.
    """
    if not isinstance(row, Mapping):
        raise ConfigError(f"{where.rstrip('.: ')} = {_short(row)}: must be {GROUP}")
    given = {key: value for key, value in row.items() if value is not None}
    for key, value in given.items():
        if key not in known:
            raise ConfigError(f"{where}{key}: {suggest(key, sorted(known))}")
        if not _is(known[key], value):
            raise ConfigError(f"{where}{key} = {_short(value)}: must be {known[key]}")
    return given


def _is(kind: str, value: Any) -> bool:
    if kind == TEXTS or (kind == NAMES and not isinstance(value, str)):
        return isinstance(value, (list, tuple)) and all(isinstance(text, str) for text in value)
    if kind in (COUNT, RATE):
        types = int if kind == COUNT else (int, float)
        return isinstance(value, types) and not isinstance(value, bool) and value > 0
    return isinstance(value, {TEXT: str, NAMES: str, GROUP: Mapping, SWITCH: bool}[kind])


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:60]}..."
