"""Files of buckets, ``gs://BUCKET/NAME``."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from webssl_jax.config import TransientError, UserError

SCHEME = "gs://"


def place(text: str) -> Path | str:
    """For argparse: a path, or an address."""
    return text if text.startswith(SCHEME) else Path(text)


def here(text: str) -> Path:
    """For argparse: a path, of what is not written to a bucket."""
    if text.startswith(SCHEME):
        raise ValueError  # argparse turns it into its own one-line error
    return Path(text)


here.__name__ = "path of this machine"


def storage(address: str) -> tuple[Any, str]:
    """The file system, and the name there."""
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(f"{address}: needs gcsfs; pip install 'webssl_jax[gcp]'")
    import fsspec

    system = fsspec.filesystem("gcs", use_listings_cache=False)
    return system, address.removeprefix(SCHEME).rstrip("/")


@contextlib.contextmanager
def told(address: str) -> Iterator[None]:
    """Each of the packages behind gs:// has errors of its own."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise TransientError(
            f"{address}: cannot be used ({why}); see to it and start the same command again"
        ) from None


@contextlib.contextmanager
def local_copy(address: str) -> Iterator[Path]:
    """A file of a bucket as one here.

    Raises:
      FileNotFoundError: if there is none.
      TransientError: if the bucket fails.
    """
    system, name = storage(address)
    with tempfile.TemporaryDirectory(prefix="webssl-") as folder:
        path = Path(folder, "copy")
        with told(address):
            there = system.exists(name)
            if there:
                system.get_file(name, str(path))
        if not there:
            raise FileNotFoundError(2, os.strerror(2), address)
        yield path


def find(pattern: str) -> dict[str, dict[str, Any]]:
    """{address: bytes and mtime} of the files that match."""
    system, name = storage(pattern)
    with told(pattern):
        found = system.glob(name, detail=True)
    return {
        SCHEME + key: {"bytes": facts["size"], "mtime": str(facts.get("mtime"))}
        for key, facts in found.items()
        if facts["type"] == "file"
    }
