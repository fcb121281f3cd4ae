"""Where configs come from: a shipped one by its name, any other by the path of its file: a
``get_config`` in Python, or every key in JSON, as ``config.json`` of a run.

The shipped ones are the package ``webssl_jax.configs``. Any other folder with config files is
loaded as a package of its own, under a name in ``sys.modules`` that no other folder has. So a
config file writes

    from . import common                        for the common.py beside it
    from webssl_jax.configs import common       for the shipped one

and a plain ``import common`` is refused where there is a common.py beside the file: Python keeps
one module of that name, whichever folder it came from. A folder's ``__init__.py`` is not run.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib
import importlib.util
import json
import re
import sys
import traceback
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

from ml_collections import ConfigDict

from webssl_jax import configs as shipped
from webssl_jax.errors import ConfigError, UserError, suggest

_FOLDERS = {"--evals": "evals", "--study": "studies"}  # of what is no experiment
_NO_EXPERIMENTS = {"__init__", "common"}


def names(flag: str = "--config") -> list[str]:
    """The shipped configs, or for ``--evals`` rows of evaluations and for ``--study`` studies."""
    return sorted(_files(_folder_of(flag)) - _NO_EXPERIMENTS)


def get_config(where: str, arg: str, flag: str = "--config") -> ConfigDict:
    """What ``get_config(arg)`` returns of the shipped config named ``where``, or of the file at
    that path (it ends in .py or has a slash). Files of the user are read anew at each call.

    flag: ``--config``, or ``--evals`` for rows of evaluations, whose shipped files lie in
    configs/evals, or ``--study`` (configs/studies).

    Raises:
      ConfigError: for a config that does not exist or has no ``get_config``, an import that would
        get the wrong file, and any error in a config file, with the file and line of it.
    """
    file = _file(where, flag)
    if file.suffix == ".json":
        return _read_json(file, arg, flag)
    with _errors_in(file), _no_bytecode():
        module = _import(file)
        if not hasattr(module, "get_config"):
            raise ConfigError(f"{flag} {where}: has no get_config(arg)")
        config = module.get_config(arg)
    if not isinstance(config, ConfigDict):
        kind = type(config).__name__
        raise ConfigError(f"{file}: get_config returned {kind}; it must return a ConfigDict")
    return config


def files(where: str, flag: str = "--config") -> list[Path]:
    """The file that ``where`` names, and those of its folder that it imported when
    :func:`get_config` read it. Of a shipped config none.

    Raises:
      ConfigError: for a config that does not exist.
    """
    file = _file(where, flag)
    if file.parent == _folder_of(flag):
        return []
    package = _package(file.parent)
    modules = [module for name, module in sys.modules.items() if name.startswith(f"{package}.")]
    beside = {Path(path) for module in modules if (path := getattr(module, "__file__", None))}
    return [file, *sorted(beside - {file})]


def base(where: str, flag: str = "--config") -> ConfigDict:
    """Every key that the config ``where`` may have: those of the shipped common.py, and of the one
    beside its file, if it imported that."""
    keys = importlib.import_module(f"{shipped.__name__}.common").base()
    own = sys.modules.get(f"{_package(_file(where, flag).parent)}.common")
    if own is not None and hasattr(own, "base"):
        keys.update(own.base())
    return keys


def place_of(word: str, where: str, flag: str = "--config") -> str:
    """``FILE:LINE`` where the files of a config first have ``word``, or the first of them."""
    found = files(where, flag) or [_file(where, flag)]
    for file in found:
        for number, line in enumerate(file.read_text("utf-8").splitlines(), 1):
            if re.search(rf"\b{re.escape(word)}\b", line):
                return f"{file}:{number}"
    return str(found[0])


def _read_json(file: Path, arg: str, flag: str) -> ConfigDict:
    if arg:
        raise ConfigError(f"{flag} {file}:{arg}: a JSON file takes no arguments")
    try:
        values = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{flag} {file}: its JSON cannot be read ({error})") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{flag} {file}: is no object of keys, as the config.json of a run is")
    return ConfigDict({key: value for key, value in values.items() if key != "derived"})


def _file(where: str, flag: str) -> Path:
    suffix = Path(where).suffix
    if suffix in (".yaml", ".yml", ".toml"):
        raise ConfigError(
            f"{flag} {where}: {suffix[1:].upper()} is not read; give a FILE.py, or a FILE.json as "
            "train --print-config prints it"
        )
    if suffix in (".py", ".json") or "/" in where:
        file = Path(where).resolve()
        if file.suffix not in (".py", ".json") or not file.is_file():
            raise ConfigError(f"{flag} {where}: no such file; {_hint(where, flag)}")
        return file
    if where not in names(flag):
        known = suggest(where, names(flag))
        raise ConfigError(f"{flag} {where}: no such config; {known}; or give a FILE.py")
    return _folder_of(flag) / f"{where}.py"


def _shipped_folder() -> Path:
    return Path(shipped.__path__[0]).resolve()


def _folder_of(flag: str) -> Path:
    return _shipped_folder() / _FOLDERS.get(flag, "")


def _files(folder: Path) -> set[str]:
    return {path.stem for path in folder.glob("*.py")}


def _hint(where: str, flag: str) -> str:
    if Path(where).stem in names(flag):
        return f"the shipped config is {flag} {Path(where).stem}"
    folder = Path(where).parent
    near = [str(folder / f"{name}.py") for name in _files(folder) - _NO_EXPERIMENTS]
    return suggest(where, near) if near else f"shipped configs go by name: {', '.join(names(flag))}"


def _package(folder: Path) -> str:
    """The name of the package that ``folder`` is loaded as."""
    return f"webssl_config_{hashlib.sha256(str(folder).encode()).hexdigest()[:12]}"


def _import(file: Path) -> ModuleType:
    if file.parent == _shipped_folder():
        return importlib.import_module(f"{shipped.__name__}.{file.stem}")
    _check_imports(file, set())
    package = _package(file.parent)
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        del sys.modules[name]
    importlib.invalidate_caches()
    folder = ModuleSpec(package, None, is_package=True)
    folder.submodule_search_locations = [str(file.parent)]
    sys.modules[package] = importlib.util.module_from_spec(folder)
    name = f"{package}.{file.stem.replace('.', '_')}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None  # as the name ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _no_bytecode() -> Iterator[None]:
    """Python takes bytecode for that of a file which has the same size and second of change, so a
    file that is changed twice within a second would be read as it was."""
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        yield
    finally:
        sys.dont_write_bytecode = before


def _check_imports(file: Path, seen: set[Path]) -> None:
    """Refuses plain imports of files beside ``file``, in it and in those that it imports."""
    seen.add(file)
    beside = _files(file.parent)
    for node in ast.walk(ast.parse(file.read_bytes(), str(file))):
        if isinstance(node, ast.Import):
            level, modules = 0, [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            level = node.level
            modules = [node.module] if node.module else [alias.name for alias in node.names]
        else:
            continue
        for name in {module.split(".")[0] for module in modules} & beside:
            other = file.with_name(f"{name}.py")
            if level == 0 and name not in sys.stdlib_module_names:
                raise ConfigError(
                    f"{file}:{node.lineno}: import of {name}: write `from . import {name}` or "
                    f"`from .{name} import ...` for the {name}.py beside this file"
                )
            if level == 1 and other not in seen:
                _check_imports(other, seen)


@contextlib.contextmanager
def _errors_in(file: Path) -> Iterator[None]:
    """Makes one line of what config files raise, with the last line of them that was run."""
    try:
        yield
    except UserError:
        raise
    except SystemExit as error:
        raise ConfigError(
            f"{file}: ends the program ({error}) instead of giving a config"
        ) from error
    except SyntaxError as error:
        raise ConfigError(f"{error.filename}:{error.lineno}: {error.msg}") from error
    except Exception as error:
        place = str(file)
        for frame in traceback.extract_tb(error.__traceback__):
            if Path(frame.filename).parent == file.parent:
                place = f"{frame.filename}:{frame.lineno}"
        says = " ".join(str(error).replace(_package(file.parent), str(file.parent)).split())
        if isinstance(error, ImportError):
            missing = re.search(r"'(?:[^']*\.)?(\w+)'", says)
            if missing and missing[1] in _files(_shipped_folder()):
                says += f"; the shipped one: from {shipped.__name__} import {missing[1]}"
        raise ConfigError(f"{place}: {type(error).__name__}: {says}") from error
