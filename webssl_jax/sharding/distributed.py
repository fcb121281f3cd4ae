"""Joining the processes of one run, agreeing on what only one of them noticed, and ending together.

On TPU pods jax finds its peers by itself (a metadata server or GKE's variables tell it); elsewhere
three flags name them.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import pathlib
import secrets
import sys
import threading
import time
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

from webssl_jax import cli
from webssl_jax.config import UserError
from webssl_jax.sharding import compiler_options

_FAILED = "webssl_jax/failed"  # in jax's coordination service: the first failure of any process
_LOOK_SECONDS = 1.0
_known: BaseException | None = None  # an error that all processes know of and end with


def add_flags(parser: argparse.ArgumentParser) -> None:
    """``--coordinator HOST:PORT --num-processes N --process-id I``: only for machines that are not
    a TPU pod."""
    group = parser.add_argument_group("several processes (found automatically on TPU pods)")
    group.add_argument("--coordinator", help="HOST:PORT of process 0")
    group.add_argument("--num-processes", type=int)
    group.add_argument("--process-id", type=int)


def initialize(args: argparse.Namespace) -> None:
    """Call before anything touches a device.

    Without the flags, jax looks for the hosts of its pod, but only where it runs on TPUs: on a TPU
    VM importing jax sets ``jax_platforms`` to "tpu,cpu" (unless JAX_PLATFORMS says otherwise), and
    nowhere else. So a run on CPUs never waits for peers.

    Raises:
      UserError: if the three flags are not given together, or the hosts of a pod were not found.
    """
    compiler_options.set_libtpu_flags()
    flags = (args.coordinator, args.num_processes, args.process_id)
    if any(flag is not None for flag in flags):
        if any(flag is None for flag in flags):
            raise UserError(
                "--coordinator, --num-processes and --process-id belong together: give all three"
            )
        if not 0 <= args.process_id < args.num_processes:
            raise UserError(
                f"--process-id {args.process_id}: must lie in 0..{args.num_processes - 1}"
            )
        jax.distributed.initialize(args.coordinator, args.num_processes, args.process_id)
    elif "tpu" in (jax.config.jax_platforms or "").split(","):
        try:
            jax.distributed.initialize()
        except ValueError as error:
            # jax says so where it finds no cluster: a single host.
            if "coordinator_address should be defined" not in str(error):
                raise
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise UserError(
            f"this host is one of {jax.process_count()} of a TPU pod, but jax did not find the "
            "others; give --coordinator HOST:PORT, --num-processes and --process-id on every host"
        )
    if jax.process_count() > 1:
        _end_together()


def _end_together() -> None:
    """From here on a process that fails ends all others, at once and with its words."""
    # Now: jax takes it away while the thread may still look.
    client = multihost.get_jax_distributed_client()
    cli.at_failure(functools.partial(_exit_if_peer_failed, client), _tell_peers)
    threading.Thread(
        target=_end_with_peers, args=(client,), name="end-with-peers", daemon=True
    ).start()


def _tell_peers(error: BaseException, code: int, line: str) -> None:
    """Ends this process, whose own words are printed, and by :func:`_end_with_peers` all others.

    An exit as usual would wait for them at jax's shutdown barrier, and they wait in a collective:
    five minutes, then all are aborted without a word.
    """
    if error is _known:
        return
    text = f"{code} {jax.process_index()} {line}"
    try:
        multihost.get_jax_distributed_client().key_value_set(_FAILED, text)
    except jax.errors.JaxRuntimeError as trouble:
        if "ALREADY_EXISTS" not in str(trouble):  # else another process was first
            print("the others could not be told: process 0 is gone", file=sys.stderr)
    if jax.process_index() == 0:  # it is the one that they ask
        time.sleep(3 * _LOOK_SECONDS)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _exit_if_peer_failed(client, error: Exception) -> None:
    """Ends this process as :func:`_end_with_peers` would have a moment later, where a peer that
    failed, and so closed its connections, is why ``error`` was met in a collective."""
    if isinstance(error, jax.errors.JaxRuntimeError):
        _end_if_a_peer_failed(client)


def _end_with_peers(client) -> None:
    """A thread: ends this process when another one has failed, with that one's exit code. What the
    main thread waits for will never come."""
    while not _end_if_a_peer_failed(client):
        time.sleep(_LOOK_SECONDS)


def _end_if_a_peer_failed(client) -> bool:
    """Whether any process has failed, which is then this one."""
    try:
        text = client.key_value_try_get(_FAILED)
    except jax.errors.JaxRuntimeError:
        return False  # nobody has failed; or the service is gone, and jax itself ends this process
    code, process, line = text.split(" ", 2)
    if int(process) != jax.process_index():
        sys.stderr.write(f"error: process {process} failed, so all end: {line}\n")
        sys.stderr.flush()
        os._exit(int(code))
    return True


@contextlib.contextmanager
def error_barrier() -> Iterator[None]:
    """What fails within it on one process ends all of them.

    A process that stops alone leaves the others waiting in their next collective. So whatever only
    some processes may fail at (opening the shards, the lock, reading a checkpoint or the config of
    the workdir, everything that ``process_index() == 0`` does alone) belongs in here, on all
    processes alike; within it none waits for another.

        with distributed.error_barrier():
            source = ArrayRecordSource(config.data.train)

    Raises:
      UserError: that names the first process that failed; the failed ones raise their own error.
    """
    trouble = None
    try:
        yield
    except Exception as error:  # of whatever kind: the others would wait for this process
        trouble = error
    raise_on_all(trouble)


def raise_on_all(error: Exception | None) -> None:
    """The end of :func:`error_barrier`, for errors that were caught by other means: a collective
    that raises on all processes unless all of them passed None. For one process it only raises.

    Raises:
      UserError: see :func:`error_barrier`.
    """
    if jax.process_count() > 1:
        failed = np.flatnonzero(gather(error is not None))
        if failed.size:
            global _known
            _known = error or UserError(f"process {failed[0]} stopped: see its line")
            raise _known
    if error is not None:
        raise error


def check_shared(workdir: pathlib.Path) -> None:
    """Proves that all processes see one and the same ``workdir``, which exists on each of them.

    A collective: all processes call it. Nothing for one process.

    Raises:
      UserError: on every process, when one does not see what process 0 writes there.
    """
    if jax.process_count() == 1:
        return
    is_first = jax.process_index() == 0
    token = multihost_utils.broadcast_one_to_all(
        np.frombuffer(secrets.token_bytes(8), np.uint32)
    ).tobytes()
    path = workdir / f".shared-{token.hex()}"
    error = None
    if is_first:
        try:
            path.write_bytes(token)
        except OSError as found:
            error = UserError(f"--workdir {workdir}: cannot write there: {found.strerror}")
    raise_on_all(error)  # the barrier too: from here on the file is written
    missing = np.flatnonzero(gather(not _holds(path, token)))
    if is_first:
        path.unlink()
    if missing.size:
        names = ", ".join(str(process) for process in missing)
        raise UserError(
            f"--workdir {workdir}: process {names} does not see the files of process 0; it must be "
            "a folder that all hosts share"
        )


def _holds(path: pathlib.Path, token: bytes) -> bool:
    try:
        return path.read_bytes() == token
    except OSError:
        return False


def gather(value: bool | int | list[int]) -> np.ndarray:
    """(processes, ...): every process's ``value``, all of the same shape. A collective."""
    found = np.asarray(multihost_utils.process_allgather(np.asarray(value)))
    return found.reshape(jax.process_count(), *np.shape(value))
