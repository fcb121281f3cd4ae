"""What a Pallas kernel costs, read from the instructions that the TPU compiler makes of it.

Beside a kernel the compiled program states no cycles. But libtpu can write what it compiles an
operation to: bundles, of which a core issues one a cycle, with the loop over the kernel's grid.
Cycles are then the bundles of the loop times its rounds, and those around it. What this leaves out
is waiting: for HBM, and where two instructions meet at one unit. libtpu's own simulation, which
takes minutes for one kernel, finds 3 to 27% more for attention of 257 tokens (docs/plan.md).

Writing takes longer than compiling and cannot be asked of some operations only, so each kernel is
compiled again, by itself, in a process of its own.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable

import jax

from webssl_jax.plan import hlo
from webssl_jax.sharding import slices

_BUNDLE = re.compile(r"^ *(?:0x)?[0-9a-f]+ +(?:[A-Z]{2})?: ((?:> )*)", re.MULTILINE)
_ROUNDS = re.compile(r"scmp\.ge\.s32\.totalorder \S+ (\d+) /\* loop exit test \*/")


def cycles(kernels: Iterable[hlo.Kernel], slice_: slices.Slice) -> dict[str, int]:
    """{name: cycles of one run on a device of ``slice_``} of those ``kernels`` whose cycles can be
    read: see :func:`count`. Takes some ten seconds a kernel.

    Raises:
      RuntimeError: if the compiler fails, with its words.
    """
    kernels = list(kernels)
    if not kernels:
        return {}
    with tempfile.TemporaryDirectory(prefix="webssl_bundles_") as folder:
        flags = (
            os.environ.get("LIBTPU_INIT_ARGS", ""),
            f"--xla_jf_dump_to={folder}",
            "--xla_jf_dump_llo_text=true",
            "--xla_jf_dump_llo_pass_label_regex=final_bundles",
        )
        made = subprocess.run(
            [sys.executable, "-m", __name__, slice_.name, folder],
            env=os.environ | {"LIBTPU_INIT_ARGS": " ".join(flags), "JAX_PLATFORMS": "cpu"},
            input=json.dumps([dataclasses.asdict(kernel) for kernel in kernels]),
            capture_output=True,
            text=True,
        )
    if made.returncode:
        raise RuntimeError(f"compiling kernels by themselves failed: {made.stderr[-2000:]}")
    return json.loads(made.stdout.splitlines()[-1])


def count(text: str) -> int | None:
    """The cycles of one operation's bundles, as libtpu writes them; None where its loops are more
    than one, or run nobody knows how often."""
    depths = [len(match[1]) // 2 for match in _BUNDLE.finditer(text)]
    inside = sum(depth > 0 for depth in depths)
    rounds = _ROUNDS.findall(text)
    if not depths or max(depths) > 1 or len(rounds) != (inside > 0):
        return None
    return len(depths) - inside + inside * (int(rounds[0]) if rounds else 0)


def _compile(kernel: hlo.Kernel, device: jax.Device) -> str:
    """Compiles a program of that kernel alone. Returns the name that it has there."""
    place = jax.sharding.SingleDeviceSharding(device)
    operands, results = (
        [jax.ShapeDtypeStruct(shape, dtype, sharding=place) for dtype, shape in arrays]
        for arrays in (kernel.operands, kernel.results)
    )
    call = jax.ffi.ffi_call(
        "tpu_custom_call", results, custom_call_api_version=1, legacy_backend_config=kernel.config
    )
    text = jax.jit(call).lower(*operands).compile().as_text()
    assert text is not None  # as where a compiler cannot tell
    (alone,) = hlo.kernels_of(text)
    return alone.name


def _main(name: str, folder: str) -> None:
    """Kernels as JSON from standard input; {name: cycles} on the last line of standard output."""
    device = slices.find(name).devices()[0]
    out, texts = {}, {}
    for fields in json.load(sys.stdin):
        kernel = hlo.Kernel(**fields)
        key = (kernel.config, str(kernel.operands))
        if key not in texts:
            before = set(os.listdir(folder))
            alone = _compile(kernel, device)
            written = set(os.listdir(folder)) - before
            pattern = re.compile(rf"\d+-{re.escape(alone)}-\d+-final_bundles\.txt")
            (file,) = filter(pattern.fullmatch, written)
            texts[key] = count(pathlib.Path(folder, file).read_text())
        if texts[key] is not None:
            out[kernel.name] = texts[key]
    print(json.dumps(out))


if __name__ == "__main__":
    _main(*sys.argv[1:])
