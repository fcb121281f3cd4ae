"""A train step that was compiled elsewhere, kept in a file: ``plan --save`` writes it on a laptop,
``train --compiled`` loads it on the slice, whose chips then do not wait for the compiler.

The file holds jax's serialised executable and a note of what it was compiled from: the lowered
program, the versions of jax, jaxlib and libtpu, and the devices. A run lowers its own step all the
same, which takes seconds, and refuses the file when any of these differ.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import struct

import jax
from jax.experimental import serialize_executable

from webssl_jax import environment
from webssl_jax.config import UserError
from webssl_jax.files import write_bytes

_MAGIC = b"webssl_jax compiled step 1\n"
_LENGTHS = "<QQ"  # of the note (JSON) and of jax's part, which follow
_PACKAGES = ("jax", "jaxlib", "libtpu")


def save(
    path: str | os.PathLike,
    lowered: jax.stages.Lowered,
    compiled: jax.stages.Compiled,
    mesh: jax.sharding.Mesh,
) -> None:
    """Writes ``compiled``, which came from ``lowered`` for the devices of ``mesh``.

    Raises:
      UserError: if the file cannot be written.
    """
    payload, _, _ = serialize_executable.serialize(compiled)
    note = json.dumps(_note(lowered, mesh)).encode()
    content = _MAGIC + struct.pack(_LENGTHS, len(note), len(payload)) + note + payload
    try:
        write_bytes(pathlib.Path(path), content)
    except OSError as error:
        raise UserError(f"--save {path}: cannot be written ({error.strerror})") from error


def load(
    path: str | os.PathLike, lowered: jax.stages.Lowered, mesh: jax.sharding.Mesh
) -> jax.stages.Compiled:
    """The step that ``lowered`` would compile to, from the file.

    The payload is unpickled by jax, which can run code: only after the note was found to be right,
    and only from files that you made.

    Raises:
      UserError: if the file is not one of :func:`save`, or was compiled from something else.
    """
    try:
        content = pathlib.Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"--compiled {path}: cannot be read ({error.strerror})") from error
    if not content.startswith(_MAGIC):
        raise UserError(f"--compiled {path}: was not written by plan --save")
    start = len(_MAGIC) + struct.calcsize(_LENGTHS)
    lengths = struct.unpack(_LENGTHS, content[len(_MAGIC) : start].ljust(16, b"\xff"))
    if len(content) != start + sum(lengths):
        raise UserError(f"--compiled {path}: is cut off or damaged")
    end = start + lengths[0]
    saved = json.loads(content[start:end])
    for name, value in _note(lowered, mesh).items():
        if saved.get(name) != value:
            raise UserError(
                f"--compiled {path}: {name} differs: it has {saved.get(name)}, this run {value}; "
                "write it again with plan --save, or leave the flag out"
            )
    return serialize_executable.deserialize_and_load(
        content[end:],
        jax.tree.structure(lowered.args_info),
        lowered.out_tree,
        execution_devices=list(mesh.devices.flat),
    )


def _note(lowered: jax.stages.Lowered, mesh: jax.sharding.Mesh) -> dict[str, str]:
    device = mesh.devices.flat[0]
    versions = environment.package_versions()
    return {
        "devices": f"{mesh.size} x {device.device_kind}",
        **{name: versions[name] for name in _PACKAGES},
        "the program": hashlib.sha256(lowered.as_text().encode()).hexdigest(),
    }
