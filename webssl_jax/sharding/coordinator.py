"""The end of a process whose coordinator is gone.

The first process holds jax's coordination service. When it is killed, jax ends all others from C++
by ``abort()``, with lines of its own; what it would call in Python before that cannot take its
arguments (``std::bad_cast``, jax 0.10). So the signal is caught as C programs do it, and where the
coordinator no longer answers the process ends with one line and a code that says "start again".
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket

from webssl_jax import cli

_SECONDS = 5.0  # that a coordinator has to answer
_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_int)
_installed: list[object] = []  # what C points to must live as long


def end_in_words_when_lost(address: str) -> None:
    """From now on an abort of this process, while nobody answers at ``address`` (HOST:PORT), is one
    line and exit code 75. Any other abort stays one."""

    def on_abort(number: int) -> None:
        if _answers(address):
            return  # to abort(), which raises the signal again, without a handler
        line = f"process 0 was killed, or its machine is gone ({address} does not answer)"
        os.write(2, f"error: {line}; start all processes again\n".encode())
        os._exit(cli.EXIT_RESTART)

    handler = _HANDLER(on_abort)
    _installed[:] = [handler]
    _signal(signal.SIGABRT, ctypes.cast(handler, ctypes.c_void_p))


def forget() -> None:
    """For a process that ends: the handler is Python, which may be gone when C calls it."""
    _signal(signal.SIGABRT, ctypes.c_void_p(int(signal.SIG_DFL)))


def _signal(number: int, handler: ctypes.c_void_p) -> None:
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    libc.signal(number, handler)


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _SECONDS).close()
    except OSError:
        return False
    return True
