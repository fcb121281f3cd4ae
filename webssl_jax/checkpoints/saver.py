"""Both kinds of checkpoints, as the training loop uses them: what a run starts from, saving, and
the end of a run.

A run starts from the first of these that exists:

1. the newest good checkpoint of its own workdir; a local one, if that is newer;
2. ``config.resume_from``: the whole state of another run;
3. ``config.continue_from``: the state of another run, under another config of its method;
4. ``config.init_from``: weights only, of another run or of weight files (weights/init_from.py);
5. scratch.

From 3 on, networks that the method takes from elsewhere are filled in (``initial.py``).
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from webssl_jax import runs, train_state, workdirs
from webssl_jax.checkpoints import initial
from webssl_jax.checkpoints.checkpointer import Checkpointer
from webssl_jax.checkpoints.local import LocalCheckpoints
from webssl_jax.config import UserError
from webssl_jax.errors import DivergedError
from webssl_jax.methods.base import Method, is_later_stage
from webssl_jax.optim.optimizer import Optimizer
from webssl_jax.sharding import distributed
from webssl_jax.train_state import TrainState
from webssl_jax.weights.init_from import from_weights

log = logging.getLogger(__name__)


class Saver:
    """Restores and saves the state of a training run. All processes make it and call its methods
    alike. As a context manager it lets a save in the background finish when the run fails.

    Args:
      workdir: a folder that every process sees; this run holds its lock.
      template: the abstract state: shapes, dtypes and shardings.

    Raises:
      UserError: if ``config`` cannot continue the run of ``workdir``, or cannot save to
        ``config.checkpoint.folder``.
    """

    def __init__(self, config: ConfigDict, workdir: Path, template: TrainState):
        self._config, self._template = config, template._asdict()
        options = config.checkpoint
        with distributed.error_barrier():
            known = workdirs.run_id(workdir) if jax.process_index() == 0 else ""  # writes it
        run = distributed.from_first(known)
        self._local = None
        if options.local_folder:
            self._local = LocalCheckpoints(options.local_folder, run, self._template)
        with distributed.error_barrier():
            saved_locally = bool(self._local and self._local.steps())
            runs.refuse_another(workdir, config, "--workdir", saved_locally)
            if options.folder and jax.process_index() == 0:
                workdirs.claim_folder(workdir, options.folder)
        self._durable = Checkpointer(
            workdir,
            folder=options.folder,
            keep_last=options.keep_last,
            keep_every_steps=options.keep_every_steps,
            restore_once=options.restore_once,
            run=run,
        )

    @property
    def directory(self) -> str:
        """Where the durable checkpoints lie."""
        return str(self._durable.directory)

    @property
    def has_local(self) -> bool:
        """Whether the run makes local checkpoints."""
        return self._local is not None

    def restore(self, method: Method, optimizer: Optimizer, mesh: jax.sharding.Mesh) -> TrainState:
        """The state that the run starts from; see the top of this file.

        Raises:
          UserError: if what the config names does not exist or does not fit, or no checkpoint of
            the workdir is good.
        """
        found = None
        if self._local:
            found = self._local.restore_newest(self._durable.newest())
        if found is None:
            found = self._durable.restore_newest(self._template)
        if found is None and self._config.resume_from:
            found = self._resume_from(self._config.resume_from)
        if found is not None:
            return TrainState(**found)
        state = self._begin(method, optimizer, mesh)
        return initial.filled(state, method, mesh)

    def _begin(self, method: Method, optimizer: Optimizer, mesh: jax.sharding.Mesh) -> TrainState:
        """A state that no run of this config has been in."""
        config = self._config
        if config.continue_from:
            return self._continue_from(config.continue_from, method)
        state = train_state.create(method, optimizer, config.seed, config.global_batch, mesh)
        if not config.init_from:
            if is_later_stage(method):
                log.warning(
                    "a later stage of %s begins from scratch, as if it were the first: to go on "
                    "with a run of the stage before, give config.continue_from=RUN",
                    config.method.name,
                )
            return state
        if not self._of_this_method(config.init_from):
            trees = {"params": state.params, "teacher": state.teacher}
            open_run = functools.partial(runs.open_encoder, mesh=mesh)
            return state._replace(**from_weights(config.init_from, method, trees, open_run))
        wanted = {name: self._template[name] for name in ("params", "teacher")}
        return state._replace(**runs.weights_of_run(config.init_from, wanted, method.encoder))

    def _of_this_method(self, path: str) -> bool:
        return workdirs.is_run(path) and (
            runs.read_config(path).method.name == self._config.method.name
        )

    def _resume_from(self, workdir: str) -> dict[str, Any]:
        with distributed.error_barrier():
            runs.refuse_another(Path(workdir), self._config, "config.resume_from")
        other = runs.checkpointer(workdir, restore_once=self._config.checkpoint.restore_once)
        found = other.restore_newest(self._template)
        if found is None:
            raise UserError(f"config.resume_from = {workdir}: has no checkpoint")
        log.info("continuing the run of %s at step %d", workdir, int(found["step"]))
        return found

    def _continue_from(self, workdir: str, method: Method) -> TrainState:
        """Everything but ``aux``, which is of the method's own making and begins fresh."""
        wanted = {name: x for name, x in self._template.items() if name != "aux"}
        other = runs.checkpointer(workdir, restore_once=self._config.checkpoint.restore_once)
        found = other.restore_newest(wanted)
        if found is None:
            raise UserError(f"config.continue_from = {workdir}: has no checkpoint")
        log.info("a new stage after step %d of %s", int(found["step"]), workdir)
        config = self._config
        aux = train_state.create_aux(
            method, config.seed, config.global_batch, self._template["aux"]
        )
        return TrainState(**found, aux=aux)

    def save(self, state: TrainState, durable: bool = True) -> None:
        """Starts a save; the arrays may be donated once this returns.

        Args:
          durable: False for a local checkpoint; only where the run ``has_local``.

        Raises:
          CheckpointError, StorageError: if this or the previous save failed. Where that was a local
            one, ``state`` is saved durably before.
        """
        if durable:
            self._durable.save(state)
        elif self._local:
            try:
                self._local.save(state, after=self._durable.newest())
            except UserError:  # on all processes
                self._durable.save(state)
                self._durable.wait()
                raise

    def check(self) -> None:
        """Raises the error of a save in the background, if it has failed by now. Does not wait."""
        self._durable.check()

    def wait(self) -> None:
        """Blocks until the last durable checkpoint is on disk."""
        self._durable.wait()

    @contextlib.contextmanager
    def saved_on_error(self, state: TrainState) -> Iterator[None]:
        """If what is done within it fails, ``state`` is saved before the error is raised: an
        evaluation, or a row that cannot be written, costs no training.

        It is not saved when the run has diverged, nor where only some of several processes have
        failed: the others would not take part.
        """
        try:
            yield
        except DivergedError:
            raise
        except Exception as error:
            if distributed.is_raised_on_all(error):
                self._durable.save(state)
                self._durable.wait()
                log.warning("saved at step %d, because of the error that follows", state.step)
            raise

    def close(self) -> None:
        """For a run that ends well: waits for the last save, and deletes the local checkpoints."""
        self._durable.close()
        if self._local:
            self._local.discard()

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *unused: object) -> None:
        if kind is not None:
            self._durable.drain()
            if self._local:
                self._local.drain()
