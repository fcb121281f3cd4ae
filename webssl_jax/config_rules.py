"""What follows from several keys of a config, after its overrides, and what each key must be.

``config.py`` gives on the names that others use.
"""

from __future__ import annotations

import functools
import math
import operator
import re
from collections.abc import Callable, Iterable
from typing import Any

import ml_collections

from webssl_jax.errors import ConfigError, suggest

# The durations that may be given in another unit. All other lengths have one unit, their key's.
DURATIONS = {
    "total": ("steps", "images"),
    "optim.warmup": ("steps", "images", "percent"),
    "optim.cooldown": ("steps", "images", "percent"),
}
LR_SCHEDULES = ("cosine", "constant")
# name -> factor of the peak learning rate, from global_batch / optim.lr_batch
LR_SCALINGS = {"linear": lambda ratio: ratio, "sqrt": math.sqrt, "none": lambda ratio: 1.0}
MOMENT_DTYPES = ("float32", "bfloat16")
MOST_PICTURES = 64
TRACKERS = ("tensorboard", "wandb", "mlflow")  # webssl_jax/telemetry/trackers.py


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


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_regex(value: Any) -> bool:
    try:
        return isinstance(value, str) and re.compile(value) is not None
    except re.error:
        return False


def _is_multiplier(row: Any) -> bool:
    pair = isinstance(row, (tuple, list)) and len(row) == 2
    return pair and _is_regex(row[0]) and _is_number(row[1]) and row[1] >= 0


def _at_least(least: float) -> Callable[[Any], bool]:
    return lambda x: x >= least


def _in(values: Iterable[Any]) -> Callable[[Any], bool]:
    return lambda x: x in values


def _is_axis(size: int) -> bool:
    return size == -1 or size > 0


def _positive(x: float) -> bool:
    return x > 0


_AXES = ("replica", "fsdp", "tensor")
_REMAINING = "positive, or -1 for all remaining devices"
_CLIPS = ("none", "global", "per_module")
# (key, what its value must pass, the same in words)
_RULES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("seed", lambda x: 0 <= x < 2**32, "in [0, 2**32)"),
    ("global_batch", _positive, "a positive number of images"),
    ("accumulation_steps", _at_least(1), "at least 1"),
    ("optim.lr", _positive, "positive"),
    ("optim.lr_batch", _positive, "a positive number of images"),
    ("optim.lr_scaling", _in(LR_SCALINGS), "linear, sqrt or none"),
    ("optim.lr_schedule", _in(LR_SCHEDULES), " or ".join(LR_SCHEDULES)),
    ("optim.final_lr", _at_least(0), "zero or positive"),
    ("optim.weight_decay", _at_least(0), "zero or positive"),
    (
        "optim.final_weight_decay",
        lambda x: x is None or _is_number(x) and x >= 0,
        "zero, positive, or none for that of weight_decay",
    ),
    ("optim.b1", lambda x: 0 <= x < 1, "in [0, 1)"),
    ("optim.b2", lambda x: 0 <= x < 1, "in [0, 1)"),
    ("optim.eps", _positive, "positive"),
    ("optim.moment_dtype", _in(MOMENT_DTYPES), " or ".join(MOMENT_DTYPES)),
    ("optim.clip", _in(_CLIPS), "none, global or per_module"),
    (
        "optim.lr_multipliers",
        lambda rows: all(map(_is_multiplier, rows)),
        "rows of (regex, factor from 0 on), as in (('decoder/', 0.1),)",
    ),
    (
        "optim.frozen",
        lambda rows: all(map(_is_regex, rows)),
        "regular expressions, as in ('encoder/',)",
    ),
    ("optim.abort_after_skipped", _at_least(1), "at least 1"),
    ("guard.spike_factor", lambda x: x == 0 or x > 1, "zero (off) or > 1"),
    ("guard.spike_window_steps", _at_least(1), "at least 1"),
    ("guard.spike_max_skips", _at_least(1), "at least 1"),
    ("guard.save_bad_steps", _at_least(0), "zero (none) or positive"),
    ("profile.start_step", _at_least(0), "zero (none) or positive"),
    ("profile.steps", _at_least(1), "at least 1"),
    *(
        (f"sharding.{axis}", _is_axis, "positive, or -1 for all remaining devices")
        for axis in _AXES
    ),
    (
        "checkpoint.folder",
        lambda x: "://" not in x or re.match("gs://[^/]+/.*[^/]", x) is not None,
        "a path or gs://BUCKET/FOLDER",
    ),
    ("checkpoint.every_steps", _positive, "positive"),
    ("checkpoint.keep_last", _at_least(1), "at least 1"),
    ("checkpoint.keep_every_steps", _at_least(0), "zero (off) or positive"),
    ("checkpoint.local_folder", lambda x: "://" not in x, "a path on each machine's own disk"),
    ("checkpoint.local_every_steps", _positive, "positive"),
    ("log.every_steps", _positive, "positive"),
    ("host.gc_every_steps", _at_least(0), "zero (at will) or positive"),
    ("host.stuck_minutes", _at_least(0), "zero (no limit) or positive"),
    ("host.stuck_pause_minutes", _at_least(0), "zero (no limit) or positive"),
    ("eval_batch", _at_least(1), "at least 1"),
    ("pictures.every_steps", _at_least(0), "zero (only at the start and the end) or positive"),
    ("pictures.images", lambda x: 1 <= x <= MOST_PICTURES, f"between 1 and {MOST_PICTURES}"),
    ("pictures.candidates", _at_least(2), "at least 2"),
    ("data.workers", _at_least(0), "zero (threads only) or positive"),
    ("data.threads", _positive, "positive"),
    ("data.read_ahead", _at_least(1), "at least one batch"),
    ("data.retry_minutes", _at_least(0), "zero (no second try) or positive"),
    ("data.max_lost_shards", lambda x: 0 <= x <= 1, "a share, from 0 to 1"),
    ("data.max_damaged_records", lambda x: 0 <= x <= 1, "a share, from 0 to 1"),
)


def validate(config: ml_collections.ConfigDict) -> None:
    """Checks what can be checked without devices, data or a model.

    Raises:
      ConfigError: naming the key, its value and what it must be.
    """

    def check(ok: bool, key: str, must: str) -> None:
        if not ok:
            raise ConfigError(f"config.{key} = {_value(config, key)!r}: must be {must}")

    for key, value in leaves(config):
        check(not isinstance(value, float) or math.isfinite(value), key, "a finite number")
    for key, passes, must in _RULES:
        check(passes(_value(config, key)), key, must)
    tracker_names(config.log.trackers)
    _validate_starts_and_batches(config, check)
    _validate_lengths(config, check)
    optim, stuck = config.optim, config.host.stuck_minutes
    check(optim.clip == "none" or optim.clip_norm > 0, "optim.clip_norm", "positive")
    rest = sum(config.sharding[axis] == -1 for axis in _AXES)
    check(rest <= 1, "sharding.fsdp", "the only axis with -1")
    check(
        stuck == 0 or config.data.retry_minutes < stuck,
        "data.retry_minutes",
        f"less than host.stuck_minutes = {stuck:g}, or that limit ends the run before",
    )
    check(
        not (config.mixture and config.data.train),
        "data.train",
        "empty, as config.mixture names the records",
    )


def _value(config: ml_collections.ConfigDict, key: str) -> Any:
    return functools.reduce(operator.getitem, key.split("."), config)


def _validate_starts_and_batches(
    config: ml_collections.ConfigDict, check: Callable[[bool, str, str], None]
) -> None:
    starts = (config.resume_from, config.continue_from, config.init_from)
    check(
        sum(map(bool, starts)) < 2,
        "continue_from" if config.continue_from else "resume_from",
        "the only one of resume_from, continue_from and init_from",
    )
    check(
        config.global_batch % config.accumulation_steps == 0,
        "accumulation_steps",
        f"a divisor of global_batch = {config.global_batch}",
    )


def _validate_lengths(
    config: ml_collections.ConfigDict, check: Callable[[bool, str, str], None]
) -> None:
    for stem, units in DURATIONS.items():
        keys = [f"{stem}_{unit}" for unit in units]
        given = [key for key, _ in leaves(config) if key in keys]
        if len(given) != 1:
            raise ConfigError(
                f"config.{stem}: must be given once, as one of {', '.join(keys)}; "
                f"given: {', '.join(given) or 'none'}"
            )
    if total_steps(config) < 1:
        key = "total_steps" if "total_steps" in config else "total_images"
        check(False, key, f"at least one step of global_batch = {config.global_batch} images")
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
