"""PNG files that are never half written."""

from __future__ import annotations

import os
import pathlib
import tempfile

import numpy as np
from PIL import Image

from webssl_jax.errors import UserError


def save_png(path: str | os.PathLike, picture: np.ndarray) -> None:
    """Writes (H, W, 3) uint8 as PNG, making folders. A reader sees the old file or the new one,
    never half of it.

    Raises:
      ValueError: if ``picture`` is not (H, W, 3) uint8.
      UserError: if ``path`` is a folder.
    """
    picture = np.asarray(picture)
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
        raise ValueError(f"a picture is (H, W, 3) uint8, not {picture.shape} {picture.dtype}")
    path = pathlib.Path(path)
    if path.is_dir():
        raise UserError(f"{path}: is a folder; name the PNG file to write")
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
    try:
        with os.fdopen(handle, "wb") as file:
            Image.fromarray(picture).save(file, format="PNG")
        # mkstemp's 0600 would hide a shared workdir's pictures from colleagues
        os.chmod(partial, 0o644)
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise
