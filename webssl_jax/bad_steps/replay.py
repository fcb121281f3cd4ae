"""Runs a refused step again, alone, from what bad_steps/saving.py saved.

    python -m webssl_jax.train --config ... --workdir RUN --replay STEP
        [--config.model.dtype=float32]

With the same config on the same hardware the figures are those of the run, digit for digit: the
compiled step is the same. Another config (a finer dtype, another mask ratio) shows whether that is
the cause. Nothing in the run's folder changes. With JAX_DEBUG_NANS=1 in the environment, jax stops
at the first operation that makes a NaN and shows the line of code.
"""

from __future__ import annotations

import contextlib
import json
import math
import pathlib
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from webssl_jax import config as configs
from webssl_jax import params as paths
from webssl_jax import train_state
from webssl_jax.bad_steps import saving
from webssl_jax.checkpoints import Checkpointer
from webssl_jax.config import UserError
from webssl_jax.methods.base import Method, Params, Schedule, Variables, kinds_of
from webssl_jax.optim.guard import CAUSES, NOT_FINITE, Guard
from webssl_jax.optim.optimizer import Optimizer
from webssl_jax.sharding import distributed
from webssl_jax.sharding import mesh as meshes
from webssl_jax.train_state import TrainState
from webssl_jax.train_step import (
    Batch,
    Health,
    Metrics,
    jit_train_step,
    make_train_step,
    run_schedules,
    verdict,
)

_LISTED = 5  # images and paths named in the report


def run(config: ConfigDict, method: Method, mesh: Mesh, workdir: pathlib.Path, step: int) -> None:
    """Runs a saved step again and prints a report, on the first process. All processes call it.

    Raises:
      UserError: if ``step`` was not saved, not completely, or does not fit ``config``.
    """
    with distributed.error_barrier():
        method = _kind_of(method, saving.step_folder(workdir, step))
        saved = read(config, method, mesh, workdir, step)
    folder, report, images = saving.step_folder(workdir, step), saved.report, saved.images
    batch = meshes.to_global(saved.views, mesh)
    schedules = run_schedules(config, method)
    state, metrics, health = _take_step(config, method, mesh, folder, report, schedules, batch)
    figures = {name: float(value) for name, value in metrics.items()}
    grad_norms = {path: float(norm) for path, norm in health.grad_norms.items()}

    lines = [
        f"replay of step {step}: {report['cause']} in the run, "
        f"{CAUSES[int(health.cause)] or 'fine'} now"
    ]
    lines += _differences(saved.config, config)
    lines += _table(report["figures"], figures)
    odd, largest = _values(state.params, mesh)
    lines.append(_list("parameters with values that are not finite", odd, len(grad_norms)))
    path = max(largest, key=largest.__getitem__)
    lines.append(f"largest parameter value: {largest[path]:.6g} in {path}")
    bad = saving.not_finite(grad_norms)
    lines.append(_list("gradients that are not finite", bad, len(grad_norms)))
    if not bad:
        lines.append("largest gradients by norm:")
        for path in sorted(grad_norms, key=grad_norms.__getitem__, reverse=True)[:_LISTED]:
            lines.append(f"  {grad_norms[path]:<12.6g} {path}")
    lines += _worst_images(method, state, batch, schedules, mesh, images)
    if jax.process_index() == 0:
        print("\n".join(lines))


class Saved(NamedTuple):
    """The files of a saved step. config: as it was resolved in the run. images: [{row, record,
    ...}] by row. views: {name: this process's rows}."""

    report: dict[str, Any]
    config: dict[str, Any]
    images: list[dict[str, Any]]
    views: dict[str, np.ndarray]


def read(config: ConfigDict, method: Method, mesh: Mesh, workdir: pathlib.Path, step: int) -> Saved:
    """All files of a saved step but its checkpoint. Each process reads the views of its own rows.

    Raises:
      UserError: if ``step`` was not saved, not completely, or does not fit ``config``.
    """
    folder = saving.step_folder(workdir, step)
    if not (folder / "report.json").exists():
        names = [path.parent.name[5:] for path in workdir.glob("bad_steps/step-*/report.json")]
        found = sorted(int(name) for name in names if name.isdecimal())
        have = f"saved are {', '.join(map(str, found))}" if found else "none was saved"
        raise UserError(f"--replay {step}: {workdir}/bad_steps has no such step; {have}")
    with _reading(folder / "report.json"):
        report = saving.read_report(folder)
        size = [report[key] for key in ("step", "cause", "figures", "global_batch")][-1]
    if config.global_batch != size:
        raise UserError(
            f"--replay {step}: config.global_batch = {config.global_batch}, but the saved batch "
            f"has {size} images; give the run's own"
        )
    with _reading(folder / "config.json"):
        before = json.loads((folder / "config.json").read_text())
    return Saved(report, before, *_read_batch(folder, method, mesh, size))


def _kind_of(method: Method, folder: pathlib.Path) -> Method:
    """The method for batches of the saved size, where they come in several (``kinds_of``)."""
    kinds = kinds_of(method)
    for path in sorted(folder.glob("batch-*.npz")) if len(kinds) > 1 else ():
        with _reading(path), np.load(path) as saved:
            shapes = {name: saved[name].shape[1:] for name in saved}
        for kind in kinds:
            if all(shapes.get(k) == x.shape[1:] for k, x in kind.batch_spec(1).items()):
                return kind
    return method


@contextlib.contextmanager
def _reading(path: pathlib.Path) -> Iterator[None]:
    """Turns what a damaged or missing ``path`` raises into a UserError."""
    damage = (OSError, EOFError, LookupError, TypeError, ValueError, zipfile.BadZipFile, zlib.error)
    try:
        yield
    except damage as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read ({reason}); was it copied whole?") from error


def _read_batch(
    folder: pathlib.Path, method: Method, mesh: Mesh, size: int
) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    images: dict[int, dict[str, Any]] = {}
    for path in sorted(folder.glob("images-*.json")):
        with _reading(path):
            images |= {image["row"]: image for image in json.loads(path.read_text())}
    if sorted(images) != list(range(size)):
        raise UserError(f"{folder}: holds {len(images)} of {size} images; was it copied whole?")
    wanted, own = method.batch_spec(size), meshes.local_rows(mesh, size)
    views: dict[str, Any] = {name: [None] * size for name in wanted}
    for path in sorted(folder.glob("batch-*.npz")):
        with _reading(path), np.load(path) as saved:
            for name, spec in wanted.items():
                if name not in saved or saved[name].shape[1:] != spec.shape[1:]:
                    raise UserError(
                        f"{path}: its view {name!r} does not fit this config, which wants "
                        f"{spec.shape[1:]}; give the run's own method.view"
                    )
                array = saved[name]
                for place, row in enumerate(saved["rows"].tolist()):
                    views[name][row] = array[place]
    if any(rows[row] is None for rows in views.values() for row in own):
        raise UserError(f"{folder}: lacks views of some images; was it copied whole?")
    local = {name: np.stack([rows[row] for row in own]) for name, rows in views.items()}
    return [images[row] for row in range(size)], local


def _take_step(
    config: ConfigDict,
    method: Method,
    mesh: Mesh,
    folder: pathlib.Path,
    report: dict[str, Any],
    schedules: Mapping[str, Schedule],
    batch: Batch,
) -> tuple[TrainState, Metrics, Health]:
    """The state the step was computed from, its metrics and its health."""
    optimizer = Optimizer.from_config(config.optim, method.tables())
    template = train_state.abstract(method, optimizer, config.seed, config.global_batch, mesh)
    saved = {name: getattr(template, name) for name in ("params", "teacher", "aux", "rng", "guard")}
    restored = Checkpointer(folder, read_only=True).restore_newest(saved)
    if restored is None:
        raise UserError(f"{folder}: has no checkpoint; was it copied whole?")
    before = verdict(report["step"] - 1, mesh)  # schedules and randomness depend on it
    if report["cause"] == "spike":  # the saved state of the guard has counted it
        restored["guard"]["skips"] = verdict(int(restored["guard"]["skips"]) - 1, mesh)
    moments = jax.jit(
        optimizer.init, out_shardings=jax.tree.map(lambda x: x.sharding, template.opt_state)
    )(restored["params"])

    state = TrainState(step=before, opt_state=moments, skipped=verdict(0, mesh), **restored)
    step = make_train_step(
        method,
        optimizer,
        Guard.from_config(config.guard),
        schedules,
        mesh,
        config.accumulation_steps,
    )
    # The program of the run, with its donation: so it fits where the run fits. Called as after a
    # refused step, it returns the state unchanged. jax_debug_nans needs the inputs afterwards.
    step_fn = jit_train_step(step, template, mesh, donate=not jax.config.values["jax_debug_nans"])
    state, metrics, health = step_fn(state, batch, verdict(NOT_FINITE, mesh))
    return state, *jax.device_get((metrics, health))


def _differences(before: dict[str, Any], config: ConfigDict) -> list[str]:
    was, now = paths.flatten(before), paths.flatten(configs.resolved(config))
    return [
        f"other than in the run: config.{key.replace('/', '.')} = {now.get(key)} (was "
        f"{was.get(key)})"
        for key in sorted(set(was) | set(now))
        if was.get(key) != now.get(key) and not key.startswith("derived/")
    ]


def _table(was: dict[str, float], now: dict[str, float]) -> list[str]:
    names = [n for n in now if n.startswith(("train/", "optim/grad_norm"))]
    names = [n for n in names if n != "train/skipped_steps"]
    same = all(_equal(was.get(name), now[name]) for name in names)
    lines = [f"{'':<34} {'in the run':>16} {'now':>16}"]
    for name in names:
        lines.append(f"{name:<34} {was.get(name, math.nan):>16.9g} {now[name]:>16.9g}")
    lines.append("the same, digit for digit" if same else "not the same digits as in the run")
    return lines


def _equal(a: float | None, b: float) -> bool:
    return a == b or a is not None and math.isnan(a) and math.isnan(b)


def _values(params: Params, mesh: Mesh) -> tuple[list[str], dict[str, float]]:
    """The paths with a value that is not finite, and each path's largest finite one."""

    def figures(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        finite = jnp.isfinite(x)
        return finite.all(), jnp.max(jnp.where(finite, jnp.abs(x), 0))

    look = jax.jit(
        lambda tree: {path: figures(x) for path, x in paths.flatten(tree).items()},
        out_shardings=meshes.replicated(mesh),
    )
    found = jax.device_get(look(params))
    odd = [path for path, (finite, _) in found.items() if not finite]
    return odd, {path: float(largest) for path, (_, largest) in found.items()}


def _list(what: str, names: list[str], total: int) -> str:
    if not names:
        return f"{what}: none of {total}"
    more = f", and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"{what}: {len(names)} of {total}, the first {', '.join(names[:_LISTED])}{more}"


def _worst_images(
    method: Method,
    state: TrainState,
    batch: Batch,
    schedules: Mapping[str, Schedule],
    mesh: Mesh,
    images: list[dict[str, Any]],
) -> list[str]:
    """The images with the highest losses, those that are not finite first."""
    if method.couples_batch:
        return [f"no loss of single images: the loss of {type(method).__name__} couples the batch"]
    losses = np.asarray(_image_losses(method, state, batch, schedules, mesh))
    rank = np.where(np.isfinite(losses), losses, np.inf)
    worst = np.argsort(-rank, kind="stable")[:_LISTED]
    lines = [
        f"losses of single images: median {np.median(rank):.6g}, "
        f"{int((~np.isfinite(losses)).sum())} of {len(losses)} not finite; the highest:"
    ]
    for row in worst:
        image = images[row]
        lines.append(
            f"  {losses[row]:<12.6g} row {row}, {image['shard']}, key {image['key']}"
            + (" (damaged, another stood in)" if image["substituted"] else "")
        )
    return lines


def _image_losses(
    method: Method, state: TrainState, batch: Batch, schedules: Mapping[str, Schedule], mesh: Mesh
) -> jax.Array:
    """(B,) float32. Each image gets the mask that it had in the step, by its row in the batch."""

    def losses(variables: Variables, rng: jax.Array, step: jax.Array, batch: Batch) -> jax.Array:
        key = jax.random.fold_in(jax.random.wrap_key_data(rng), step)
        values = {name: schedule(step) for name, schedule in schedules.items()}
        rows = jax.tree.leaves(batch)[0].shape[0]
        batch = {**batch, "position": jnp.arange(rows, dtype=jnp.int32)}

        def one(row: Batch) -> jax.Array:
            single = jax.tree.map(lambda x: x[None], row)
            return method.loss(*variables, single, key, values).loss

        return jax.vmap(one)(batch)

    jitted = jax.jit(losses, out_shardings=meshes.replicated(mesh))
    return jitted(state.variables, state.rng, state.step, batch)
