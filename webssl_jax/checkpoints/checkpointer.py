"""Durable checkpoints: orbax behind a thin wrapper that checks every byte.

Layout: ``workdir/checkpoints/STEP/{state,meta}``, or in ``config.checkpoint.folder`` instead of the
workdir. ``meta`` holds a checksum of every array. It is computed on the device before the save, and
again after a restore. So a damaged checkpoint is noticed whatever the storage reports, and the one
before it is used. Progress through the data is not stored: it is step x global batch.

After a blow-up all steps may be refused, while saving goes on. So ``meta`` also says whether the
run was sound (``trouble`` of optim/guard.py), and checkpoints from before the trouble stay until
newer sound ones take their places.

All hosts write to ``gs://BUCKET/FOLDER`` and read from it at once, through tensorstore. A
checkpoint in a bucket is complete when its ``commit_success.txt`` exists (orbax), because a bucket
cannot rename a folder in one operation.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import preservation_policy

from webssl_jax import params as paths
from webssl_jax.checkpoints.errors import (
    CheckpointError,
    DamagedCheckpoint,
    StorageError,
    is_full_disk,
    is_storage_failure,
    read_with_retry,
    reason_of,
)
from webssl_jax.cli import first_line
from webssl_jax.config import UserError
from webssl_jax.sharding import distributed, replicas

log = logging.getLogger(__name__)
# orbax, through absl, warns of every manager that only reads; here that is what was asked for.
logging.getLogger("absl").addFilter(
    lambda record: not str(record.msg).startswith("Given directory is read only")
)


class _LatestSound(preservation_policy.PreservationPolicy):
    """Keeps the newest checkpoint, and the newest ``n`` that are not ``unsound``; while there are
    fewer of these, unsound ones fill their places."""

    def __init__(self, n: int, unsound: set[int]):
        self._n, self._unsound = n, unsound

    def should_preserve(
        self, checkpoints: Sequence[Any], *, context: preservation_policy.PreservationContext
    ) -> list[bool]:
        steps = [int(checkpoint.step) for checkpoint in checkpoints]
        ranked = sorted(steps, key=lambda step: (step not in self._unsound, step))
        kept = {*ranked[-self._n :], *steps[-1:]}
        return [step in kept for step in steps]


@jax.jit
def checksums(tree: Any) -> dict[str, jax.Array]:
    """{path: uint32}: the sum of each array's words, each times an odd number given by its index,
    modulo 2^32.

    Integer sums do not depend on the order, so a checksum is the same on every mesh. A change of
    any single word changes it.
    """

    def checksum(x: jax.Array) -> jax.Array:
        width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
        bits = jax.lax.bitcast_convert_type(x, width).astype(jnp.uint32)
        index = jnp.arange(x.size, dtype=jnp.uint32).reshape(x.shape)
        return jnp.sum(bits * (2 * index + 1), dtype=jnp.uint32)

    return {path: checksum(x) for path, x in paths.flatten(tree).items()}


def directory(workdir: str | os.PathLike, folder: str = "") -> epath.Path:
    """Where the checkpoints of a run lie.

    Args:
      folder: ``config.checkpoint.folder``.

    Raises:
      UserError: for a name in which orbax would not find what it has written, and for ``gs://``
        without the packages it needs.
    """
    where = folder or os.path.join(workdir, "checkpoints")
    if not folder.startswith("gs://"):
        where = os.path.abspath(where)  # orbax refuses relative paths
    if odd := sorted(set(where) & set("*?[")):
        raise UserError(
            f"{where}: has {' '.join(odd)} in its name, which orbax takes for a pattern: it could "
            "not read the checkpoints that it saves there; take another name"
        )
    if not folder.startswith("gs://"):
        return epath.Path(where)
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(
            f"config.checkpoint.folder = {folder}: needs gcsfs; pip install 'webssl_jax[gcp]'"
        )
    import fsspec

    # With cached listings a process that follows a run would never see a new checkpoint.
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    return epath.Path(folder.rstrip("/"))


class Saved(Protocol):
    """What can be saved: a NamedTuple of trees of arrays, as ``TrainState`` is one.

    step: () int32. sound: whether it may be relied on; see :class:`Checkpointer`.
    """

    @property
    def step(self) -> jax.Array: ...

    @property
    def sound(self) -> bool: ...

    def _asdict(self) -> dict[str, Any]: ...


class Checkpointer:
    """Saves and restores states, those of runs above all, in :func:`directory`. All processes make
    it and call its methods alike.

    Args:
      workdir: a path that every process sees.
      folder: ``config.checkpoint.folder``.
      keep_last: how many of the newest checkpoints of a sound run are kept. The newest of all is
        kept besides.
      keep_every_steps: multiples of this are kept for good; 0 = none.
      read_only: nothing is written or cleaned up: for a run that may still be training.
      restore_once: the first replica reads and sends to the others (sharding/replicas.py).
      run: the run's id (``workdirs.run_id``). A checkpoint that says another one is refused:
        somebody has copied it here. One that says none is taken.
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
        run: str = "",
    ):
        self.directory = directory(workdir, folder)
        self._read_only, self._restore_once, self._run = read_only, restore_once, run
        self._unsound: set[int] = set()
        policies: list[preservation_policy.PreservationPolicy]
        policies = [_LatestSound(keep_last, self._unsound)]
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
                save_interval_steps=0 if read_only else 1,
                read_only=read_only,
                cleanup_tmp_directories=not read_only,
                enable_async_checkpointing=True,
            ),
        )
        if not read_only:
            self._find_unsound(keep_last)

    def _find_unsound(self, wanted: int) -> None:
        """Looks until as many sound ones are found: those before them are not kept anyway."""
        for step in reversed(self.steps()):
            try:
                meta = ocp.JsonCheckpointHandler().restore(self.directory / str(step) / "meta")
                sound = meta["sound"]
            except Exception:  # whatever is wrong with it, it is none to rely on
                sound = False
            if not sound:
                self._unsound.add(step)
            elif (wanted := wanted - 1) == 0:
                break

    def steps(self) -> list[int]:
        """Complete checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    def newest(self) -> int:
        """Step of the newest complete checkpoint, -1 when there is none."""
        return max(self.steps(), default=-1)

    def save(self, state: Saved) -> None:
        """Starts an asynchronous save; the arrays may be donated once this returns.

        Raises:
          CheckpointError: if this or the previous save met a full disk.
          StorageError: if one met another failure of the storage.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        with distributed.error_barrier():  # the disk of a single host may be full
            self._guard(lambda: self._check_space(paths.num_bytes(state)))
        sums = {path: int(value) for path, value in jax.device_get(checksums(state)).items()}
        if not state.sound:
            self._keep_those_before(step)
        meta = {"step": step, "checksums": sums, "sound": state.sound, "run": self._run}
        arguments = ocp.args.Composite(
            state=ocp.args.PyTreeSave(state._asdict()), meta=ocp.args.JsonSave(meta)
        )
        self._guard(lambda: self._manager.save(step, args=arguments))

    def _keep_those_before(self, step: int) -> None:
        if not self._unsound and (before := self._sound()):
            log.warning(
                "step %d: steps were refused lately; the checkpoints of before (%s) are kept until "
                "the run has been sound for a while (config.guard.spike_window_steps)",
                step,
                before,
            )
        self._unsound.add(step)

    def _sound(self) -> str:
        """The steps of the checkpoints that were saved while the run was sound, for messages."""
        return ", ".join(str(step) for step in self.steps() if step not in self._unsound)

    def wait(self) -> None:
        """Blocks until the last save is on disk.

        Raises:
          CheckpointError, StorageError: as :meth:`save`.
        """
        self._guard(self._manager.wait_until_finished)

    def check(self) -> None:
        """Raises the error of a save in the background, if it has failed by now. Does not wait."""
        self._guard(self._manager.check_for_errors)

    @property
    def _in_bucket(self) -> bool:
        return str(self.directory).startswith("gs://")

    def _check_space(self, wanted: int) -> None:
        if self._in_bucket:
            return
        # Before the first byte is written: a save that fails halfway leaves incomplete files on the
        # full disk, and tensorstore prints a traceback for each of its writes.
        self.directory.mkdir(exist_ok=True)  # somebody may have removed it
        free = shutil.disk_usage(self.directory).free
        if free < wanted:
            raise self._full_disk(f"{wanted / 2**20:,.1f} MiB wanted, {free / 2**20:,.1f} MiB free")

    def _guard(self, action: Callable[[], Any]) -> None:
        """Runs ``action``. What a storage fails with becomes a :class:`CheckpointError`."""
        try:
            action()
        except CheckpointError:
            raise
        except Exception as error:
            if is_full_disk(error):
                raise self._full_disk(first_line(error)) from error
            if not is_storage_failure(error, self._in_bucket):
                raise
            raise StorageError(
                f"{self.directory}: a checkpoint could not be written ({reason_of(error)}); "
                f"{self._good()}; mend that and start the same command again"
            ) from error

    def _full_disk(self, detail: str) -> CheckpointError:
        return CheckpointError(
            f"{self.directory}: no space left for a checkpoint ({detail}); {self._good()}; free "
            "some space and start the same command again"
        )

    def _good(self) -> str:
        try:
            steps = [int(p.name) for p in self.directory.iterdir() if p.name.isdigit()]
        except Exception:  # each of the packages behind gs:// has its own
            return "no other one can be seen now"
        return f"the last good one is of step {max(steps)}" if steps else "there is no earlier one"

    def restore_newest(self, abstract: dict[str, Any]) -> dict[str, Any] | None:
        """The newest good checkpoint; None when there is no checkpoint.

        One that cannot be read or fails its checksums is skipped, with one line in the log.

        Args:
          abstract: {field: tree of ShapeDtypeStruct with shardings}. Fields left out
            are not read.

        Raises:
          CheckpointError: if there are checkpoints but none is good, or one does not fit
            ``abstract`` or is another run's.
        """
        damaged: dict[int, DamagedCheckpoint] = {}
        for step in reversed(self.steps()):
            try:
                state = self.restore(step, abstract)
            except DamagedCheckpoint as damage:
                damaged[step] = damage
                continue
            for bad, why in damaged.items():
                log.warning("passing over the checkpoint of step %d: %s", bad, why)
                self._set_aside(bad)
            if step in self._unsound and (sound := self._sound()):
                log.warning(
                    "the checkpoint of step %d was saved while steps were refused; to go back to "
                    "one from before (%s), end the run and delete the newer ones in %s",
                    step,
                    sound,
                    self.directory,
                )
            return state
        if damaged:  # none is set aside: where all of them fail, the cause may lie elsewhere
            step, why = next(iter(damaged.items()))
            raise CheckpointError(
                f"{self.directory}: none of {len(damaged)} checkpoint(s) can be used; that of step "
                f"{step}: {why}; start in a new workdir, or restore one from a backup"
            )
        return None

    def _set_aside(self, step: int) -> None:
        """Renames a damaged checkpoint: the run will save this step again. It is not deleted, so
        that its damage can be examined."""
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
        """One checkpoint; see :meth:`restore_newest`. It succeeds on all processes, or raises on
        all of them.

        Raises:
          DamagedCheckpoint: if its bytes are not what was saved.
          CheckpointError: if it was made by a config of other shapes, or by another run.
          StorageError: if the storage failed.
        """
        state, failure = None, None
        sums: dict[str, int] = {}
        first = replicas.one_of(abstract, 0) if self._restore_once else None
        try:
            reads = first is None or jax.process_index() in replicas.processes(first)
            state, sums = self._read(step, first or abstract, reads)
        except Exception as error:  # raised below, by all processes alike
            failure = error
        # 0: read, 1: damaged, 2: any other failure. A process that cannot read its part must not
        # leave the others waiting for it.
        status = 0 if failure is None else 1 if isinstance(failure, DamagedCheckpoint) else 2
        worst = int(np.max(distributed.gather(status)))
        if failure is not None and status == worst:
            raise failure
        if worst:
            kind = DamagedCheckpoint if worst == 1 else StorageError
            raise kind("another process cannot read its part; its own line says why")
        if first is not None:
            state = replicas.broadcast(state, abstract)
        assert state is not None  # without ``first`` every process has read it
        for path, value in jax.device_get(checksums(state)).items():
            if int(value) != sums.get(path):
                raise DamagedCheckpoint(f"{path} does not have the checksum it was saved with")
        return state

    def _read(
        self, step: int, abstract: dict[str, Any], reads: bool
    ) -> tuple[dict[str, Any] | None, dict[str, int]]:
        """This process's part of a checkpoint (None without ``reads``), and the checksums of the
        whole. No collectives."""
        folder, handler = self.directory / str(step), ocp.PyTreeCheckpointHandler()
        meta = read_with_retry("meta", lambda: ocp.JsonCheckpointHandler().restore(folder / "meta"))
        self._check_owner(folder, meta.get("run", ""))
        saved = read_with_retry(
            "description", lambda: paths.flatten(handler.metadata(folder / "state").tree)
        )
        saved = {path: x for path, x in saved.items() if path.split("/")[0] in abstract}
        self._check_fit(step, saved, paths.flatten(abstract))
        if not reads:
            return None, meta["checksums"]
        arguments = ocp.args.PyTreeRestore(
            item=abstract,
            restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
            partial_restore=True,
        )
        state = read_with_retry("arrays", lambda: handler.restore(folder / "state", args=arguments))
        return state, meta["checksums"]

    def _check_owner(self, folder: epath.Path, run: str) -> None:
        if self._run and run and run != self._run:
            raise CheckpointError(
                f"{folder}: was saved by another run ({run}; this one is {self._run}, by the file "
                "run_id of its workdir); move it away, or go on from that run in a workdir of its "
                "own, with --config.resume_from"
            )

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
        """For a run that ends with an error: waits for the save in the background. If the process
        ended during it, its threads would print tracebacks, and a checkpoint would be lost.

        With several processes it does nothing: the save waits for the others, which may be gone.
        """
        if jax.process_count() > 1:
            return
        try:
            self.wait()
        except Exception as error:  # not raised: the run already ends with an error
            log.warning("the checkpoint under way was not saved: %s", error)

    def close(self) -> None:
        """Waits for the last save and closes the folder."""
        self.wait()
        self._manager.close()
