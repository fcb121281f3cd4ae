"""The loop of training, with everything around it replaced: what is saved when something fails."""

import contextlib
import errno
import os
import types
from typing import NamedTuple

import pytest
from ml_collections import ConfigDict

from webssl_jax import train
from webssl_jax.checkpoints.saver import Saver
from webssl_jax.config import UserError
from webssl_jax.errors import DivergedError
from webssl_jax.evaluators import suite

CONFIG = ConfigDict({"total_steps": 9, "log": {"every_steps": 3}, "checkpoint": {"every_steps": 6}})
CONFIG.checkpoint.local_every_steps = 0


class State(NamedTuple):
    step: int
    variables: None = None


class Recorder(Saver):
    """Notes the steps that are saved."""

    def __init__(self):
        self.saved, self._local = [], None
        self._durable = types.SimpleNamespace(
            save=lambda state: self.saved.append(state.step), wait=lambda: None, check=lambda: None
        )


class Logbook:
    """Notes the rows that are written. ``fails``: {name of a method: (step, error)}."""

    def __init__(self, **fails):
        self.rows, self._fails, self._step = {}, fails, 0

    def _fail(self, name):
        step, error = self._fails.get(name, (None, None))
        if self._step == step:
            raise error

    def step_started(self, step, metrics):
        self._step = step
        self._fail("step_started")

    def fetch(self):
        return {"train/loss": 1.0}

    def write(self, step, row):
        self._fail("write")
        self.rows[step] = row

    def flush(self):
        self._fail("flush")

    def resume(self):
        pass


class Evaluations:
    def due(self, step):
        return step == 4

    def draws(self, step):
        return False

    def run(self, step, variables, logbook):
        return {"eval/a/top1": 0.5}, suite.failure({}, {"b": UserError("no use")})


def loop(logbook):
    """The steps that are saved by a run that fails, and its error."""
    saver, nothing = Recorder(), types.SimpleNamespace(step_started=lambda *a, **k: None)
    session = types.SimpleNamespace(
        watchdog=nothing,
        stop_requested=lambda step: "",
        pause=lambda kind: contextlib.nullcontext(),
    )
    take = type("Step", (), {"finish_last": lambda self, state: False})
    take.__call__ = lambda self, step, state, batch: (State(step), {})
    with pytest.raises(Exception) as caught:
        train._loop(
            CONFIG,
            State(0),
            iter(range(9)),
            take(),
            session,
            saver,
            logbook,
            nothing,
            Evaluations(),
        )
    return saver.saved, caught.value


def test_a_failed_evaluation_costs_neither_the_state_nor_what_the_others_found():
    logbook = Logbook()
    saved, error = loop(logbook)
    assert saved == [4] and str(error) == "b: no use"
    assert logbook.rows[4] == {"train/loss": 1.0, "eval/a/top1": 0.5}


@pytest.mark.parametrize("fails, step", [("step_started", 2), ("write", 4)])
def test_a_row_that_cannot_be_written_costs_no_state(fails, step):
    """As where the workdir's disk fails and ``config.checkpoint.folder`` is elsewhere."""
    refused = OSError(errno.EROFS, os.strerror(errno.EROFS))
    saved, error = loop(Logbook(**{fails: (step, refused)}))
    assert saved == [step] and error is refused


def test_a_run_that_has_diverged_saves_nothing_more():
    assert loop(Logbook(step_started=(2, DivergedError("nan"))))[0] == []
