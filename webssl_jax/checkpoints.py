"""Checkpoints: orbax behind a thin wrapper that knows what a run needs.

Layout: ``workdir/checkpoints/STEP/{state,meta}``. ``meta`` holds a checksum of every array,
computed on the device before the save and again after a restore, so a damaged checkpoint is noticed
whatever the storage says, and the one before it is used. What a run starts from, in this order:

1. the newest good checkpoint in its own workdir;
2. ``config.resume_from``: another run's whole state;
3. ``config.init_from``: another run's weights only, or a weight file (``weights/start.py``);
4. scratch.

Progress through the data is not stored: it is step x global batch.

Where ``local_checkpoints.py`` has something newer than 1, that is used. With
``config.checkpoint.folder`` they lie there and not in the workdir. ``gs://BUCKET/FOLDER`` is
written and read by all hosts at once through tensorstore; a checkpoint is valid there when its
``commit_success.txt`` is (orbax), for nothing can be renamed at once.
"""

from __future__ import annotations

import errno
import importlib.util
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import preservation_policy

from webssl_jax import params as paths
from webssl_jax.cli import first_line
from webssl_jax.config import UserError
from webssl_jax.sharding import distributed, replicas
from webssl_jax.train_state import TrainState

_CODES = "PERMISSION_DENIED|UNAUTHENTICATED|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED"
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


def directory(workdir: str | os.PathLike, folder: str = "") -> epath.Path:
    """Where the checkpoints of a run lie. folder: its ``config.checkpoint.folder``.

    Raises:
      UserError: for ``gs://`` without the packages that it takes.
    """
    if not folder.startswith("gs://"):
        # orbax refuses relative paths
        return epath.Path(os.path.abspath(folder or os.path.join(workdir, "checkpoints")))
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(
            f"config.checkpoint.folder = {folder}: needs gcsfs; pip install 'webssl_jax[gcp]'"
        )
    import fsspec

    # Else a process that watches a run never sees a new checkpoint: listings are kept for ever.
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    return epath.Path(folder.rstrip("/"))


class Checkpointer:
    """Saves and restores :class:`TrainState` in :func:`directory`.

    Args:
      workdir: a path that every process sees.
      folder: ``config.checkpoint.folder``.
      keep_last: checkpoints kept besides those of ``keep_every_steps``.
      keep_every_steps: multiples of this are kept for good; 0 = none.
      read_only: for looking into a run that may still be training: nothing is written or cleaned.
      restore_once: the first replica reads and the others get it from there (sharding/replicas.py).
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        *,
        folder: str = "",
        keep_last: int = 2,
        keep_every_steps: int = 0,
        read_only: bool = False,
        restore_once: bool = False,
    ):
        self.directory = directory(workdir, folder)
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

    def newest(self) -> int:
        """Step of the newest complete checkpoint, -1 when there is none."""
        return max(self.steps(), default=-1)

    def save(self, state: TrainState) -> None:
        """Starts an asynchronous save; the arrays may be donated once this returns.

        Raises:
          CheckpointError: if this or the previous save met a full disk.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        with distributed.error_barrier():  # a disk can be full for one host alone
            self._check_space(paths.num_bytes(state))
        sums = {path: int(value) for path, value in jax.device_get(checksums(state)).items()}
        arguments = ocp.args.Composite(
            state=ocp.args.PyTreeSave(state._asdict()),
            meta=ocp.args.JsonSave({"step": step, "checksums": sums}),
        )
        self._guard(lambda: self._manager.save(step, args=arguments))

    def wait(self) -> None:
        """Blocks until the last save is on disk.

        Raises:
          CheckpointError: if it met a full disk.
        """
        self._guard(self._manager.wait_until_finished)

    def check(self) -> None:
        """Raises what a save in the background has met, without waiting for it."""
        self._guard(self._manager.check_for_errors)

    @property
    def _in_bucket(self) -> bool:
        return str(self.directory).startswith("gs://")

    def _check_space(self, wanted: int) -> None:
        if self._in_bucket:
            return
        # Before the first byte is written: a save that fails halfway leaves rubbish on the full
        # disk, and tensorstore prints a traceback for each of its writes.
        free = shutil.disk_usage(self.directory).free
        if free < wanted:
            raise self._full_disk(f"{wanted / 2**20:,.1f} MiB wanted, {free / 2**20:,.1f} MiB free")

    def _guard(self, action) -> None:
        try:
            action()
        except Exception as error:
            if _means_full_disk(error):
                raise self._full_disk(first_line(error)) from error
            trouble = next(
                (cause for cause in _causes(error) if _is_trouble_of_bucket(cause)), None
            )
            if not self._in_bucket or trouble is None:
                raise
            raise CheckpointError(
                f"{self.directory}: a checkpoint could not be written ({first_line(trouble)}); "
                "mend that and start the same command again: it goes on from the last good one"
            ) from error

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
        first = replicas.one_of(abstract, 0) if self._restore_once else None
        try:
            reads = first is None or jax.process_index() in replicas.processes(first)
            state, sums, fields = self._read(step, first or abstract, reads)
        except Exception as error:  # raised below, by all processes alike
            failure = error
        # 0 fine, 1 damaged, 2 anything else. A process that cannot read its part must not leave
        # the others waiting for it.
        verdict = 0 if failure is None else 1 if isinstance(failure, DamagedCheckpoint) else 2
        worst = int(np.max(distributed.gather(verdict)))
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

    def drain(self) -> None:
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
            troubled = "RESOURCE_EXHAUSTED" in text or any(map(_is_trouble_of_bucket, causes))
            if set(codes) <= {None, errno.ENOENT} and not troubled:
                reason = first_line(causes[-1])
                raise DamagedCheckpoint(f"its {what} cannot be read ({reason})") from error
            if patience:
                time.sleep(patience)
                continue
            raise CheckpointError(
                f"the {what} of a checkpoint cannot be read now ({first_line(causes[-1])}); mend "
                "that and start the same command again: nothing was changed"
            ) from error


def _is_trouble_of_bucket(error: BaseException) -> bool:
    """Whether it says that a bucket cannot be reached or may not be used, and not that something
    is missing or broken in it."""
    if isinstance(error, FileNotFoundError):
        return False
    package = type(error).__module__.partition(".")[0]
    return (
        package in ("gcsfs", "google", "aiohttp")
        # Python's own, as gcsfs raises them; tensorstore says its code in a ValueError.
        or isinstance(error, (PermissionError, ConnectionError, TimeoutError))
        or re.match(r"Forbidden|Bad Request", str(error)) is not None
        or re.search(_CODES, str(error)) is not None
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__
