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

_KEYS = {"title", "cells", "overrides", "seeds", "findings", "references", "order", "categories"}
_REFERENCE_KEYS = {"model", "name", "eval_size"}
_CELL_KEYS = {"config", "overrides", "seeds", "labels", "images_per_s"}


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
    given = config_files.get_config(where, arg, "--study").to_dict()
    _refuse_unknown(given, _KEYS, f"--study {where}: ")
    if not given.get("cells"):
        raise ConfigError(f"--study {where}: has no cells")
    shared, seeds = ConfigDict(given.get("overrides", {})), given.get("seeds", 1)
    cells = []
    for name, row in given["cells"].items():
        place = f"--study {where}: cells.{name}"
        _refuse_unknown(row, _CELL_KEYS, f"{place}.")
        if not row.get("config"):
            raise ConfigError(f"{place}.config: name the config that it trains")
        own = ConfigDict(row.get("overrides", {}))
        keys = dict([*configs.leaves(shared), *configs.leaves(own)])
        texts = tuple(f"{key}={value}" for key, value in keys.items())
        count = row.get("seeds", seeds)
        if not isinstance(count, int) or count < 1:
            raise ConfigError(f"{place}.seeds = {count}: must be a number of seeds, at least 1")
        labels = row.get("labels", {})
        rate = row.get("images_per_s")
        cell = Cell(name, row["config"], texts, tuple(range(count)), labels, rate)
        try:
            cell.config  # noqa: B018  an error in the last cell comes before the first is run
        except ConfigError as error:
            raise ConfigError(f"{place}: {error}") from None
        cells.append(cell)
    references = []
    for key, row in given.get("references", {}).items():
        place = f"--study {where}: references.{key}"
        _refuse_unknown(row, _REFERENCE_KEYS, f"{place}.")
        if not row.get("model"):
            raise ConfigError(f"{place}.model: name a file or folder of weights")
        size = row.get("eval_size")
        references.append(Reference(key, row.get("name", key), row["model"], size))
    cells = _in_order(cells, given.get("order", []), f"--study {where}: order")
    name, asked = Path(where).stem, given.get("findings", {})
    shown = given.get("title", name), tuple(cells), asked, tuple(references)
    return Study(name, *shown, given.get("categories", {}))


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


def _refuse_unknown(row: Mapping[str, Any], known: Sequence[str] | set[str], where: str) -> None:
    for key in row:
        if key not in known:
            raise ConfigError(f"{where}{key}: {suggest(key, sorted(known))}")
