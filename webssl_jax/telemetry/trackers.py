"""Where a run's figures and pictures go besides ``metrics.jsonl``: TensorBoard, Weights & Biases,
MLflow.

``metrics.jsonl`` is complete whatever happens here. TensorBoard writes files and is waited for, as
they are. What may lie behind a network is not: a thread hands its calls over, and what does not
arrive is counted and said (:class:`Detached`).
"""

from __future__ import annotations

import logging
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from webssl_jax.config import TRACKERS, UserError, tracker_names

_MOST_WAITING = 1000  # calls of a tracker that is slower than the run
_PATIENCE = 60.0  # seconds for the last ones, at the end of a run
_PROJECT = "webssl"  # unless the environment says otherwise
_PARAMS = 100  # that MLflow takes in a call, and characters of each
_PARAM_LENGTH = 500
log = logging.getLogger(__name__)


class Tracker(Protocol):
    """Takes what a run reports. Any call may raise."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """{name: value}; values may be NaN or infinite."""

    def text(self, step: int, name: str, text: str) -> None:
        """A text of a step."""

    def pictures(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """{name: (H, W, 3) uint8}."""

    def flush(self) -> None:
        """Returns when what was given is as safe as this tracker makes it before a checkpoint."""

    def close(self) -> None:
        """The last call."""


class RunFacts(NamedTuple):
    """What a tracker is told of a run. id: the same after a resume. step: that it starts or resumes
    from. config: plain JSON types."""

    workdir: Path
    name: str
    id: str
    step: int
    config: Mapping[str, Any]


def open_all(asked: str, facts: RunFacts) -> list[Tracker]:
    """The trackers that ``config.log.trackers`` names, for the one process that writes.

    Raises:
      UserError: for one that is not installed or cannot start.
    """
    opened: list[Tracker] = []
    for name in tracker_names(asked):
        try:
            tracker = _OPEN[name](facts)
        except ImportError as error:
            raise UserError(
                f"config.log.trackers = {asked}: {name} is not installed ({error}); "
                f"pip install 'webssl_jax[{name}]'"
            ) from error
        except UserError:
            raise
        except Exception as error:  # each of these packages has its own
            reason = " ".join(str(error).split())[:300]
            raise UserError(
                f"config.log.trackers = {asked}: {name} cannot start ({reason}); {_CURES[name]}"
            ) from error
        opened.append(tracker)
    return opened


class TensorBoard:
    """Event files in ``WORKDIR/tensorboard``. Those after the step that a run resumes from are
    purged."""

    def __init__(self, facts: RunFacts):
        from tensorboardX import SummaryWriter

        folder = str(facts.workdir / "tensorboard")
        self._board = SummaryWriter(folder, purge_step=facts.step + 1)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            if math.isfinite(value):
                self._board.add_scalar(name, value, step)

    def text(self, step: int, name: str, text: str) -> None:
        self._board.add_text(name, text, step)

    def pictures(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        for name, image in images.items():
            self._board.add_image(name, image, step, dataformats="HWC")

    def flush(self) -> None:
        self._board.flush()

    def close(self) -> None:
        self._board.close()


class WeightsAndBiases:
    """A run of ``WANDB_PROJECT`` (by default ``webssl``), whose id is the workdir's, so that a
    resumed run goes on in it. Rows carry their step as a figure: W&B's own only rises, and a run
    that resumes takes some steps again. ``WANDB_MODE=offline`` keeps it in ``WORKDIR/wandb``."""

    def __init__(self, facts: RunFacts):
        import wandb

        self._image = wandb.Image
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            dir=facts.workdir,
            id=facts.id,
            name=facts.name,
            resume="allow",
            config=dict(facts.config),
            settings=wandb.Settings(console="off", silent=True, x_disable_stats=True),
        )
        self._run.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def text(self, step: int, name: str, text: str) -> None:
        self._run.alert(title=name, text=f"step {step:,}: {text}")

    def pictures(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        made = {name: self._image(image) for name, image in images.items()}
        self._run.log({"step": step, **made})

    def flush(self) -> None:
        """Nothing: W&B has a process of its own that writes."""

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """A run of the experiment ``MLFLOW_EXPERIMENT_NAME`` (by default ``webssl``) at
    ``MLFLOW_TRACKING_URI``, found again by its tag ``webssl.run_id``."""

    def __init__(self, facts: RunFacts):
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            raise UserError(
                "config.log.trackers names mlflow: set MLFLOW_TRACKING_URI, where it is"
            )
        self._metric, self._client = Metric, MlflowClient(uri)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
        experiment = self._client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment else self._client.create_experiment(name)
        known = self._client.search_runs([number], f"tags.`webssl.run_id` = '{facts.id}'")
        if known:
            self._id = known[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            return
        tags = {"webssl.run_id": facts.id}
        self._id = self._client.create_run(number, tags=tags, run_name=facts.name).info.run_id
        rows = [Param(key, str(value)[:_PARAM_LENGTH]) for key, value in _leaves(facts.config)]
        for start in range(0, len(rows), _PARAMS):
            self._client.log_batch(self._id, params=rows[start : start + _PARAMS])

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        now = int(1000 * time.time())
        rows = [self._metric(name, value, now, step) for name, value in values.items()]
        self._client.log_batch(self._id, metrics=rows)

    def text(self, step: int, name: str, text: str) -> None:
        self._client.log_text(self._id, text + "\n", f"{name}_{step:08d}.txt")

    def pictures(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        for name, image in images.items():
            self._client.log_image(self._id, image, key=name, step=step)

    def flush(self) -> None:
        """Nothing: each call is answered by the server."""

    def close(self) -> None:
        self._client.set_terminated(self._id)


class Detached:
    """A tracker that a run never waits for. A thread makes its calls, in order. A call that fails,
    or that comes while too many wait, is lost here: the first is said when it happens, their number
    at the end.

    Args:
      most: calls that wait at most. patience: seconds that :meth:`close` waits for the last.
    """

    def __init__(
        self, name: str, tracker: Tracker, most: int = _MOST_WAITING, patience: float = _PATIENCE
    ):
        self._name, self._tracker, self._patience = name, tracker, patience
        self._calls: queue.Queue[Callable[[], None] | None] = queue.Queue(most)
        self._given = self._arrived = 0
        self._said = False
        # A daemon: what never answers must not keep the process from ending.
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._give(lambda: self._tracker.scalars(step, values))

    def text(self, step: int, name: str, text: str) -> None:
        self._give(lambda: self._tracker.text(step, name, text))

    def pictures(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        self._give(lambda: self._tracker.pictures(step, images))

    def flush(self) -> None:
        """Nothing, because a run does not wait."""

    def close(self) -> None:
        try:
            self._calls.put(None, timeout=self._patience)
        except queue.Full:
            pass
        self._thread.join(self._patience)
        if self._thread.is_alive():
            self._say(f"no answer in {self._patience:.0f} s")
        if lost := self._given - self._arrived:
            log.warning(
                "%s: %d of %d reports did not arrive; metrics.jsonl and pictures/ have them all",
                self._name,
                lost,
                self._given,
            )

    def _give(self, call: Callable[[], None]) -> None:
        self._given += 1
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            self._say(f"{self._calls.maxsize} reports wait for it")

    def _work(self) -> None:
        while call := self._calls.get():
            self._arrived += self._try(call)
        self._try(self._tracker.close)

    def _try(self, call: Callable[[], None]) -> bool:
        try:
            call()
            return True
        except Exception as error:  # each of these packages has its own
            self._say(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
            return False

    def _say(self, reason: str) -> None:
        if not self._said:
            self._said = True
            log.warning("%s: reports are lost (%s); training goes on", self._name, reason)


def _leaves(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """("a.b.c", value) of nested groups."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


_OPEN: dict[str, Callable[[RunFacts], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": lambda facts: Detached("wandb", WeightsAndBiases(facts)),
    "mlflow": lambda facts: Detached("mlflow", MLflow(facts)),
}
_CURES = {
    "tensorboard": "may WORKDIR/tensorboard be written?",
    "wandb": "run `wandb login`, set WANDB_API_KEY, or WANDB_MODE=offline",
    "mlflow": "does MLFLOW_TRACKING_URI name a server that answers?",
}
assert tuple(_OPEN) == TRACKERS
