"""What the tools that draw a set out of packages check before they download anything
(tools/reading.py, rooms.py, scenes.py)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from webssl_jax.config import UserError


def prepare(
    args: Any, least: Mapping[str, int], there: bool, what: str, folders: Iterable[Path]
) -> Path:
    """Makes the folders, and returns that of the packages.

    Args:
      args: has ``output``, ``cache`` and the flags of ``least``.
      least: {flag: the smallest number it may have}.
      there: whether the output holds ``what`` already.

    Raises:
      UserError: for a number too small, an output that is in use, a folder that cannot be made.
    """
    for flag, lowest in least.items():
        if getattr(args, flag) < lowest:
            raise UserError(f"--{flag} {getattr(args, flag)}: must be at least {lowest}")
    if there:
        raise UserError(f"--output {args.output}: holds {what}; delete them, or name another")
    cache = (args.cache or args.output / "packages").resolve()
    try:
        for folder in (cache, *folders):
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be made: {error.strerror}") from None
    return cache
