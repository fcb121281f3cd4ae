"""Joins the processes of one run, and makes an error of one of them an error of all.

On TPU pods jax finds the other processes by itself (from a metadata server or GKE's variables).
Elsewhere three flags name them.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import functools
import hashlib
import json
import os
import pathlib
import re
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import NoReturn, Protocol

import jax
import numpy as np
from jax._src import distributed as jax_distributed
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

from webssl_jax import cli
from webssl_jax.config import TransientError, UserError
from webssl_jax.sharding import compiler_options, coordinator, rendezvous

_FAILED_KEY = "webssl_jax/failed"  # in jax's coordination service: the first failure of any process
_POLL_SECONDS = 1.0
_END_MILLISECONDS = 300_000  # as jax waits at its shutdown
_MEET_MILLISECONDS = 24 * 3_600_000  # one that ends tells the others before
# Of a collective whose other side closed its connection.
_GONE = re.compile("(?i)connection (closed|reset|refused)|socket closed|broken pipe|read error")
_raised_on_all: BaseException | None = None  # an error with which all processes end


def initialize(args: argparse.Namespace) -> None:
    """Joins the processes of a run. Must be called before anything uses a device.

    Without the flags, jax looks for the hosts of its pod, but only on TPUs: on a TPU VM, importing
    jax sets ``jax_platforms`` to "tpu,cpu" (unless JAX_PLATFORMS is set), and nowhere else. So a
    run on CPUs never waits for other hosts.

    Raises:
      UserError: if the three flags are not given together, or the hosts of a pod were not found;
        and as ``rendezvous.meet``.
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
        rendezvous.meet(args.coordinator, args.num_processes, args.process_id)
        jax.distributed.initialize(args.coordinator, args.num_processes, args.process_id)
    elif "tpu" in (jax.config.values["jax_platforms"] or "").split(","):
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
        _start_failure_monitor()


class _Client(Protocol):
    """jax's client of its coordination service."""

    def key_value_try_get(self, key: str) -> str: ...

    def wait_at_barrier(self, name: str, timeout_in_ms: int) -> None: ...


def _start_failure_monitor() -> None:
    """From now on, when one process fails, all others end within seconds and print its error."""
    # The client is kept: jax drops it at its shutdown, while the thread may still need it.
    client = multihost.get_jax_distributed_client()
    cli.on_failure(functools.partial(_exit_if_other_failed, client), _report_failure)
    # set by jax, also where it found the other processes by itself
    if address := jax_distributed.global_state.coordinator_address:
        coordinator.end_in_words_when_lost(address)
    stop = threading.Event()
    monitor = threading.Thread(
        target=_monitor_failures, args=(client, stop), name="failure-monitor", daemon=True
    )
    monitor.start()
    atexit.register(_end_monitor, client, stop, monitor)


def meet(name: str) -> None:
    """Waits until all processes of the run are here. name: said once in a start.

    On CPUs the first collective of a group of devices fails after 30 s without the others (gloo),
    and where cores are few, one process compiles so much longer than another.
    """
    if jax.process_count() > 1:
        client = multihost.get_jax_distributed_client()
        client.wait_at_barrier(f"webssl_jax/{name}", _MEET_MILLISECONDS)


def _end_monitor(client: _Client, stop: threading.Event, monitor: threading.Thread) -> None:
    """Ends the thread before Python ends: coming back from C++ after that, it would abort the
    process. Until all processes end well it goes on, for one may fail yet."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # jax's own shutdown says what failed
        client.wait_at_barrier("webssl_jax/end", _END_MILLISECONDS)
    stop.set()
    monitor.join()
    coordinator.forget()


def _report_failure(error: BaseException, code: int, line: str) -> None:
    """Tells the other processes that this one failed, and ends it. Its error is already printed.

    A normal exit would wait for the others at jax's shutdown barrier, while they wait in a
    collective. After five minutes all would be aborted without a message.
    """
    if error is _raised_on_all:
        return
    text = f"{code} {jax.process_index()} {line}"
    try:
        multihost.get_jax_distributed_client().key_value_set(_FAILED_KEY, text)
    except jax.errors.JaxRuntimeError as failure:
        if "ALREADY_EXISTS" not in str(failure):  # else another process has failed before
            print("the others could not be told: process 0 is gone", file=sys.stderr)
    if jax.process_index() == 0:  # it holds the coordination service, which the others ask
        time.sleep(3 * _POLL_SECONDS)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _exit_if_other_failed(client: _Client, error: Exception) -> None:
    """Ends this process if ``error`` was raised by a collective because another process failed, or
    was killed, and its connections closed. :func:`_monitor_failures` would do so a moment later."""
    # jax raises what Gloo reports as a ValueError, too.
    if not isinstance(error, jax.errors.JaxRuntimeError) and "Gloo" not in str(error):
        return
    if not _exit_if_failure_reported(client) and _GONE.search(str(error)):
        for _ in range(2):  # a process that failed by itself may be about to say why
            time.sleep(_POLL_SECONDS)
            _exit_if_failure_reported(client)
        line = f"another process was killed, or its machine is gone ({cli.first_line(error)})"
        sys.stderr.write(f"error: {line}; start all processes again\n")
        _report_failure(error, cli.EXIT_RESTART, line)


def _monitor_failures(client: _Client, stop: threading.Event) -> None:
    """A thread: ends this process, with the exit code of the other one, when another process has
    failed. The collective that the main thread waits in will never complete."""
    while not _exit_if_failure_reported(client) and not stop.wait(_POLL_SECONDS):
        pass


def _exit_if_failure_reported(client: _Client) -> bool:
    """False if no process has reported a failure. True if this one has; else the process ends."""
    try:
        text = client.key_value_try_get(_FAILED_KEY)
    except jax.errors.JaxRuntimeError:
        return False  # no failure; or the service is gone, and jax itself ends this process
    code, process, line = text.split(" ", 2)
    if int(process) != jax.process_index():
        sys.stderr.write(f"error: process {process} failed, so all end: {line}\n")
        sys.stderr.flush()
        os._exit(int(code))
    return True


@contextlib.contextmanager
def error_barrier() -> Iterator[None]:
    """An error within it, on any process, raises on all of them at its end.

    A process that raises alone leaves the others waiting in their next collective. So everything at
    which only some processes may fail belongs in here: opening shards, the lock, reading a config
    or a checkpoint, all that ``process_index() == 0`` does alone. All processes enter it, and
    within it there must be no collective.

        with distributed.error_barrier():
            source = ArrayRecordSource(config.data.train)

    Raises:
      UserError: naming the first process that failed. Those that failed raise their own error.
    """
    failure = None
    try:
        yield
    except Exception as error:  # of any type: the others would wait for this process
        failure = error
    raise_on_all(failure)


def raise_on_all(error: Exception | None) -> None:
    """The end of :func:`error_barrier`, for errors that were caught in another way. A collective:
    it raises on all processes unless ``error`` is None on all of them.

    Raises:
      UserError: see :func:`error_barrier`.
    """
    if jax.process_count() > 1:
        codes = gather(_exit_code(error))
        if codes.any():
            first = int(np.flatnonzero(codes)[0])
            kind = TransientError if codes[first] == cli.EXIT_RESTART else UserError
            raise_together(error or kind(f"process {first} stopped: see its line"))
    if error is not None:
        raise error


def _exit_code(error: Exception | None) -> int:
    passes = isinstance(error, OSError) and cli.is_storage_trouble(error)
    if passes or isinstance(error, TransientError):
        return cli.EXIT_RESTART
    return 0 if error is None else cli.EXIT_FAILURE


def is_raised_on_all(error: BaseException) -> bool:
    """Whether all processes have raised an error at this place, this one ``error``: then they may
    go on together, as to save."""
    return jax.process_count() == 1 or error is _raised_on_all


def raise_together(error: Exception) -> NoReturn:
    """Raises an error that all processes raise at the same place: none must tell the others."""
    global _raised_on_all
    _raised_on_all = error
    raise error


def check_same(settings: Mapping[str, str]) -> None:
    """Checks that all processes have the same settings. A collective.

    Args:
      settings: {what it is: its value}, in which two processes of one run must not differ.

    Raises:
      UserError: on all processes, naming the first setting that differs and the two processes.
    """
    if jax.process_count() == 1:
        return
    text = json.dumps(dict(settings), sort_keys=True)
    digests = gather(list(hashlib.sha256(text.encode()).digest()))
    if (digests == digests[0]).all():
        return
    host = socket.gethostname()
    everyone = [json.loads(found) for found in _gather_texts(json.dumps([host, dict(settings)]))]
    (first_host, first), index = everyone[0], int((digests != digests[0]).any(axis=1).argmax())
    other_host, other = everyone[index]
    name = next(name for name in sorted({*first, *other}) if first.get(name) != other.get(name))
    raise_together(
        UserError(
            f"{name} is {other.get(name, 'not there')} on process {index} (host {other_host}) and "
            f"{first.get(name, 'not there')} on process 0 (host {first_host}); start all processes "
            "with the same command, code and data"
        )
    )


def _gather_texts(text: str) -> list[str]:
    """Every process's ``text``, of any length. A collective."""
    data = np.frombuffer(text.encode(), np.uint8)
    sizes = gather(len(data))
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: len(data)] = data
    rows = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(sizes), -1)
    return [row[:size].tobytes().decode() for row, size in zip(rows, sizes, strict=True)]


def check_shared(workdir: pathlib.Path) -> None:
    """Checks that ``workdir`` is the same folder for all processes. A collective; it exists on all.

    Raises:
      UserError: on all processes, if one does not see what process 0 writes there.
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
    raise_on_all(error)  # a barrier, too: from here on the file is written
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


def from_first(text: str) -> str:
    """Process 0's ``text``, of at most 240 bytes, on every process. A collective: processes may see
    a change of a shared folder at different times."""
    if jax.process_count() == 1:
        return text
    sent = np.frombuffer(text.encode().ljust(240), np.uint8)
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(sent))).decode().rstrip()


def first_says(flag: bool) -> bool:
    """Process 0's ``flag`` on every process; see :func:`from_first`."""
    return bool(from_first("yes" if flag else ""))


def gather(value: bool | int | Sequence[float] | np.ndarray) -> np.ndarray:
    """(processes, ...): every process's ``value``, all of the same shape, in 32 bits. A
    collective."""
    found = np.asarray(multihost_utils.process_allgather(np.asarray(value)))
    return found.reshape(jax.process_count(), *np.shape(value))
