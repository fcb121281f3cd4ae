"""The processes of a run meet before jax joins them.

jax ends a process with a dump of C++ when the coordinator's port is taken, when nobody answers
there, or when a process does not come. Here all meet at the same address first, and what is wrong
is said in one line.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import socket
import time

from webssl_jax.config import TransientError, UserError

SECONDS = 300.0  # that a process waits for the others
_PAUSE = 0.2  # between tries to connect
_LINE = 200  # bytes of a message, at most


def add_flags(parser: argparse.ArgumentParser) -> None:
    """``--coordinator HOST:PORT --num-processes N --process-id I``: only for machines that are no
    TPU pod."""
    group = parser.add_argument_group("several processes (found automatically on TPU pods)")
    group.add_argument("--coordinator", help="HOST:PORT of process 0")
    group.add_argument("--num-processes", type=int)
    group.add_argument("--process-id", type=int)


def meet(address: str, processes: int, process: int, seconds: float = SECONDS) -> None:
    """Returns when all ``processes`` have called it with the ``address`` HOST:PORT of the first.

    Raises:
      UserError: if the address is none, its port is taken, or the processes do not fit together.
      TransientError: if not all have come in so many ``seconds``.
    """
    host, colon, port = address.rpartition(":")
    if not (colon and host and port.isdigit() and 0 < int(port) < 2**16):
        raise UserError(f"--coordinator {address}: write HOST:PORT")
    deadline = time.monotonic() + seconds
    if process:
        _report(address, host.strip("[]"), int(port), f"{process} {processes}", deadline)
    else:
        _gather(address, int(port), processes, deadline)


def _gather(address: str, port: int, processes: int, deadline: float) -> None:
    come: set[int] = set()
    callers: list[socket.socket] = []
    with _listen(address, port) as server, contextlib.ExitStack() as stack:
        try:
            while len(come) < processes - 1:
                caller, (number, total) = _next_caller(server, deadline)
                callers.append(stack.enter_context(caller))
                problem = ""
                if total != processes:
                    problem = f"process {number} has --num-processes {total}, process 0 {processes}"
                elif number in come:
                    problem = f"two processes have --process-id {number}"
                if problem:
                    raise UserError(f"--coordinator {address}: {problem}")
                come.add(number)
            _tell(callers, "go")
        except TimeoutError:
            missing = [str(number) for number in range(1, processes) if number not in come]
            names = ", ".join(missing[:8]) + (" and more" if len(missing) > 8 else "")
            raise TransientError(
                f"--coordinator {address}: of {processes} processes these have not come: {names}; "
                "see their logs, and start all again"
            ) from None
        except UserError as error:
            _tell(callers, f"process 0 says: {error}")
            raise


def _listen(address: str, port: int) -> socket.socket:
    try:
        return socket.create_server(
            ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024
        )
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            return socket.create_server(("", port), backlog=1024)  # a machine without IPv6
        raise UserError(
            f"--coordinator {address}: port {port} cannot be used on this machine "
            f"({error.strerror}); end the program that has it, or take another port"
        ) from None


def _next_caller(server: socket.socket, deadline: float) -> tuple[socket.socket, tuple[int, int]]:
    """The next process that comes, its number and how many it counts. Who says something else is
    passed over.

    Raises:
      TimeoutError: if nobody comes in time.
    """
    while (left := deadline - time.monotonic()) > 0:
        server.settimeout(left)
        caller, _ = server.accept()
        words = _receive(caller, min(left, 5)).split()
        if len(words) == 2 and all(word.isdigit() for word in words):
            return caller, (int(words[0]), int(words[1]))
        caller.close()
    raise TimeoutError


def _report(address: str, host: str, port: int, words: str, deadline: float) -> None:
    trouble = ""
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection((host, port), timeout=left) as connection:
                connection.sendall(f"{words}\n".encode())
                answer = _receive(connection, max(deadline - time.monotonic(), 0.1))
        except OSError as error:
            answer, trouble = "", str(error)
        if answer == "go":
            return
        if answer.startswith("process 0 says"):
            raise UserError(answer)
        time.sleep(_PAUSE)
    raise TransientError(
        f"--coordinator {address}: process 0 does not answer there ({trouble or 'no word'}); is "
        "the address right, and does it run? Start all again"
    )


def _tell(callers: list[socket.socket], words: str) -> None:
    for caller in callers:
        try:
            caller.sendall(f"{words[: _LINE - 1]}\n".encode())
        except OSError:  # it ended, and will be missed in jax's own joining
            pass


def _receive(connection: socket.socket, seconds: float) -> str:
    """One line; empty if there is none in so many seconds."""
    connection.settimeout(seconds)
    data = b""
    try:
        while not data.endswith(b"\n") and len(data) < 2 * _LINE:
            if not (part := connection.recv(_LINE)):
                break
            data += part
    except OSError:
        pass
    return data.decode(errors="replace").strip()
