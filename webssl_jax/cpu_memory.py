"""The memory of a program that computes on CPUs: kept from step to step, in large pages.

XLA takes the temporary memory of a step, hundreds of megabytes, when the step begins and frees it
at its end. The C library gives so much back to the kernel, which hands out and clears every page
of 4 KiB anew in each step: 0.5 of 2.84 CPU seconds of a Web-MAE step, and all products then miss
the TLB more often.
"""

from __future__ import annotations

import ctypes
import os

# Of glibc's malloc.h: mallopt's parameters.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
_MADV_HUGEPAGE = 14  # of linux/mman.h
_HUGE_PAGE = 2**21


def keep() -> None:
    """Keeps freed memory in the process, and lets its heap have large pages.

    Only with ``JAX_PLATFORMS=cpu`` and glibc; with ``GLIBC_TUNABLES``, which says how malloc shall
    be, nothing is changed. Call it before jax looks for devices: a thread that has taken memory
    before stays with an arena of its own, which always maps large blocks anew. Memory of pages
    that were never used costs nothing, what was used once stays with the process.
    """
    if os.environ.get("JAX_PLATFORMS") != "cpu" or "GLIBC_TUNABLES" in os.environ:
        return
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return
    for parameter, value in ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1)):
        libc.mallopt(parameter, value)

    # The heap grows once by half of the machine's memory, is advised, and is free again.
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    libc.malloc.argtypes, libc.malloc.restype = (ctypes.c_size_t,), ctypes.c_void_p
    libc.free.argtypes = (ctypes.c_void_p,)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    if block := libc.malloc(size):  # a limit of the process may refuse it
        start = -(-block // _HUGE_PAGE) * _HUGE_PAGE
        libc.madvise(start, (block + size - start) // _HUGE_PAGE * _HUGE_PAGE, _MADV_HUGEPAGE)
        libc.free(block)
