"""Configs: loading, arguments, overrides, units, and the resolved dump that every run writes. What
their keys must be, and what follows from several of them, is in config_rules.py.

An experiment is a Python file with ``get_config(arg) -> ml_collections.ConfigDict``. It is named on
the command line as ``web_dino:size=1b,res=224`` (a shipped one, with typed arguments after the
colon) or by its path, ``mine/web_dino.py:size=1b``, and changed by dotted overrides such as
``--config.optim.lr=1e-3``. A key that does not exist is refused with the nearest real one.

Durations carry their unit in their name: ``warmup_steps``, ``warmup_images`` or ``warmup_percent``
(of the whole run). An override may use another unit than the config file: it replaces the one that
was there.

What depends on several keys is a rule, evaluated after the overrides: ``total_steps``, ``steps``,
``learning_rate``, ``weight_decays``.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Sequence
from typing import Any, NoReturn

import ml_collections

from webssl_jax import config_files
from webssl_jax.config_rules import DURATIONS as DURATIONS
from webssl_jax.config_rules import MOST_PICTURES as MOST_PICTURES
from webssl_jax.config_rules import TRACKERS as TRACKERS
from webssl_jax.config_rules import learning_rate as learning_rate
from webssl_jax.config_rules import leaves as leaves
from webssl_jax.config_rules import steps as steps
from webssl_jax.config_rules import total_steps as total_steps
from webssl_jax.config_rules import tracker_names as tracker_names
from webssl_jax.config_rules import validate as validate
from webssl_jax.config_rules import weight_decays as weight_decays
from webssl_jax.errors import ConfigError, nearest, suggest
from webssl_jax.errors import TransientError as TransientError
from webssl_jax.errors import UserError as UserError

# The side of a square, or (height, width).
_SIZES = ("method.view.image_size", "method.view.global_size", "method.view.local_size")
# Keys that change memory and speed and not results.
COSTS = (
    "model.remat",
    "model.attention",
    "method.text.remat",
    "method.text.attention",
    "method.language.remat",
    "method.stream_prototypes",
)
_ROWS = ("evals", "mixture")  # groups of rows, whose names are the user's
_BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
# Other projects' words for keys here.
_OTHER_WORDS = {
    "learning_rate": "optim.lr",
    "base_lr": "optim.lr",
    "blr": "optim.lr",
    "min_lr": "optim.final_lr",
    "wd": "optim.weight_decay",
    "betas": "optim.b1",
    "beta1": "optim.b1",
    "beta2": "optim.b2",
    "dim": "model.width",
    "embed_dim": "model.width",
    "hidden_size": "model.width",
    "num_layers": "model.depth",
    "num_heads": "model.heads",
    "image_size": "method.view.image_size",
    "save_every": "checkpoint.every_steps",
    "path": "data.train",
    "batch": "global_batch",
    "batch_size": "global_batch",
    "accum_iter": "accumulation_steps",
    "steps": "total_steps",
    "max_steps": "total_steps",
    "num_steps": "total_steps",
    "epochs": "total_images",
    "num_workers": "data.workers",
    "dataset": "data.train",
    "resume": "resume_from",
    "pretrained": "init_from",
}
_WORDS = {"true": True, "false": False, "none": None}


def load(spec: str, overrides: Sequence[str] = ()) -> ml_collections.ConfigDict:
    """Reads ``NAME[:ARG]``, ``FILE.py[:ARG]`` or ``FILE.json``, applies ``key.path=value``
    overrides and checks the result. NAME is a shipped config, whatever the current folder; what a
    FILE may import says config_files.py.

    Raises:
      ConfigError: for a config that is not there or fails, an argument or override that it does not
        know, or a bad value.
    """
    config = _made_by(spec, "--config")
    _check_keys(config, spec.partition(":")[0])
    config.lock()
    apply_overrides(config, overrides)
    validate(config)
    return config


def load_rows(spec: str, overrides: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """Reads ``FILE.py[:ARG]`` whose ``get_config(arg)`` gives rows of evaluations, and applies
    ``ROW.key=value`` overrides.

    Raises:
      ConfigError: as :func:`load`.
    """
    return override_rows(_made_by(spec, "--evals"), overrides)


def override_rows(
    rows: ml_collections.ConfigDict, overrides: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """``rows`` of evaluations with ``ROW.key=value`` overrides applied.

    Raises:
      ConfigError: for an override that is not of this form.
    """
    holder = ml_collections.ConfigDict({"evals": rows.to_dict()})
    for override in overrides:
        path, _, text = override.partition("=")
        _override_rows(holder, f"evals.{path}", text, "--")
    return holder.evals.to_dict()


def _made_by(spec: str, flag: str) -> Any:
    """What ``get_config`` of ``NAME[:ARG]`` or ``FILE.py[:ARG]`` returns."""
    where, _, arg = spec.partition(":")
    return config_files.get_config(where, arg, flag)


def parse_arg(arg: str | None, **defaults: Any) -> ml_collections.ConfigDict:
    """Parses the ``size=1b,res=378`` behind the colon. Each value takes its default's type.

    Raises:
      ConfigError: for an argument without a default, or a value of the wrong type.
    """
    values = ml_collections.ConfigDict(defaults)
    for item in filter(None, (arg or "").split(",")):
        name, equals, text = item.partition("=")
        if name not in defaults:
            raise ConfigError(f"config argument {name!r}: {suggest(name, defaults)}")
        if not equals:
            raise ConfigError(f"config argument {item!r}: write {name}=VALUE")
        values[name] = _parse(f"config argument {name}", text, defaults[name])
    return values


def _check_keys(config: ml_collections.ConfigDict, where: str) -> None:
    """Refuses keys that no config has, and a config that lacks one. Those of ``model`` and
    ``method`` the method checks, those of ``evals`` each evaluation, those of ``mixture``
    data/mixture.py."""
    free = ("model", "method", *_ROWS)

    def by_stem(node: ml_collections.ConfigDict) -> dict[str, str]:
        found = {}
        for key, _ in leaves(node):
            stem = key.rpartition("_")[0]
            found[stem if stem in DURATIONS else key] = key
        return {stem: key for stem, key in found.items() if key.split(".")[0] not in free}

    def refuse(key: str, words: str) -> NoReturn:
        place = config_files.place_of(key.rpartition(".")[2], where)
        raise ConfigError(f"{place}: config.{key}{words}")

    base = config_files.base(where)
    every, given, usual = by_stem(base), by_stem(config), dict(leaves(base))
    for stem, key in given.items():
        if stem not in every:
            group = key.split(".")[0]
            known = list(every.values()) if group in base else list(base)
            key = key if group in base else group
            near = _nearest_key(key, known)
            refuse(key, ": no such key" + (f"; did you mean config.{near}?" if near else ""))
    for key, value in leaves(config):
        if key in usual and not _is_like(value, usual[key]):
            refuse(key, f" = {value!r}: must be of type {type(usual[key]).__name__}")
    missing = [key for stem, key in every.items() if stem not in given]
    missing += [key for key in free if not isinstance(config.get(key), ml_collections.ConfigDict)]
    if missing:
        raise ConfigError(
            f"--config {where}: has no config.{missing[0]}; a config has every key of "
            "configs/common.py: start from its base()"
        )


def _is_like(value: Any, like: Any) -> bool:
    if like is None:
        return True
    if isinstance(like, (tuple, list)):
        return isinstance(value, (tuple, list))
    if isinstance(value, bool) != isinstance(like, bool):
        return False
    return isinstance(value, (int, float) if isinstance(like, float) else type(like))


def differences(before: Any, now: Any, key: str = "") -> list[tuple[str, Any, Any]]:
    """(dotted key, value before, value now) of all that differs in two resolved configs. What one
    of them lacks is "unset"."""
    if not isinstance(before, dict) and not isinstance(now, dict):
        return [] if before == now else [(key, before, now)]
    before, now = (side if isinstance(side, dict) else {} for side in (before, now))
    rows = []
    for name in sorted({*before, *now}):
        inner = f"{key}.{name}" if key else name
        rows += differences(before.get(name, "unset"), now.get(name, "unset"), inner)
    return rows


def apply_overrides(config: ml_collections.ConfigDict, overrides: Sequence[str]) -> None:
    """Applies ``optim.lr=1e-3`` texts in place, typed like the value they replace.

    Raises:
      ConfigError: for an unknown key (with the nearest real one) or a value of another type.
    """
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(f"--config.{path}: write --config.{path}=VALUE")
        *folders, name = path.split(".")
        node = config
        if path.split(".")[0] in _ROWS:
            _override_rows(config, path, text)
            continue
        for depth, folder in enumerate(folders):
            if folder not in node or not isinstance(node[folder], ml_collections.ConfigDict):
                _unknown_key(config, ".".join(folders[: depth + 1]), path)
            node = node[folder]
        if name not in node:
            sibling = _same_duration(node, path)
            if sibling is None:
                _unknown_key(config, path, path)
            with node.unlocked():  # the same duration in another unit
                del node[sibling]
                node[name] = _parse(
                    f"--config.{path}", text, 0.0 if name.endswith("_percent") else 0
                )
            continue
        if isinstance(node[name], ml_collections.ConfigDict):
            raise ConfigError(
                f"--config.{path}: is a group of keys ({', '.join(sorted(node[name]))}), not a "
                "value"
            )
        if path in _SIZES:  # the method says what they may be
            with node.ignore_type():
                node[name] = _parse(f"--config.{path}", text, None)
            continue
        node[name] = _parse(f"--config.{path}", text, node[name])


def _override_rows(
    config: ml_collections.ConfigDict, path: str, text: str, prefix: str = "--config."
) -> None:
    """``evals.ROW.key=value`` changes or adds a row's key; ``evals.ROW=none`` takes a row out,
    ``evals=none`` all of them; and so for each group of rows. Which keys and values a row may have
    its evaluation says (``evaluators/suite.py``), or ``data/mixture.py``."""
    group, *parts = path.split(".")
    rows = config[group]
    with config.unlocked():
        if text.lower() == "none" and len(parts) < 2:
            if parts and parts[0] not in rows:
                raise ConfigError(f"{prefix}{path}: no such row; {suggest(parts[0], rows)}")
            for row in parts or list(rows):
                del rows[row]
        elif len(parts) == 2:
            row, key = parts
            if row not in rows:
                rows[row] = ml_collections.ConfigDict()
            rows[row][key] = _parse(f"{prefix}{path}", text, rows[row].get(key))
        else:
            raise ConfigError(
                f"{prefix}{path}={text}: write {group}.ROW.KEY=VALUE or {group}.ROW=none"
            )


def _unknown_key(config: ml_collections.ConfigDict, bad: str, path: str) -> NoReturn:
    near = _nearest_key(path, [key for key, _ in leaves(config)])
    hint = (
        f"did you mean --config.{near}?" if near else f"the groups are {', '.join(sorted(config))}"
    )
    raise ConfigError(f"--config.{bad}: no such key; {hint}")


def _nearest_key(path: str, keys: Sequence[str]) -> str | None:
    """The key that ``path`` stands for: its name in another group, another word for it, or what is
    spelled nearly so."""
    name = path.rsplit(".", 1)[-1]
    same = [key for key in keys if key.rsplit(".", 1)[-1] == name]
    same += [key for key in keys if key == _OTHER_WORDS.get(name)]
    if same:
        return same[0]
    stem, _, unit = path.rpartition("_")
    if unit in ("steps", "images", "percent", "epochs"):  # a length, in a unit that it has not
        same = [key for key in keys if key.rsplit("_", 1)[0].endswith(stem)]
    return same[0] if same else nearest(path, keys, cutoff=0.6)


def _same_duration(node: ml_collections.ConfigDict, path: str) -> str | None:
    """The key of ``node`` that holds the duration ``path`` in another unit."""
    stem, _, unit = path.rpartition("_")
    if unit not in DURATIONS.get(stem, ()):
        return None
    name = stem.rpartition(".")[2]
    return next(f"{name}_{other}" for other in DURATIONS[stem] if f"{name}_{other}" in node)


def _parse(where: str, text: str, like: Any) -> Any:
    """``text`` as the type of ``like``. ``like=None`` takes any literal, and what is none is text;
    whoever reads the key checks its type."""
    kind = type(like).__name__
    try:
        if isinstance(like, bool):
            return _BOOLEANS[text.lower()]
        if isinstance(like, str):
            return text
        if like is None and text.lower() in _WORDS:
            return _WORDS[text.lower()]
        value = ast.literal_eval(text)
    except (KeyError, ValueError, SyntaxError, TypeError):
        if like is None:
            return text
        raise ConfigError(f"{where}: {text!r} is not of type {kind}") from None
    if isinstance(like, float) and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if isinstance(like, int) and isinstance(value, float) and value.is_integer():
        return int(value)  # 2e9 images is a fine way to write an integer
    if isinstance(like, (tuple, list)):
        return tuple(value) if isinstance(value, (tuple, list)) else (value,)
    if like is not None and type(value) is not type(like):
        raise ConfigError(f"{where}: {text!r} is {type(value).__name__}, not {kind}")
    return value


def resolved(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The config as plain JSON types, with what follows from it by rules beside it."""
    return json.loads(config.to_json_best_effort()) | {
        "derived": {
            "total_steps": total_steps(config),
            "warmup_steps": steps(config.optim, "warmup", config),
            "cooldown_steps": steps(config.optim, "cooldown", config),
            "learning_rate": learning_rate(config),
        }
    }


def drop_costs(values: dict[str, Any]) -> None:
    """Takes out of a resolved config, in place, what changes memory and speed and not results."""
    for key in COSTS:
        *groups, name = key.split(".")
        node = values
        for group in groups:
            node = node.get(group) or {}
        node.pop(name, None)


def from_resolved(values: dict[str, Any]) -> ml_collections.ConfigDict:
    """Inverse of :func:`resolved`, for evaluating and exporting a finished run."""
    return ml_collections.ConfigDict({k: v for k, v in values.items() if k != "derived"}).lock()
