"""Configs: loading, arguments, overrides, units, validation, and the resolved dump that every run
writes.

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
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import ml_collections

from webssl_jax import config_files
from webssl_jax.errors import ConfigError, nearest, suggest
from webssl_jax.errors import TransientError as TransientError
from webssl_jax.errors import UserError as UserError

# The durations that may be given in another unit. All other lengths have one unit, their key's.
DURATIONS = {
    "total": ("steps", "images"),
    "optim.warmup": ("steps", "images", "percent"),
    "optim.cooldown": ("steps", "images", "percent"),
}
LR_SCHEDULES = ("cosine", "constant")
# name -> factor of the peak learning rate, from global_batch / optim.lr_batch
LR_SCALINGS = {"linear": lambda ratio: ratio, "sqrt": math.sqrt, "none": lambda ratio: 1.0}
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
MOMENT_DTYPES = ("float32", "bfloat16")
MOST_PICTURES = 64
TRACKERS = ("tensorboard", "wandb", "mlflow")  # webssl_jax/telemetry/trackers.py
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


def leaves(config: ml_collections.ConfigDict, prefix: str = "") -> list[tuple[str, Any]]:
    """(dotted key, value) of all keys that are no groups."""
    rows = []
    for key in config:
        value = config[key]
        if isinstance(value, ml_collections.ConfigDict):
            rows += leaves(value, f"{prefix}{key}.")
        else:
            rows.append((prefix + key, value))
    return rows


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


def total_steps(config: ml_collections.ConfigDict) -> int:
    """Optimiser steps of the whole run, from ``total_steps`` or ``total_images``."""
    if "total_steps" in config:
        return int(config.total_steps)
    return int(config.total_images) // int(config.global_batch)


def steps(node: ml_collections.ConfigDict, name: str, config: ml_collections.ConfigDict) -> int:
    """The duration ``name`` of the group ``node`` in steps, whatever unit it was given in."""
    if f"{name}_steps" in node:
        return int(node[f"{name}_steps"])
    if f"{name}_images" in node:
        return int(round(node[f"{name}_images"] / config.global_batch))
    return int(round(node[f"{name}_percent"] / 100 * total_steps(config)))


def learning_rate(config: ml_collections.ConfigDict) -> float:
    """The peak learning rate of this run: ``optim.lr``, which is meant for batches of
    ``optim.lr_batch`` images, scaled to ``global_batch`` by ``optim.lr_scaling``.

    linear: lr * batch / lr_batch (Goyal et al., arXiv 1706.02677; MAE's ``blr`` has lr_batch 256).
    sqrt: lr * sqrt(batch / lr_batch) (DINOv2, lr_batch 1024). none: lr (CLIP).
    """
    optim = config.optim
    return float(optim.lr * LR_SCALINGS[optim.lr_scaling](config.global_batch / optim.lr_batch))


def weight_decays(config: ml_collections.ConfigDict) -> tuple[float, float]:
    """(first, last) weight decay. A ``final_weight_decay`` of None stands for ``weight_decay``."""
    first, last = config.optim.weight_decay, config.optim.final_weight_decay
    return float(first), float(first if last is None else last)


def validate(config: ml_collections.ConfigDict) -> None:
    """Checks what can be checked without devices, data or a model.

    Raises:
      ConfigError: naming the key, its value and what it must be.
    """

    def check(ok: bool, key: str, must: str) -> None:
        if not ok:
            node = config
            for part in key.split("."):
                node = node[part]
            raise ConfigError(f"config.{key} = {node!r}: must be {must}")

    for key, value in leaves(config):
        check(not isinstance(value, float) or math.isfinite(value), key, "a finite number")
    check(0 <= config.seed < 2**32, "seed", "in [0, 2**32)")
    check(
        sum(map(bool, (config.resume_from, config.continue_from, config.init_from))) < 2,
        "continue_from" if config.continue_from else "resume_from",
        "the only one of resume_from, continue_from and init_from",
    )
    check(config.global_batch > 0, "global_batch", "a positive number of images")
    check(config.accumulation_steps > 0, "accumulation_steps", "at least 1")
    check(
        config.global_batch % config.accumulation_steps == 0,
        "accumulation_steps",
        f"a divisor of global_batch = {config.global_batch}",
    )
    for stem, units in DURATIONS.items():
        keys = [f"{stem}_{unit}" for unit in units]
        given = [key for key, _ in leaves(config) if key in keys]
        if len(given) != 1:
            raise ConfigError(
                f"config.{stem}: must be given once, as one of {', '.join(keys)}; "
                f"given: {', '.join(given) or 'none'}"
            )
    if total_steps(config) < 1:
        length = "total_steps" if "total_steps" in config else "total_images"
        check(False, length, f"at least one step of global_batch = {config.global_batch} images")
    _validate_lengths(config)
    _validate_optim(config.optim, check)
    guard = config.guard
    check(
        guard.spike_factor == 0 or guard.spike_factor > 1, "guard.spike_factor", "zero (off) or > 1"
    )
    check(guard.spike_window_steps >= 1, "guard.spike_window_steps", "at least 1")
    check(guard.spike_max_skips >= 1, "guard.spike_max_skips", "at least 1")
    check(guard.save_bad_steps >= 0, "guard.save_bad_steps", "zero (none) or positive")
    check(config.profile.start_step >= 0, "profile.start_step", "zero (none) or positive")
    check(config.profile.steps >= 1, "profile.steps", "at least 1")
    for axis in ("replica", "fsdp", "tensor"):
        size = config.sharding[axis]
        check(
            size == -1 or size > 0, f"sharding.{axis}", "positive, or -1 for all remaining devices"
        )
    check(
        sum(config.sharding[a] == -1 for a in ("replica", "fsdp", "tensor")) <= 1,
        "sharding.fsdp",
        "the only axis with -1",
    )
    folder = config.checkpoint.folder
    check(
        "://" not in folder or re.match("gs://[^/]+/.*[^/]", folder) is not None,
        "checkpoint.folder",
        "a path or gs://BUCKET/FOLDER",
    )
    check(config.checkpoint.every_steps > 0, "checkpoint.every_steps", "positive")
    check(config.checkpoint.keep_last > 0, "checkpoint.keep_last", "at least 1")
    check(
        config.checkpoint.keep_every_steps >= 0,
        "checkpoint.keep_every_steps",
        "zero (off) or positive",
    )
    local = config.checkpoint.local_folder
    check("://" not in local, "checkpoint.local_folder", "a path on each machine's own disk")
    every = config.checkpoint.local_every_steps
    check(every > 0, "checkpoint.local_every_steps", "positive")
    check(config.log.every_steps > 0, "log.every_steps", "positive")
    tracker_names(config.log.trackers)
    check(config.host.gc_every_steps >= 0, "host.gc_every_steps", "zero (at will) or positive")
    for key in ("stuck_minutes", "stuck_pause_minutes"):
        check(config.host[key] >= 0, f"host.{key}", "zero (no limit) or positive")
    check(config.eval_batch >= 1, "eval_batch", "at least 1")
    check(
        config.pictures.every_steps >= 0,
        "pictures.every_steps",
        "zero (only at the start and the end) or positive",
    )
    check(
        1 <= config.pictures.images <= MOST_PICTURES,
        "pictures.images",
        f"between 1 and {MOST_PICTURES}",
    )
    check(config.pictures.candidates >= 2, "pictures.candidates", "at least 2")
    check(config.data.workers >= 0, "data.workers", "zero (threads only) or positive")
    check(config.data.threads > 0, "data.threads", "positive")
    check(config.data.read_ahead > 0, "data.read_ahead", "at least one batch")
    check(config.data.retry_minutes >= 0, "data.retry_minutes", "zero (no second try) or positive")
    stuck = config.host.stuck_minutes
    check(
        stuck == 0 or config.data.retry_minutes < stuck,
        "data.retry_minutes",
        f"less than host.stuck_minutes = {stuck:g}, or that limit ends the run before",
    )
    for key in ("max_lost_shards", "max_damaged_records"):
        check(0 <= config.data[key] <= 1, f"data.{key}", "a share, from 0 to 1")
    check(
        not (config.mixture and config.data.train),
        "data.train",
        "empty, as config.mixture names the records",
    )


def tracker_names(asked: str) -> tuple[str, ...]:
    """Of ``log.trackers``: ``none``, or some of :data:`TRACKERS` with commas between them.

    Raises:
      ConfigError: for another name, and for no name at all.
    """
    names = tuple(name.strip() for name in asked.split(",") if name.strip())
    if names == ("none",):
        return ()
    for name in names or ("",):
        if name not in TRACKERS:
            raise ConfigError(
                f"config.log.trackers = {asked!r}: there is no tracker {name!r}; "
                f"{suggest(name, (*TRACKERS, 'none'))}"
            )
    return tuple(dict.fromkeys(names))


def _validate_lengths(config: ml_collections.ConfigDict) -> None:
    total = total_steps(config)
    parts = {name: steps(config.optim, name, config) for name in ("warmup", "cooldown")}
    for name, length in parts.items():
        if not 0 <= length <= total:
            raise ConfigError(
                f"config.optim.{name} is {length:,} steps: must lie within the run's {total:,} "
                f"steps; shorten it, as by --config.optim.{name}_percent=10, or lengthen the run"
            )
    if sum(parts.values()) > total:
        raise ConfigError(
            f"config.optim.cooldown is {parts['cooldown']:,} steps and the warm-up "
            f"{parts['warmup']:,}: together they must lie within the run's {total:,} steps"
        )
    if parts["cooldown"] and config.optim.lr_schedule != "constant":
        raise ConfigError(
            f"config.optim.cooldown is {parts['cooldown']:,} steps: only "
            "config.optim.lr_schedule = 'constant' has one; a cosine falls by itself"
        )


def _validate_optim(optim: ml_collections.ConfigDict, check: Callable[..., None]) -> None:
    check(optim.lr > 0, "optim.lr", "positive")
    check(optim.lr_batch > 0, "optim.lr_batch", "a positive number of images")
    check(optim.lr_scaling in LR_SCALINGS, "optim.lr_scaling", "linear, sqrt or none")
    check(optim.lr_schedule in LR_SCHEDULES, "optim.lr_schedule", " or ".join(LR_SCHEDULES))
    check(optim.final_lr >= 0, "optim.final_lr", "zero or positive")
    check(optim.weight_decay >= 0, "optim.weight_decay", "zero or positive")
    check(
        optim.final_weight_decay is None
        or _is_number(optim.final_weight_decay)
        and optim.final_weight_decay >= 0,
        "optim.final_weight_decay",
        "zero, positive, or none for that of weight_decay",
    )
    check(0 <= optim.b1 < 1, "optim.b1", "in [0, 1)")
    check(0 <= optim.b2 < 1, "optim.b2", "in [0, 1)")
    check(optim.eps > 0, "optim.eps", "positive")
    check(
        optim.moment_dtype in MOMENT_DTYPES, "optim.moment_dtype", f"{' or '.join(MOMENT_DTYPES)}"
    )
    clips = ("none", "global", "per_module")
    check(optim.clip in clips, "optim.clip", "none, global or per_module")
    check(optim.clip == "none" or optim.clip_norm > 0, "optim.clip_norm", "positive")
    check(
        all(
            isinstance(row, (tuple, list))
            and len(row) == 2
            and _is_regex(row[0])
            and _is_number(row[1])
            and row[1] >= 0
            for row in optim.lr_multipliers
        ),
        "optim.lr_multipliers",
        "rows of (regex, factor from 0 on), as in (('decoder/', 0.1),)",
    )
    check(
        all(map(_is_regex, optim.frozen)),
        "optim.frozen",
        "regular expressions, as in ('encoder/',)",
    )
    check(optim.abort_after_skipped >= 1, "optim.abort_after_skipped", "at least 1")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_regex(value: Any) -> bool:
    try:
        return isinstance(value, str) and re.compile(value) is not None
    except re.error:
        return False


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
