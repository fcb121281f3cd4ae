"""Programs of this project, started as forks of one process that has imported what they import:
that is most of the CPU time of a program that does little.

A fork is a process like any other, with its own devices, signals and end; only ``python -m MODULE``
has no import left to do. ``tools/quickstart.sh`` and tests/test_package.py start the real thing.
"""

import atexit
import contextlib
import ctypes
import gc
import json
import os
import pathlib
import resource
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings

ROOT = pathlib.Path(__file__).parent.parent.parent
_LARGEST_MESSAGE = 1 << 20
_PARENT_DIED = 1  # PR_SET_PDEATHSIG


class Process:
    """``python *arguments`` with what of ``subprocess.Popen`` the tests use. Standard output and
    error are one pipe."""

    def __init__(self, server, arguments, env, largest_file_kib=None):
        self.returncode = None
        read, write = os.pipe()
        self.stdout = open(read)
        self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._connection.connect(str(server))
        message = json.dumps([arguments, env, largest_file_kib]).encode()
        socket.send_fds(self._connection, [message], [write])
        os.close(write)
        self.pid = int(self._connection.recv(64))

    def poll(self):
        return self._wait(0)

    def wait(self, timeout=None):
        if self._wait(timeout) is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout)
        return self.returncode

    def communicate(self, timeout=None):
        """(what is left of the output, None). Raises ``subprocess.TimeoutExpired``."""
        deadline = None if timeout is None else time.monotonic() + timeout
        parts = []
        while True:
            left = None if deadline is None else max(0, deadline - time.monotonic())
            if not select.select([self.stdout], [], [], left)[0]:
                raise subprocess.TimeoutExpired(str(self.pid), timeout, b"".join(parts))
            parts.append(os.read(self.stdout.fileno(), 1 << 16))
            if not parts[-1]:
                break
        self.wait(None if deadline is None else max(1, deadline - time.monotonic()))
        return b"".join(parts).decode(errors="replace"), None

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def _wait(self, timeout):
        if self.returncode is None and select.select([self._connection], [], [], timeout)[0]:
            self.returncode = int(self._connection.recv(64))
            self._connection.close()
        return self.returncode


def serve(address):
    """Forks for whoever connects to the socket ``address``, until standard input ends."""
    from webssl_jax import evaluate, train  # noqa: F401

    # jax warns that its threads do not survive a fork. It has none before it looks for devices.
    warnings.filterwarnings("ignore", r"os\.fork\(\) was called", RuntimeWarning)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for pytest, which ends the input
    gc.collect()
    gc.freeze()  # a collection in a fork would copy what it looks at
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(address)
        listener.listen(64)
        print("ready", flush=True)
        while sys.stdin not in (ready := select.select([listener, sys.stdin], [], [])[0]):
            assert ready
            connection = listener.accept()[0]
            if not os.fork():
                listener.close()
                return _attend(connection)
            connection.close()
            with contextlib.suppress(ChildProcessError):  # none is left
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
    return None


def _attend(connection):
    """Forks again, and tells the process id and, at its end, the exit code. Returns, in the fork,
    what to run."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _end_with_parent()
    message, (output,), _, _ = socket.recv_fds(connection, _LARGEST_MESSAGE, 1)
    arguments, environment, largest_file_kib = json.loads(message)
    child = os.fork()
    if child:
        os.close(output)
        connection.send(str(child).encode())
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        connection.send(str(code).encode())
        os._exit(0)
    _end_with_parent()
    connection.close()
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.clear()
    os.environ.update(environment)
    if largest_file_kib:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file_kib << 10,) * 2)
    return arguments


def _end_with_parent():
    """So that nothing outlives a pytest that was killed."""
    ctypes.CDLL(None).prctl(_PARENT_DIED, signal.SIGKILL)


def main(address):
    arguments = serve(address)
    if arguments is None:
        return
    try:
        if arguments[0] == "-m":
            module, sys.argv = arguments[1], arguments[1:]
            sys.modules.pop(module, None)  # run as the main module, not found as imported
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            sys.path[0] = str(pathlib.Path(arguments[0]).resolve().parent)
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as end:
        _end(end.code)


def _end(code):
    """Ends as Python does, but leaves the memory to the system: to touch every object of a fork is
    to copy it."""
    if isinstance(code, str):
        print(code, file=sys.stderr)
    threading._shutdown()  # waits for threads, and ends pools
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(bool(code)))


if __name__ == "__main__":
    main(sys.argv[1])
