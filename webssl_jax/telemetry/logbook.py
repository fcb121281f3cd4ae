"""What a training run reports: rows of ``metrics.jsonl``, alarms, the progress line, curves and the
health page."""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from webssl_jax import config as configs
from webssl_jax import workdirs
from webssl_jax.data.pipeline import TrainLoader
from webssl_jax.errors import DivergedError
from webssl_jax.methods.base import Method
from webssl_jax.sharding import distributed
from webssl_jax.sharding import mesh as meshes
from webssl_jax.telemetry import health_page, trackers
from webssl_jax.telemetry.alarms import AlarmMonitor
from webssl_jax.telemetry.goodput import Goodput
from webssl_jax.telemetry.progress import Progress, format_seconds
from webssl_jax.telemetry.throughput import Throughput
from webssl_jax.telemetry.writer import MetricWriter, read_rows
from webssl_jax.visuals import save_png
from webssl_jax.visuals.curves import loss_curves

log = logging.getLogger(__name__)
Row = dict[str, float]
FORECAST_STEPS = 10  # by the pace of which a start says how long it will take


class Logbook:
    """Fetches the figures of steps and writes them. All processes make it and call its methods
    alike; only the first one writes. As a context manager it closes its files.

    Figures are fetched one step late: while the host reads those of a step, the device computes the
    next one.

    Args:
      workdir: gets ``metrics.jsonl``, ``pictures/`` and what trackers keep there.
      start: the step that the run goes on from. Rows of later steps are removed.
    """

    def __init__(
        self,
        config: ConfigDict,
        method: Method,
        mesh: Mesh,
        workdir: Path,
        loader: TrainLoader,
        goodput: Goodput,
        start: int,
    ):
        self._config, self._mesh, self._workdir = config, mesh, workdir
        self._loader, self._goodput = loader, goodput
        self._is_first = jax.process_index() == 0
        self._total_steps = configs.total_steps(config)
        self._alarms = AlarmMonitor(
            method.vitals(config.global_batch), configs.steps(config.optim, "warmup", config)
        )
        with distributed.error_barrier():
            # A fresh run starts before step 0, so that the rows of an earlier run that saved no
            # checkpoint are removed too.
            step, opened = start or -1, []
            if self._is_first:
                known, resolved = workdirs.run_id(workdir), configs.resolved(config)
                facts = trackers.RunFacts(workdir, config.name, known, step, resolved)
                opened = trackers.open_all(config.log.trackers, facts)
            self._writer = MetricWriter(workdir, step=step, enabled=self._is_first, trackers=opened)
            if self._is_first:  # alarms from before the run was stopped are not raised again
                self._alarms.update_all(read_rows(workdir / "metrics.jsonl"))
        self._reference = health_page.stored_reference(config.method.name)
        self._throughput = Throughput(
            config.global_batch,
            method.train_flops(),
            jax.devices()[0].device_kind,
            jax.device_count(),
        )
        stream = sys.stderr if self._is_first else open(os.devnull, "w")
        self._progress = Progress(
            self._total_steps, "train", "steps", stream, done=start, timed=True
        )
        self._note = ""  # of the progress line
        self._pending: tuple[int, dict[str, jax.Array]] | None = None  # still on the device
        self._fetched_step, self._not_finite = start, 0
        self._forecast_due = start + FORECAST_STEPS

    def resume(self) -> None:
        """The loop starts, or goes on after an evaluation: rates count from now."""
        self._throughput.restart(self._loader.wait_seconds)
        self._progress.resume()

    def step_started(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """``step`` was started, so the one before it is done: writes its row, if that is due and
        was not written yet."""
        if self._pending:
            before, _ = self._pending
            if before % self._config.log.every_steps == 0 and before != self._fetched_step:
                self.write(before, self.fetch())
            self._progress.update(1, self._note)
            if before == self._forecast_due:
                self._forecast()
        self._pending = (step, metrics)

    def _forecast(self) -> None:
        """Logs how long the rest will take here, by the first steps of this start and by what an
        evaluation took at step 0."""
        steps, left = self._total_steps - self._progress.done, self._progress.seconds_left
        if not left:
            return
        evaluation = self._goodput.seconds("evaluation")
        besides = f", and about {format_seconds(evaluation)} an evaluation" if evaluation else ""
        message = "at the pace of the first %d steps the other %s take %s%s"
        log.info(message, FORECAST_STEPS, f"{steps:,}", format_seconds(left), besides)

    def write_last(self) -> None:
        """Writes the row of the last step that was started, if that is due, to disk: for a run that
        ends here, against its plan."""
        if self._pending and self._pending[0] % self._config.log.every_steps == 0:
            if self._pending[0] != self._fetched_step:
                self.write(self._pending[0], self.fetch())
        self.flush()

    def fetch(self) -> Row:
        """The figures of the last step that was started, once it is done: what it computed, and the
        rates since the last ``fetch``."""
        assert self._pending is not None
        step, metrics = self._pending
        row = {name: float(value) for name, value in jax.device_get(metrics).items()}
        waited = self._loader.wait_seconds
        row |= self._throughput.report(step - self._fetched_step, waited)
        self._goodput.step_done(step, waited)
        row["perf/goodput"] = self._goodput.fraction()
        by_row = meshes.to_global({"rows": self._loader.damage.by_row}, self._mesh)["rows"]
        substituted = np.asarray(jnp.sum(by_row, 0))  # of all hosts
        row["data/substituted_images"] = float(substituted.sum())
        if mixture := self._loader.mixture:
            seen = mixture.schedule.seen(step * self._config.global_batch) / mixture.counts
            for name, epochs, replaced in zip(mixture.names, seen, substituted, strict=True):
                row[f"data/{name}/epochs"] = float(epochs)
                row[f"data/{name}/substituted_images"] = float(replaced)
        restarts, lost = distributed.gather([self._loader.restarts, self._loader.lost_share]).T
        row["data/loader_restarts"] = float(restarts.sum())
        row["data/lost_shards"] = float(lost.max())  # a share; hosts need not have lost the same
        self._fetched_step = step
        return row

    def write(self, step: int, row: Row) -> None:
        """Writes the row of a training step, and warns of alarms that it raises.

        Raises:
          DivergedError: if too many rows in a row were not finite.
        """
        raised = self._alarms.update({"step": step, **row}) if self._is_first else []
        for episode in raised:
            log.warning("%s", episode.message)
        for episode in self._alarms.episodes:
            if episode.end == step:
                log.info("step %s: over: %s", f"{step:,}", episode.alarm.name)
        row["health/alarms"] = float(len(self._alarms.active))
        with distributed.error_barrier():
            self._writer.scalars(step, row)
            for episode in raised:
                self._writer.text(step, "health/alarm", episode.message)
        self._check_finite(step, row)
        self._note = self._describe(row)

    def write_figures(self, step: int, row: Mapping[str, float]) -> None:
        """Writes a row that is not of a training step."""
        with distributed.error_barrier():
            self._writer.scalars(step, row)

    def _check_finite(self, step: int, row: Row) -> None:
        finite = math.isfinite(row["train/loss"]) and math.isfinite(row["optim/grad_norm"])
        self._not_finite = 0 if finite else self._not_finite + 1
        if self._not_finite >= self._config.optim.abort_after_skipped:
            raise DivergedError(
                f"step {step}: the loss or its gradient was not finite at {self._not_finite} "
                "logged steps in a row; lower config.optim.lr, lengthen the warm-up or clip "
                "gradients; the next start says which checkpoints are from before"
            )

    def _describe(self, row: Row) -> str:
        parts = [
            f"loss {row['train/loss']:.4f}",
            f"{row['perf/images_per_s']:,.0f} images/s",
            f"waiting for data {100 * row['data/wait_fraction']:.0f}%",
        ]
        if "perf/mfu" in row:
            parts.append(f"MFU {100 * row['perf/mfu']:.1f}%")
        if row["train/skipped_steps"]:
            parts.append(f"{row['train/skipped_steps']:.0f} steps skipped")
        parts += [f"ALARM since step {e.start:,}: {e.alarm.name}" for e in self._alarms.active]
        return ", ".join(parts)

    def draw(self, step: int, make: Callable[[], Mapping[str, np.ndarray]]) -> None:
        """Writes pictures of ``step``: {name: (H, W, 3) uint8}. ``make`` is called on the first
        process alone, so it must hold no collectives."""
        with distributed.error_barrier():
            if self._is_first:
                self._writer.pictures(step, make())

    def draw_curves(
        self, levels: Mapping[str, Mapping[str, float]], headlines: Sequence[str]
    ) -> None:
        """Draws ``pictures/curves.png`` and ``pictures/health.png`` from all rows so far.

        levels: {name: figures} to compare with, the ``baselines`` of ``curves.loss_curves``.
        headlines: as there.
        """
        with distributed.error_barrier():
            if self._is_first:
                rows = read_rows(self._workdir / "metrics.jsonl")
                folder, name = self._workdir / "pictures", self._config.name
                loss_curves(rows, folder / "curves.png", levels, headlines=headlines or None)
                page = health_page.page(
                    rows, self._alarms, self._total_steps, name, self._reference
                )
                save_png(folder / "health.png", page)

    def flush(self) -> None:
        """Returns once everything written so far is on disk."""
        with distributed.error_barrier():
            self._writer.flush()

    def close_progress(self, step: int) -> None:
        """Ends the progress line after ``step``."""
        self._progress.done = step
        self._progress.close(self._note)

    def __enter__(self) -> Logbook:
        return self

    def __exit__(self, *unused: object) -> None:
        self._writer.close()
