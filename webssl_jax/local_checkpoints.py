"""Checkpoints on the machines' own disks: cheap enough to be made often, and gone with the machine.

Many failures leave the machines as they were: an error, a hang, a killed process. With
``config.checkpoint.local_folder`` every process writes its own part of the state there every
``local_every_steps``, with no storage in the way, and the run goes on from there when that is newer
than the newest checkpoint of ``checkpoints.py``. Those stay what a run rests on; these only save
steps.

Layout: ``FOLDER/RUN_ID/process_I/STEP.npz``, one member for each piece of an array that this
process's devices hold, named after array, type and place. So they serve the same mesh alone. The
replicas of a slice share the arrays out among them, and each slice has all of them
(``replicas.shared_out``): machines that lost theirs get the state from any slice that is complete.
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
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from webssl_jax import params as paths
from webssl_jax import runs
from webssl_jax.checkpoints import CheckpointError, checksums
from webssl_jax.cli import first_line
from webssl_jax.sharding import distributed, replicas
from webssl_jax.train_state import TrainState

_META = "meta"
_KEPT = 2  # the newest, and the one before while that is written
log = logging.getLogger(__name__)


class LocalCheckpoints:
    """Saves and restores this process's part of a :class:`TrainState`. All processes make it and
    call its methods alike; ``steps`` and ``wait`` alone are no collectives.

    Args:
      folder: ``config.checkpoint.local_folder``, on a disk of this machine.
      run_id: of the run, for another one may use the same folder.
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
                raise self._trouble("cannot be made", error) from error

    @classmethod
    def from_config(
        cls, config: ConfigDict, workdir: pathlib.Path, abstract: dict[str, Any]
    ) -> LocalCheckpoints | None:
        """Those of a run; None without ``config.checkpoint.local_folder``."""
        if not config.checkpoint.local_folder:
            return None
        with distributed.error_barrier():
            if jax.process_index() == 0:
                runs.run_id(workdir)  # writes it
        return cls(config.checkpoint.local_folder, runs.run_id(workdir), abstract)

    def steps(self) -> list[int]:
        """Complete ones of this process, newest first."""
        found = [int(p.stem) for p in self.directory.glob("*.npz") if p.stem.isdigit()]
        return sorted(found, reverse=True)

    def save(self, state: TrainState, after: int) -> None:
        """Copies this process's part to its memory, and starts to write it; the arrays may be
        donated once this returns.

        Args:
          after: the newest checkpoint elsewhere, -1 for none. Should that be deleted, to go back
            further, then this one does not count either.

        Raises:
          CheckpointError: on all processes, if the disk of one is full, or was at the last save.
        """
        step = int(state.step)
        with distributed.error_barrier():
            self.wait()
            # The last one is whole on all machines now, so that nobody needs those before it.
            self._forget(lambda other: other != self._last)
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
        # A copy: numpy shows the CPU's own memory otherwise, which the next step writes into.
        words = {name: np.array(_words(np.asarray(piece))) for name, piece in pieces.items()}
        meta = {"step": step, "after": after, "checksums": sums}
        words[_META] = np.frombuffer(json.dumps(meta).encode(), np.uint8)
        self._last = step
        self._writing = self._pool.submit(self._write, step, words)

    def wait(self) -> None:
        """Blocks until the last one of this process is on disk.

        Raises:
          CheckpointError: if it could not be written.
        """
        writing, self._writing = self._writing, None
        try:
            if writing:
                writing.result()
        except OSError as error:
            raise self._trouble("a local checkpoint could not be written", error) from error

    def restore_newest(self, newer_than: int) -> dict[str, Any] | None:
        """The newest state that can be put together, laid out as ``abstract``, if it is newer than
        ``newer_than`` (the newest checkpoint elsewhere, -1 for none); else None. What is damaged or
        not complete is passed over with one line in the log. Later ones are deleted: the run will
        come to their steps again.
        """
        mine = [step for step in self.steps() if self._serves(step, newer_than)][:_KEPT]
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
            self._forget(lambda other: other > found)
        return state

    def discard(self) -> None:
        """Deletes them, the one being written too: a newer checkpoint is safe elsewhere."""
        with distributed.error_barrier():
            self.wait()
            shutil.rmtree(self.directory)
            with contextlib.suppress(OSError):  # not empty: other processes of this machine
                self._run.rmdir()
        self._pool.shutdown()

    def _serves(self, step: int, newer_than: int) -> bool:
        """Whether that file may be used, and has all that this process writes."""
        if step <= newer_than:
            return False
        try:
            with np.load(self._path(step)) as file:
                names, after = set(file.files), _meta(file)["after"]
        except Exception as error:  # damage has many names; a run does not stop for it
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
        """(the state, "") out of one of the copies, or (None, why not). All processes decide the
        same."""
        state, sums, reason = None, {}, ""
        if jax.process_index() in replicas.processes(copy):
            try:
                state, sums = self._read(step, copy)
            except Exception as error:  # as above
                reason = f"{self._path(step)}: {first_line(error)}"
        if distributed.gather(bool(reason)).any():
            return None, reason or "another process cannot read its part; its own line says why"
        if copy is not self._abstract:
            state = replicas.spread(state, self._abstract)
        found = jax.device_get(checksums(state))
        wrong = [path for path, value in sums.items() if value != int(found[path])]
        if distributed.gather(bool(wrong)).any():
            return None, f"{min(wrong, default='an array')} does not have the checksum it had"
        return state, ""

    def _read(self, step: int, copy: dict[str, Any]) -> tuple[dict[str, Any], dict[str, int]]:
        """This process's part of a copy, None for arrays of which it has none; the checksums."""
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
        """(path, array, device, name) of each piece that this process writes. Where several of its
        devices hold the same, each is named."""
        return [
            (path, leaf, device, name)
            for copy in self._copies
            for path, leaf in paths.flatten(copy).items()
            for device, name in _pieces(path, leaf).items()
        ]

    def _write(self, step: int, words: dict[str, np.ndarray]) -> None:
        part = self.directory / f"{step}.part"
        with open(part, "wb") as file:
            np.savez(file, **words)
        part.rename(self._path(step))  # whole or not there

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

    def _forget(self, which: Callable[[int], bool]) -> None:
        for step in self.steps():
            if which(step):
                self._path(step).unlink()

    def _path(self, step: int) -> pathlib.Path:
        return self.directory / f"{step}.npz"

    def _trouble(self, what: str, error: OSError) -> CheckpointError:
        return CheckpointError(
            f"config.checkpoint.local_folder: {self.directory}: {what} ({first_line(error)})"
        )


def _pieces(path: str, leaf: jax.ShapeDtypeStruct) -> dict[jax.Device, str]:
    """{device of this process: name of the piece of the array that it holds}, such as
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


def _meta(file) -> dict[str, Any]:
    return json.loads(file[_META].tobytes())
