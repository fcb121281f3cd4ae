"""Saves a step that the guard refused (optim/guard.py), so completely that it can be run again.

It is named in the log and saved in ``workdir/bad_steps/step-XXXXXXXX/``:

    report.json           step, batch, seed, cause, every figure of the step, what was not finite
    config.json           the resolved config
    images-00000.json     each image of this process's rows: row, record, shard, key
    batch-00000.npz       the views as they were fed, by name, and their rows
    views_NAME.png        what they look like (process 0's first rows)
    checkpoints/STEP/     the parameters, teacher and auxiliary state the step was computed from

bad_steps/replay.py runs it again. The loss and every gradient are functions of these parts alone,
so the optimiser's moments are not saved.
"""

from __future__ import annotations

import json
import logging
import math
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from webssl_jax import config as configs
from webssl_jax.checkpoints import Checkpointer
from webssl_jax.config import UserError
from webssl_jax.data import pipeline, records
from webssl_jax.data.pipeline import DAMAGE, Source, TrainLoader
from webssl_jax.files import write_json
from webssl_jax.methods import distortions
from webssl_jax.optim.guard import CAUSES, FINE
from webssl_jax.sharding import distributed
from webssl_jax.sharding import mesh as meshes
from webssl_jax.train_state import TrainState
from webssl_jax.train_step import Batch, Health, Metrics, Step, verdict
from webssl_jax.visuals import image_grid, save_png

Refused = Callable[[int, TrainState, Metrics, Health], None]
_PICTURED = 64  # images of a saved batch
log = logging.getLogger(__name__)


class GuardedStep:
    """Calls the compiled step, one step after the other, and ``on_refused`` for one that the guard
    refused. It reads each verdict one call late, so that the device never waits for the host.

    Args:
      step_fn: ``(state, batch, previous) -> (state, metrics, health)``; see ``make_train_step``.
      on_refused: called with (step, state, metrics, health). The state's variables are those that
        the step was computed from.
    """

    def __init__(self, step_fn: Step, mesh: Mesh, on_refused: Refused):
        self._step_fn, self._on_refused = step_fn, on_refused
        self._fine = verdict(FINE, mesh)
        self._last: tuple[int, Metrics, Health] | None = None

    def __call__(self, step: int, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """Starts ``step``; returns once the one before it is complete."""
        previous = self._last[2].cause if self._last else self._fine
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            state, metrics, health = self._step_fn(state, batch, previous)
        if self.finish_last(state):
            # The call above had the verdict as input, and so changed nothing.
            state, metrics, health = self._step_fn(state, batch, self._fine)
        self._last = (step, metrics, health)
        return state, metrics

    def finish_last(self, state: TrainState) -> bool:
        """Waits until the last step is complete. If it was refused, calls ``on_refused``, once for
        each step, and returns True."""
        if self._last is None:
            return False
        last, self._last = self._last, None
        jax.block_until_ready(last[1])
        if int(last[2].cause) == FINE:
            return False
        step, metrics, health = last
        self._on_refused(step, state, metrics, health)
        return True


class BadSteps:
    """Saves refused steps, at most ``limit`` in a workdir. All processes make and call it alike."""

    def __init__(
        self,
        workdir: pathlib.Path,
        config: ConfigDict,
        mesh: Mesh,
        source: Source,
        loader: TrainLoader,
        limit: int,
    ):
        self._root = workdir / "bad_steps"
        self._config, self._mesh, self._limit = config, mesh, limit
        self._source, self._loader = source, loader
        self._saved = {path.parent.name for path in self._root.glob("step-*/report.json")}
        self._is_first = jax.process_index() == 0

    def __call__(self, step: int, state: TrainState, metrics: Metrics, health: Health) -> None:
        """Names the step in the log and saves it.

        Args:
          state: after the refused step, so with the variables from before it.
        """
        report = self._report(step, state, metrics, health)
        folder = step_folder(self._root.parent, step)
        what = f"step {step}: {_why(report)}; it changed nothing"
        # The first process decides: others may still see an older listing of the shared folder.
        known, count = multihost_utils.broadcast_one_to_all(
            np.asarray([folder.name in self._saved, len(self._saved)], np.int32)
        )
        if known:
            log.warning("%s; saved before in %s", what, folder)
            return
        if count >= self._limit:
            log.warning("%s; not saved (config.guard.save_bad_steps)", what)
            return
        self._saved.add(folder.name)
        try:  # a run must not end because its diagnosis failed
            for action in (self._clear, self._save_batch):
                with distributed.error_barrier():
                    action(step, folder)
            checkpointer = Checkpointer(folder)
            checkpointer.save(state._replace(opt_state={}))
            checkpointer.close()
            if self._is_first:
                write_json(folder / "config.json", configs.resolved(self._config))
                write_json(folder / "report.json", report)  # written last: now all is there
        except (UserError, OSError) as error:
            log.warning("%s; it could not be saved: %s", what, error)
            return
        log.warning("%s; saved in %s; the same command with --replay %d", what, folder, step)

    def _report(
        self, step: int, state: TrainState, metrics: Metrics, health: Health
    ) -> dict[str, Any]:
        metrics, health, memory = jax.device_get((metrics, health, state.guard))
        figures = {name: float(value) for name, value in metrics.items()}
        grad_norms = {path: float(norm) for path, norm in health.grad_norms.items()}
        return {
            "step": step,
            "batch": step - 1,
            "seed": self._config.seed,
            "global_batch": self._config.global_batch,
            "cause": CAUSES[int(health.cause)],
            "not_finite": {"figures": not_finite(figures), "gradients": not_finite(grad_norms)},
            "mean_grad_norm": math.exp(float(memory["log_norm"])),
            "figures": figures,
            "grad_norms": grad_norms,
        }

    def _clear(self, step: int, folder: pathlib.Path) -> None:
        # From a run that ended during the save: its checkpoint may hold other parameters.
        if self._is_first and folder.exists():
            shutil.rmtree(folder)

    def _save_batch(self, step: int, folder: pathlib.Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        batch = self._loader.batch_at(step - 1)  # a pure function of the step: made again
        rows = meshes.local_rows(self._mesh, self._config.global_batch)
        number = f"{jax.process_index():05d}"
        np.savez(folder / f"batch-{number}.npz", allow_pickle=False, rows=rows, **batch)
        indices = [int(index) for index in batch["record"]]
        images = [
            {
                "row": int(row),
                "record": index,
                "shard": self._source.describe(index),
                "key": self._key(index),
                "substituted": bool(substituted),
            }
            for row, index, substituted in zip(rows, indices, batch["substituted"], strict=True)
        ]
        write_json(folder / f"images-{number}.json", images)
        if self._is_first:
            for name, views in batch.items():
                if views.dtype == np.uint8 and views.ndim >= 4 and views.shape[-1] == 3:
                    picture = _sheet(batch, name, indices)
                    save_png(folder / f"views_{name}.png", picture)

    def _key(self, index: int) -> str | None:
        try:
            return records.decode(self._source[index]).key
        except DAMAGE:
            return None


def step_folder(workdir: pathlib.Path, step: int) -> pathlib.Path:
    """The folder of a refused step."""
    return workdir / "bad_steps" / f"step-{step:08d}"


def read_report(folder: pathlib.Path) -> dict[str, Any]:
    """The report of a saved step."""
    return json.loads((folder / "report.json").read_text())


def not_finite(values: dict[str, float]) -> list[str]:
    """The names of those that are NaN or infinite."""
    return [name for name, value in values.items() if not math.isfinite(value)]


def _why(report: dict[str, Any]) -> str:
    figures = report["figures"]
    if report["cause"] == "spike":
        norm, mean = figures["optim/grad_norm"], report["mean_grad_norm"]
        return f"a spike: the gradient's norm is {norm:.4g}, {norm / mean:.1f} times its mean"
    odd = report["not_finite"]["gradients"]
    first = f", the first {odd[0]}" if odd else ""
    return (
        f"not finite: the loss is {figures['train/loss']:.4g}, "
        f"{len(odd)} of {len(report['grad_norms'])} gradients are not finite{first}"
    )


def _sheet(batch: pipeline.Batch, name: str, captions: list[int]) -> np.ndarray:
    """A row's views side by side, as many rows as ``_PICTURED`` images allow."""
    count, *between, height, width, _ = batch[name].shape
    each = math.prod(between)
    rows = max(min(count, _PICTURED // each), 1)
    names = [str(record) for record in captions[:rows] for _ in range(each)]
    views = distortions.seen({key: array[:rows] for key, array in batch.items()}, name)
    images = np.asarray(views).reshape(-1, height, width, 3)
    return image_grid(images, each if each > 1 else 8, names)
