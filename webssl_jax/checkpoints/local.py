"""Checkpoints on the machines' own disks: fast enough to be made often, and lost with the machine.

Many failures leave the machines intact: an error, a hang, a killed process. With
``config.checkpoint.local_folder`` every process writes its own part of the state to its own disk,
every ``local_every_steps``, without any shared storage. A run that starts again goes on from there
if that is newer than the newest durable checkpoint (checkpointer.py). Only the durable ones survive
the machines; the local ones save steps.

Layout: ``FOLDER/RUN_ID/process_I/STEP.npz``. It has one member for each shard of an array on this
process's devices, named after array, type and index ranges. So a local checkpoint fits the same
mesh only. The replicas of a slice share the arrays among them, and each slice has all arrays
(``replicas.shared_out``): machines that lost their files get the state from any complete slice.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import json
import logging
import math
import os
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from webssl_jax import params as paths
from webssl_jax.checkpoints.checkpointer import checksums
from webssl_jax.checkpoints.errors import CheckpointError, StorageError, is_full_disk
from webssl_jax.cli import first_line
from webssl_jax.sharding import distributed, replicas
from webssl_jax.train_state import TrainState

_META = "meta"
_KEPT = 2  # the newest, and the one before it while the newest is written
log = logging.getLogger(__name__)


class LocalCheckpoints:
    """Saves and restores this process's part of a :class:`TrainState`. All processes make it and
    call its methods alike; only ``steps`` and ``wait`` are no collectives.

    Args:
      folder: ``config.checkpoint.local_folder``, on a disk of this machine.
      run_id: of ``workdirs.run_id``: other runs may use the same folder.
      abstract: {field of TrainState: tree of ShapeDtypeStruct with shardings}.
    """

    def __init__(self, folder: str | os.PathLike, run_id: str, abstract: dict[str, Any]):
        self._abstract, self._copies = abstract, replicas.shared_out(abstract)
        self._run = pathlib.Path(folder) / run_id
        self.directory = self._run / f"process_{jax.process_index()}"
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "local-checkpoint")
        self._writing: concurrent.futures.Future | None = None
        self._last = -1  # step of what was restored or begun to be written
        with distributed.error_barrier():
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
                for part in self.directory.glob("*.part"):  # of a process that was killed
                    part.unlink()
            except OSError as error:
                raise self._error("cannot be made", error) from error

    def steps(self) -> list[int]:
        """Complete ones of this process, newest first."""
        found = [int(p.stem) for p in self.directory.glob("*.npz") if p.stem.isdigit()]
        return sorted(found, reverse=True)

    def save(self, state: TrainState, after: int) -> None:
        """Copies this process's part to host memory and starts to write it. The arrays may be
        donated once this returns.

        Args:
          after: step of the newest durable checkpoint, -1 for none. If a user deletes that one to
            go back further, this local one is not used either.

        Raises:
          CheckpointError: on all processes, if the disk of one is full, or was at the last save.
        """
        step = int(state.step)
        with distributed.error_barrier():
            self.wait()
            # The last one is complete on all machines now: those before it are not needed.
            self._delete(lambda other: other != self._last)
            self._check_space()
        sums = {path: int(value) for path, value in jax.device_get(checksums(state)).items()}
        arrays = paths.flatten(state._asdict())
        here = {
            (path, shard.device): shard.data
            for path, array in arrays.items()
            for shard in array.addressable_shards
        }
        pieces = {name: here[path, device] for path, _, device, name in self._mine}
        for piece in pieces.values():
            piece.copy_to_host_async()
        # A copy: on CPU np.asarray is a view of the buffer, which the next step overwrites.
        words = {name: np.array(_words(np.asarray(piece))) for name, piece in pieces.items()}
        meta = {"step": step, "after": after, "checksums": sums}
        words[_META] = np.frombuffer(json.dumps(meta).encode(), np.uint8)
        self._last = step
        self._writing = self._pool.submit(self._write, step, words)

    def wait(self) -> None:
        """Blocks until the last save of this process is on disk.

        Raises:
          CheckpointError: if it could not be written.
        """
        writing, self._writing = self._writing, None
        try:
            if writing:
                writing.result()
        except OSError as error:
            raise self._error("a local checkpoint could not be written", error) from error

    def drain(self) -> None:
        """For a run that ends with an error: waits for the save in the background."""
        try:
            self.wait()
        except CheckpointError as error:  # not raised: the run already ends with an error
            log.warning("%s", error)

    def restore_newest(self, newer_than: int) -> dict[str, Any] | None:
        """The newest complete state, laid out as ``abstract``; None if there is none newer than
        ``newer_than``, the step of the newest durable checkpoint (-1 for none).

        Damaged or incomplete ones are skipped, with one line in the log. Ones of later steps are
        deleted: the run will save those steps again.
        """
        mine = [step for step in self.steps() if self._is_usable(step, newer_than)][:_KEPT]
        offered = distributed.gather([*mine, *[-1] * (_KEPT - len(mine))])
        state, found = None, newer_than
        for step in sorted(set(offered.flat) - {-1}, reverse=True):
            holders = {process for process, steps in enumerate(offered) if step in steps}
            complete = [copy for copy in self._copies if replicas.processes(copy) <= holders]
            if complete:
                state, reason = self._restore(step, complete[0])
            else:
                left = ", ".join(map(str, sorted(holders)))
                reason = f"only process {left} of {jax.process_count()} still holds it"
            if state is not None:
                log.info("going on from the local checkpoint of step %d in %s", step, self._run)
                self._last = found = step
                break
            log.warning("passing over the local checkpoint of step %d: %s", step, reason)
        with distributed.error_barrier():
            self._delete(lambda other: other > found)
        return state

    def discard(self) -> None:
        """Deletes all of this process, also the one being written: a newer durable checkpoint
        exists."""
        with distributed.error_barrier():
            self.wait()
            shutil.rmtree(self.directory)
            with contextlib.suppress(OSError):  # not empty: other processes of this machine
                self._run.rmdir()
        self._pool.shutdown()

    def _is_usable(self, step: int, newer_than: int) -> bool:
        """Whether the file of ``step`` can be used: it is newer, belongs to the run's present
        checkpoints, and has all shards of this process."""
        if step <= newer_than:
            return False
        try:
            with np.load(self._path(step)) as file:
                names, after = set(file.files), _meta(file)["after"]
        except Exception as error:  # damage raises many types; a run does not stop for it
            log.warning("passing over %s: %s", self._path(step), first_line(error))
            return False
        if after > newer_than:
            log.warning(
                "passing over the local checkpoint of step %d: the checkpoint of step %d, which "
                "was there when it was made, is gone",
                step,
                after,
            )
            return False
        missing = {name for _, _, _, name in self._mine} - names
        if missing:
            log.warning(
                "passing over the local checkpoint of step %d: it was made on another mesh or by "
                "another config (%d pieces are missing, such as %s)",
                step,
                len(missing),
                min(missing),
            )
        return not missing

    def _restore(self, step: int, copy: dict[str, Any]) -> tuple[dict[str, Any] | None, str]:
        """(the state, "") from one of the copies, or (None, why not); the same on all processes."""
        state, reason = None, ""
        sums: dict[str, int] = {}
        if jax.process_index() in replicas.processes(copy):
            try:
                state, sums = self._read(step, copy)
            except Exception as error:  # as in _is_usable
                reason = f"{self._path(step)}: {first_line(error)}"
        if distributed.gather(bool(reason)).any():
            return None, reason or "another process cannot read its part; its own line says why"
        if copy is not self._abstract:
            state = replicas.broadcast(state, self._abstract)
        found = jax.device_get(checksums(state))
        wrong = [path for path, value in sums.items() if value != int(found[path])]
        if distributed.gather(bool(wrong)).any():
            return None, f"{min(wrong, default='an array')} does not have the checksum it had"
        return state, ""

    def _read(self, step: int, copy: dict[str, Any]) -> tuple[dict[str, Any], dict[str, int]]:
        """This process's part of a copy (None for arrays of which it holds no shard), and the
        checksums."""
        with np.load(self._path(step)) as file:

            def array(path: str, leaf: jax.ShapeDtypeStruct) -> jax.Array | None:
                names = _pieces(path, leaf)
                read = {name: file[name].view(leaf.dtype) for name in set(names.values())}
                pieces = [jax.device_put(read[name], device) for device, name in names.items()]
                if not pieces:
                    return None
                return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, pieces)

            return paths.map_with_path(array, copy), _meta(file)["checksums"]

    @functools.cached_property
    def _mine(self) -> list[tuple[str, jax.ShapeDtypeStruct, jax.Device, str]]:
        """(path, array, device, name) of each shard that this process writes. A shard that several
        of its devices hold is listed for each."""
        return [
            (path, leaf, device, name)
            for copy in self._copies
            for path, leaf in paths.flatten(copy).items()
            for device, name in _pieces(path, leaf).items()
        ]

    def _write(self, step: int, words: dict[str, np.ndarray]) -> None:
        part = self.directory / f"{step}.part"
        with open(part, "wb") as file:
            np.savez(file, allow_pickle=False, **words)
        part.rename(self._path(step))  # complete, or not there

    def _check_space(self) -> None:
        sizes = {
            name: math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for _, leaf, _, name in self._mine
        }
        wanted = sum(sizes.values())
        free = shutil.disk_usage(self.directory).free
        if free < wanted:
            raise CheckpointError(
                f"config.checkpoint.local_folder: {self.directory}: {wanted / 2**20:,.1f} MiB "
                f"wanted, {free / 2**20:,.1f} MiB free; free some space, name another folder or "
                "leave it empty, and start the same command again"
            )

    def _delete(self, which: Callable[[int], bool]) -> None:
        for step in self.steps():
            if which(step):
                self._path(step).unlink()

    def _path(self, step: int) -> pathlib.Path:
        return self.directory / f"{step}.npz"

    def _error(self, what: str, error: OSError) -> CheckpointError:
        kind = CheckpointError if is_full_disk(error) else StorageError
        return kind(
            f"config.checkpoint.local_folder: {self.directory}: {what} ({first_line(error)})"
        )


def _pieces(path: str, leaf: jax.ShapeDtypeStruct) -> dict[jax.Device, str]:
    """{device of this process: name of the shard of the array that it holds}, such as
    ``params/encoder/norm/scale float32 0:64``."""
    names = {}
    for device, index in leaf.sharding.addressable_devices_indices_map(leaf.shape).items():
        ranges = [slice_.indices(size) for slice_, size in zip(index, leaf.shape)]
        place = ",".join(f"{start}:{stop}" for start, stop, _ in ranges)
        names[device] = f"{path} {leaf.dtype} {place}"
    return names


def _words(array: np.ndarray) -> np.ndarray:
    """Its bits as unsigned integers: numpy's files do not know bfloat16."""
    return array.view(f"u{array.dtype.itemsize}")


def _meta(file: Mapping[str, np.ndarray]) -> dict[str, Any]:
    return json.loads(file[_META].tobytes())
