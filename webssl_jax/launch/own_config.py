"""A config file of the user on the machines: sent with what it imports, or refused before anything
costs money."""

from __future__ import annotations

import ast
import importlib.util
import pathlib
import shutil
import site
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence

from ml_collections import ConfigDict

from webssl_jax import config as configs
from webssl_jax import config_files
from webssl_jax.config import ConfigError

FOLDER = "own_config"  # in the source tree on the machines
_OF_PACKAGES = [pathlib.Path(path).resolve() for path in sysconfig.get_paths().values()]
_OF_PACKAGES += [pathlib.Path(p) for p in (*site.getsitepackages(), site.getusersitepackages())]


def prepare(spec: str, overrides: Sequence[str]) -> tuple[ConfigDict, str, dict[str, pathlib.Path]]:
    """What ``--config spec`` is on the machines.

    Returns (the config, the spec there, {place in the source tree: file to send}).

    Raises:
      ConfigError: as ``config.load``, and for what the machines would not have: modules that no
        package brings, files beside the config that are read and not imported, relative paths.
    """
    where, colon, arg = spec.partition(":")
    config = configs.load(spec, overrides)
    _check_rows(config)
    _check_paths(config)
    files = config_files.files(where)
    if not files:
        return config, f"{pathlib.Path(where).stem}{colon}{arg}", {}
    for file in files:
        for line, name in _imports(file):
            if (found := _only_here(name)) is not None:
                raise ConfigError(
                    f"{file}:{line}: import of {name}: the machines will not have {found}; put it "
                    f"beside the config and write `from . import {name}`"
                )
    sent = {f"{FOLDER}/{file.relative_to(files[0].parent)}": file for file in files}
    with tempfile.TemporaryDirectory() as folder:
        for place, file in sent.items():
            copy = pathlib.Path(folder, place)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, copy)
        try:
            alone = configs.load(f"{folder}/{FOLDER}/{files[0].name}{colon}{arg}", overrides)
        except ConfigError as error:
            raise ConfigError(
                f"--config {where}: only it and what it imports are sent to the machines, and "
                f"alone it fails there ({str(error).replace(f'{folder}/', '')})"
            ) from error
    if configs.resolved(alone) != configs.resolved(config):
        raise ConfigError(f"--config {where}: gives another config in another folder; mend that")
    return config, f"{FOLDER}/{files[0].name}{colon}{arg}", sent


def _check_rows(config: ConfigDict) -> None:
    for name, row in config.evals.items():
        module, colon, _ = str(row.get("kind", "")).partition(":")
        if colon and (place := _only_here(module.split(".")[0])) is not None:
            raise ConfigError(
                f"config.evals.{name}.kind = {row.kind}: the machines will not have {place}; move "
                "it into webssl_jax/"
            )


def _check_paths(config: ConfigDict) -> None:
    values = {
        "data.train": config.data.train,
        "pictures.source": config.pictures.source,
        "resume_from": config.resume_from,
        "continue_from": config.continue_from,
        "init_from": config.init_from,
        **{
            f"evals.{name}.{key}": row[key]
            for name, row in config.evals.items()
            for key in ("train", "test", "pairs")
            if row.get(key)
        },
        **{
            f"mixture.{name}.{key}": row[key]
            for name, row in config.mixture.items()
            for key in ("train", "selection")
            if row.get(key)
        },
    }
    for key, value in values.items():
        for path in value.split(","):
            if path and not path.startswith(("/", "corpus:", "gs://")):
                raise ConfigError(
                    f"config.{key} = {path}: give an absolute path, seen by all machines"
                )


def _imports(file: pathlib.Path) -> Iterator[tuple[int, str]]:
    """(line, package) of each import that is not relative."""
    if file.suffix != ".py":
        return
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name.split(".")[0]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.lineno, node.module.split(".")[0]


def _only_here(name: str) -> pathlib.Path | None:
    """Where the module lies, if that is neither Python's nor a package's folder, nor this one's."""
    if name in sys.stdlib_module_names or name == "webssl_jax":
        return None
    spec = importlib.util.find_spec(name)
    found = [spec.origin] if spec and spec.origin else []
    found += (spec and spec.submodule_search_locations) or []
    if not found or found[0] in ("built-in", "frozen"):
        return None
    place = pathlib.Path(found[0]).resolve()
    return None if any(place.is_relative_to(folder) for folder in _OF_PACKAGES) else place
