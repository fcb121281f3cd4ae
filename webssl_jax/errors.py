"""Errors that a user can mend, and the hint at the nearest known name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user can mend. The message is one line: what is wrong, where, and what to
    do."""


class TransientError(UserError):
    """Trouble that may pass by itself, as of storage. The program has done what it could to wait it
    out; the same command, started again later, goes on. Ends a command with the exit code 75."""


class ConfigError(UserError):
    """A config that names a key, a type or a value that cannot be."""


def suggest(name: str, options: Iterable[str]) -> str:
    """``did you mean 'lr'? (known: eps, lr, ...)``: the tail of an error about an unknown name."""
    options = sorted(options)
    near = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    known = f"known: {', '.join(options)}"
    return f"did you mean {near[0]!r}? ({known})" if near else known
