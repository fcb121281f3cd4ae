"""Files that are there completely or not at all, whatever happens while they are written."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from webssl_jax.errors import UserError


def try_writing(folder: Path) -> None:
    """Makes ``folder``, and writes and removes a file in it.

    Raises:
      OSError: if that cannot be done.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".writable-") as file:
        file.write(b"1")
        file.flush()


def make_folder(output: Path, flag: str = "--output") -> Path:
    """The folder that a user names by ``flag``, made if it is not there.

    Raises:
      UserError: if that cannot be: a file has its name, say.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise UserError(
            f"{flag} {output}: no folder can be made there ({error.strerror}); name another"
        ) from error
    return output


def write_bytes(path: Path, content: bytes) -> None:
    """Replaces ``path`` by ``content``, on disk once this returns."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_text(path: Path, text: str) -> None:
    """:func:`write_bytes` of ``text``, in UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """:func:`write_text` of ``value``, readable."""
    write_text(path, json.dumps(value, indent=1) + "\n")
