"""Memory that is freed stays with the process, whichever thread takes it."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, resource, threading
from webssl_jax import cpu_memory

cpu_memory.keep()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, (ctypes.c_void_p,)

def take():
    block = libc.malloc(ctypes.c_size_t(2**27))
    ctypes.memset(ctypes.c_void_p(block), 1, 2**27)
    libc.free(block)

def both():
    thread = threading.Thread(target=lambda: [take(), take()])
    thread.start(), thread.join()

both()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
both()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.parametrize(("platform", "kept"), [("cpu", True), ("tpu", False)])
def test_a_thread_of_a_cpu_program_gets_the_same_pages_again(platform, kept):
    environment = os.environ | {"JAX_PLATFORMS": platform}
    environment.pop("GLIBC_TUNABLES", None)
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    faults = int(done.stdout)
    assert faults < 100 if kept else faults > 1000, faults  # 2**27 bytes are 32,768 pages
