"""Options of the TPU compiler, one table a generation of chips, and flags of libtpu, which holds
it: what plan.py compiles with and what a run on such chips does.

What each one does stands beside it, as modelled by the compiler itself (libtpu 0.0.42;
telemetry/hlo.py counts). docs/plan.md says how to try another, and what was tried in vain.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jax.sharding import Mesh

# Weights are gathered while the product before them runs, in pieces between the pieces of that
# product. Without, a v5p waits for every gather; with it, for 0.31 of the 1.51 GB that two blocks
# of the 7B's width gather. A v5e does this by itself. On a v6e two blocks of Web-DINO 7B (12
# images) wait 2.7 ms for the wire instead of 7.8, and compute for 58.7 instead of 56.8; on a v4
# 3.7 instead of 10.3, and compute for 124.1 instead of 123.8.
_ASYNC_GATHERS = {
    "xla_tpu_enable_async_collective_fusion": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
    "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
    "xla_tpu_overlap_compute_collective_tc": True,
    "xla_enable_async_all_gather": True,
}
# Larger pieces of matrices in the vector memory, so that products wait less for HBM. On a v5p two
# blocks of Web-DINO 7B take 110.9 ms of cycles instead of 136.5, two of Web-MAE at its width 22.9
# instead of 24.1. On a v6e those of Web-DINO take 50.0 ms instead of 58.7. A v5e gains 1 to 2%, and
# on a v4 24 and 28 MiB are the same program. The compiler takes three to five times as long.
_SCOPED_VMEM = "xla_tpu_scoped_vmem_limit_kib"

# jax's device_kind -> {option: value}. Where there is none, none was measured to help.
OPTIONS: dict[str, Mapping[str, bool | int]] = {
    "TPU v4": _ASYNC_GATHERS,
    "TPU v5 lite": {},
    "TPU v5": _ASYNC_GATHERS | {_SCOPED_VMEM: 65536},
    "TPU v5p": _ASYNC_GATHERS | {_SCOPED_VMEM: 65536},
    "TPU v6 lite": _ASYNC_GATHERS | {_SCOPED_VMEM: 65536},
    "TPU7x": {},
}

# Flags of libtpu itself. Its compiler works on stacks that end after some 60 KB, and the cost of a
# product with others fused into it is worked out by recursion: Web-DINO 1B and CLIP 1B end with a
# SIGSEGV on a v6e-256. On 1 MiB they compile.
_LIBTPU_FLAGS = {"fibers_default_thread_stack_size": 2**20}


def set_libtpu_flags() -> None:
    """Adds them to ``LIBTPU_INIT_ARGS``; one that is given there stays as it is. libtpu reads them
    once, so call it before jax looks for devices."""
    given = os.environ.get("LIBTPU_INIT_ARGS", "")
    ours = [f"--{name}={value}" for name, value in _LIBTPU_FLAGS.items() if name not in given]
    os.environ["LIBTPU_INIT_ARGS"] = " ".join([*given.split(), *ours])


def of(mesh: Mesh) -> dict[str, bool | int]:
    """What a program for the devices of ``mesh`` is compiled with; nothing where they are no
    TPUs."""
    return dict(OPTIONS.get(mesh.devices.flat[0].device_kind, {}))
