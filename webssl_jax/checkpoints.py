"""Checkpoints: orbax behind a thin wrapper that knows what a run needs.

Layout: ``workdir/checkpoints/STEP/{state,meta}``. ``meta`` holds a checksum of every array,
computed on the device before the save and again after a restore, so a damaged checkpoint is noticed
whatever the storage says, and the one before it is used. What a run starts from, in this order:

1. the newest good checkpoint in its own workdir;
2. ``config.resume_from``: another run's whole state;
3. ``config.init_from``: another run's weights only, or a weight file (``weights/start.py``);
4. scratch.

Progress through the data is not stored: it is step x global batch.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import ConfigDict
from orbax.checkpoint.checkpoint_managers import preservation_policy

from webssl_jax import params as paths
from webssl_jax.config import UserError, from_resolved
from webssl_jax.methods.base import Method, Variables
from webssl_jax.models import position
from webssl_jax.models.sizes import ViTConfig
from webssl_jax.sharding import distributed, replicas
from webssl_jax.train_state import TrainState

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
log = logging.getLogger(__name__)


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged or could not be written."""


@jax.jit
def checksums(tree: Any) -> dict[str, jax.Array]:
    """{path: uint32}: the bits of each array, weighted by odd numbers that depend on their place,
    modulo 2^32.

    Integer sums do not depend on the order, so the value is the same on every mesh, and any single
    changed word changes it.
    """

    def checksum(x):
        width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
        bits = jax.lax.bitcast_convert_type(x, width).astype(jnp.uint32)
        place = jnp.arange(x.size, dtype=jnp.uint32).reshape(x.shape)
        return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)

    return {path: checksum(x) for path, x in paths.flatten(tree).items()}


class DamagedCheckpoint(CheckpointError):
    """A checkpoint whose bytes are not what was saved."""


class Checkpointer:
    """Saves and restores :class:`TrainState` in ``workdir/checkpoints``.

    Args:
      workdir: a path that every process sees.
      keep_last: checkpoints kept besides those of ``keep_every_steps``.
      keep_every_steps: multiples of this are kept for good; 0 = none.
      read_only: for looking into a run that may still be training: nothing is written or cleaned.
      restore_once: the first replica reads and the others get it from there (sharding/replicas.py).
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        *,
        keep_last: int = 2,
        keep_every_steps: int = 0,
        read_only: bool = False,
        restore_once: bool = False,
    ):
        # orbax refuses relative paths
        self.directory = epath.Path(os.path.abspath(workdir)) / "checkpoints"
        self._read_only, self._restore_once = read_only, restore_once
        policies = [preservation_policy.LatestN(keep_last)]
        if keep_every_steps:
            policies.append(preservation_policy.EveryNSteps(keep_every_steps))
        self._manager = ocp.CheckpointManager(
            self.directory,
            item_handlers={
                "state": ocp.PyTreeCheckpointHandler(),
                "meta": ocp.JsonCheckpointHandler(),
            },
            options=ocp.CheckpointManagerOptions(
                preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
                create=not read_only,
                read_only=read_only,
                cleanup_tmp_directories=not read_only,
                enable_async_checkpointing=True,
            ),
        )

    def steps(self) -> list[int]:
        """Complete checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState) -> None:
        """Starts an asynchronous save; the arrays may be donated once this returns.

        Raises:
          CheckpointError: if this or the previous save met a full disk.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        with distributed.together():  # a disk can be full for one host alone
            self._check_space(paths.num_bytes(state))
        sums = {path: int(value) for path, value in jax.device_get(checksums(state)).items()}
        arguments = ocp.args.Composite(
            state=ocp.args.PyTreeSave(state._asdict()),
            meta=ocp.args.JsonSave({"step": step, "checksums": sums}),
        )
        self._guard_full_disk(lambda: self._manager.save(step, args=arguments))

    def wait(self) -> None:
        """Blocks until the last save is on disk.

        Raises:
          CheckpointError: if it met a full disk.
        """
        self._guard_full_disk(self._manager.wait_until_finished)

    def check(self) -> None:
        """Raises what a save in the background has met, without waiting for it."""
        self._guard_full_disk(self._manager.check_for_errors)

    def _check_space(self, wanted: int) -> None:
        # Before the first byte is written: a save that fails halfway leaves rubbish on the full
        # disk, and tensorstore prints a traceback for each of its writes.
        free = shutil.disk_usage(self.directory).free
        if free < wanted:
            raise self._full_disk(f"{wanted / 2**20:,.1f} MiB wanted, {free / 2**20:,.1f} MiB free")

    def _guard_full_disk(self, action) -> None:
        try:
            action()
        except Exception as error:
            if not _means_full_disk(error):
                raise
            raise self._full_disk(_first_line(error)) from error

    def _full_disk(self, detail: str) -> CheckpointError:
        steps = [int(p.name) for p in self.directory.iterdir() if p.name.isdigit()]
        good = f"the last good one is of step {max(steps)}" if steps else "there is no earlier one"
        return CheckpointError(
            f"{self.directory}: no space left for a checkpoint ({detail}); {good}; free some space "
            "and start the same command again"
        )

    def restore_newest(self, abstract: dict[str, Any]) -> dict[str, Any] | None:
        """The newest good checkpoint; None when there is none.

        A checkpoint that cannot be read or fails its checksums is passed over with one line in the
        log.

        Args:
          abstract: {field of TrainState: tree of ShapeDtypeStruct with shardings}. Fields left out
            are not read.

        Raises:
          CheckpointError: if there are checkpoints but none is good, or one does not fit
            ``abstract``.
        """
        damaged: dict[int, DamagedCheckpoint] = {}
        for step in reversed(self.steps()):
            try:
                state = self.restore(step, abstract)
            except DamagedCheckpoint as damage:
                damaged[step] = damage
                continue
            for bad, damage in damaged.items():
                log.warning("passing over the checkpoint of step %d: %s", bad, damage)
                self._set_aside(bad)
            return state
        if damaged:  # nothing is set aside: if all of them fail, the fault may lie elsewhere
            step, damage = next(iter(damaged.items()))
            raise CheckpointError(
                f"{self.directory}: none of {len(damaged)} checkpoint(s) can be used; that of step "
                f"{step}: {damage}; start in a new workdir, or restore one from a backup"
            )
        return None

    def _set_aside(self, step: int) -> None:
        # Not deleted: the run will write this step again, and someone may want to look.
        if self._read_only:
            return
        if jax.process_index() == 0:
            target = self.directory / f"damaged-{step}"
            if target.exists():
                target.rmtree()
            (self.directory / str(step)).rename(target)
        multihost_utils.sync_global_devices(f"set aside {step}")
        self._manager.reload()

    def restore(self, step: int, abstract: dict[str, Any]) -> dict[str, Any]:
        """One checkpoint; see :meth:`restore_newest`. Every process decides the same.

        Raises:
          DamagedCheckpoint: if its bytes are not what was saved.
          CheckpointError: if it was made by a config of other shapes, or the storage failed.
        """
        state, sums, failure = None, {}, None
        first = replicas.first_of(abstract) if self._restore_once else None
        try:
            reads = first is None or replicas.reads(abstract)
            state, sums, fields = self._read(step, first or abstract, reads)
        except Exception as error:  # raised below, by all processes alike
            failure = error
        # 0 fine, 1 damaged, 2 anything else. A process that cannot read its part must not leave
        # the others waiting for it.
        verdict = 0 if failure is None else 1 if isinstance(failure, DamagedCheckpoint) else 2
        worst = int(np.max(multihost_utils.process_allgather(np.asarray(verdict))))
        if failure is not None and verdict == worst:
            raise failure
        if worst:
            kind = DamagedCheckpoint if worst == 1 else CheckpointError
            raise kind("another process cannot read its part; its own line says why")
        if first is not None:
            state = replicas.spread(state, {name: abstract[name] for name in fields})
        for path, value in jax.device_get(checksums(state)).items():
            if int(value) != sums.get(path):
                raise DamagedCheckpoint(f"{path} does not have the checksum it was saved with")
        return state

    def _read(
        self, step: int, abstract: dict[str, Any], reads: bool
    ) -> tuple[dict[str, Any] | None, dict[str, int], list[str]]:
        """This process's part of a checkpoint (None without ``reads``), the checksums of the whole
        and which fields it has. No barriers."""
        folder, handler = self.directory / str(step), ocp.PyTreeCheckpointHandler()
        meta = _reading(
            "meta",
            lambda: ocp.JsonCheckpointHandler().restore(folder / "meta", ocp.args.JsonRestore()),
        )
        saved = _reading(
            "description", lambda: paths.flatten(handler.metadata(folder / "state").tree)
        )
        saved = {path: x for path, x in saved.items() if path.split("/")[0] in abstract}
        if not any(path.startswith("guard/") for path in saved):  # from before that field
            abstract = {name: tree for name, tree in abstract.items() if name != "guard"}
        self._check_fit(step, saved, paths.flatten(abstract))
        if not reads:
            return None, meta["checksums"], list(abstract)
        arguments = ocp.args.PyTreeRestore(
            item=abstract,
            restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
            partial_restore=True,
        )
        state = _reading("arrays", lambda: handler.restore(folder / "state", args=arguments))
        return state, meta["checksums"], list(abstract)

    def _check_fit(self, step: int, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
        where = self.directory / str(step)
        advice = "use the run's own config or another --workdir"
        odd = sorted(set(saved) ^ set(wanted))
        if odd:
            raise CheckpointError(
                f"{where}: does not fit this config: {len(odd)} arrays are in one and not in the "
                f"other, such as {odd[0]}; {advice}"
            )
        for path, leaf in wanted.items():
            before, now = tuple(saved[path].shape), tuple(leaf.shape)
            if before != now:
                raise CheckpointError(
                    f"{where}: {path} has shape {before}, this config makes {now}; {advice}"
                )
            if jnp.dtype(saved[path].dtype) != leaf.dtype:
                raise CheckpointError(
                    f"{where}: {path} is {saved[path].dtype}, this config makes {leaf.dtype}; "
                    f"{advice}"
                )

    def settle(self) -> None:
        """For a run that ends with an error: lets the save in the background come to its end. Cut
        off, its threads would print tracebacks of their own, and a checkpoint would be lost.

        With several processes it does nothing: the others may be gone, and the save waits for them.
        """
        if jax.process_count() > 1:
            return
        try:
            self.wait()
        except Exception as error:  # the run has an error to tell already
            log.warning("the checkpoint under way was not saved: %s", error)

    def close(self) -> None:
        """Waits for the last save and lets go of the folder."""
        self.wait()
        self._manager.close()


def _means_full_disk(error: BaseException) -> bool:
    text = str(error)
    return (
        isinstance(error, OSError)
        and error.errno in _FULL
        or any(os.strerror(code) in text for code in _FULL)
        or error.__cause__ is not None
        and _means_full_disk(error.__cause__)
    )


def _reading(what: str, action):
    """Runs ``action``, once more after a pause if the storage fails, and tells damage (another
    checkpoint may serve) from trouble (none will, so nothing must be set aside)."""
    for patience in (1.0, 0.0):
        try:
            return action()
        except Exception as error:
            causes = list(_causes(error))
            if any(isinstance(cause, (MemoryError, TypeError, NameError)) for cause in causes):
                raise  # ours, or the machine's
            text = " ".join(map(str, causes))
            # tensorstore says everything in a ValueError, with the kernel's code in its text.
            code = re.search(r"os_error_code='(\d+)'", text)
            codes = [int(code[1])] if code else [getattr(cause, "errno", None) for cause in causes]
            if set(codes) <= {None, errno.ENOENT} and "RESOURCE_EXHAUSTED" not in text:
                reason = _first_line(causes[-1])
                raise DamagedCheckpoint(f"its {what} cannot be read ({reason})") from error
            if patience:
                time.sleep(patience)
                continue
            raise CheckpointError(
                f"the {what} of a checkpoint cannot be read now ({_first_line(causes[-1])}); mend "
                "that and start the same command again: nothing was changed"
            ) from error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]


class WorkdirLock:
    """Refuses a second run in the same workdir. The kernel drops the lock when the process dies,
    however it dies."""

    def __init__(self, workdir: str | os.PathLike):
        path = Path(workdir) / ".lock"
        self._file = open(path, "a+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            holder = self._file.read().strip() or "unknown"
            raise UserError(
                f"{workdir}: another run (process {holder}) is using this workdir; stop it or "
                "choose another --workdir"
            ) from None
        self._file.truncate(0)
        self._file.write(f"{os.getpid()}\n")
        self._file.flush()

    def release(self) -> None:
        """Lets another run in."""
        self._file.close()


def weights_of_run(workdir: str, abstract: dict[str, Any], encoder: ViTConfig) -> dict[str, Any]:
    """The newest good weights of another run, for ``config.init_from``. Learned positions of
    another grid are resized to that of ``encoder``; all else must have the shapes of ``abstract``,
    {"params": ..., "teacher": ...}.

    Raises:
      UserError: if there is no such run or checkpoint, or it does not fit.
    """
    from webssl_jax import methods

    theirs = methods.create(read_config(workdir)).encoder
    old, new, mode = theirs.grid, encoder.grid, encoder.position_resize
    resized = old != new and "pos_embed" in abstract["params"]["encoder"]

    def stored(path: str, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        shape = (1, theirs.num_positions, theirs.width)
        return leaf.update(shape=shape) if path.endswith("encoder/pos_embed") else leaf

    def fitted(path: str, leaf: jax.Array) -> jax.Array:
        if not path.endswith("encoder/pos_embed"):
            return leaf
        resize = jax.jit(
            lambda table: position.resize_table(table, old, new, mode), out_shardings=leaf.sharding
        )
        return resize(leaf)

    if resized:
        abstract = paths.map_with_path(stored, abstract)
    weights = Checkpointer(workdir, read_only=True).restore_newest(abstract)
    if weights is None:
        raise UserError(f"config.init_from = {workdir}: has no checkpoint")
    how = "positions resized from {}x{} to {}x{} patches ({})".format(*old, *new, mode)
    log.info("starting from the weights of %s%s", workdir, f"; {how}" if resized else "")
    return paths.map_with_path(fitted, weights) if resized else weights


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained run, loaded for evaluation or export; ``variables`` as laid out by ``load_run``."""

    workdir: str
    config: ConfigDict
    step: int
    method: Method
    variables: Variables


def read_config(workdir: str | os.PathLike) -> ConfigDict:
    """The resolved config that a run wrote at its start.

    Raises:
      UserError: if ``workdir`` is not a run.
    """
    path = epath.Path(workdir) / "config.json"
    if not path.exists():
        raise UserError(f"{workdir}: is not a run: it has no config.json")
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: its JSON cannot be read ({error})") from None
    # exported weights have a config.json too
    groups = ("method", "model", "optim")
    if not isinstance(values, dict) or not all(isinstance(values.get(g), dict) for g in groups):
        raise UserError(f"{workdir}: is not a run: its config.json is another program's")
    try:
        return from_resolved(values)
    except ValueError as error:
        raise UserError(f"{path}: is not the config of a run ({error})") from None


def load_run(
    workdir: str | os.PathLike, step: int | None = None, mesh: jax.sharding.Mesh | None = None
) -> Run:
    """Loads the variables of a run's checkpoint (the newest good one unless ``step`` says
    otherwise).

    Args:
      mesh: where to lay them; one device when None.

    Raises:
      UserError: if there is no such run or checkpoint.
    """
    from webssl_jax import methods
    from webssl_jax.optim.optimizer import Optimizer
    from webssl_jax.sharding import mesh as meshes
    from webssl_jax.train_state import abstract

    config = read_config(workdir)
    method = methods.create(config)
    if mesh is None:
        mesh = meshes.create(
            ConfigDict({"replica": 1, "fsdp": 1, "tensor": 1}), jax.local_devices()[:1]
        )
    optimizer = Optimizer.from_config(config.optim, method.tables())
    template = abstract(method, optimizer, config.seed, config.global_batch, mesh)._asdict()
    template = {name: template[name] for name in ("step", "params", "teacher", "aux")}
    checkpointer = Checkpointer(workdir, read_only=True)
    if not checkpointer.steps():
        raise CheckpointError(f"{workdir}: has no checkpoint yet")
    if step is None:
        state = checkpointer.restore_newest(template)
    elif step in checkpointer.steps():
        state = checkpointer.restore(step, template)
    else:
        raise CheckpointError(
            f"{workdir}: has no checkpoint of step {step}; there are "
            f"{', '.join(map(str, checkpointer.steps()))}"
        )
    checkpointer.close()
    variables = Variables(state["params"], state["teacher"], state["aux"])
    return Run(os.fspath(workdir), config, int(state["step"]), method, variables)
