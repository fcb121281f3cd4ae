"""Errors that a user can mend, and the hint at the nearest known name."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable

# What the kernel says where a disk, a quota or the size of a file is at its end.
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class UserError(Exception):
    """Something the user can mend. The message is one line: what is wrong, where, and what to
    do."""


class TransientError(UserError):
    """Trouble that may pass by itself, as of storage. The program has done what it could to wait it
    out; the same command, started again later, goes on. Ends a command with the exit code 75."""


class DivergedError(UserError):
    """A run whose state is none to save."""


class ConfigError(UserError):
    """A config that names a key, a type or a value that cannot be."""


def suggest(name: str, options: Iterable[str]) -> str:
    """``did you mean 'lr'? (known: eps, lr, ...)``: the tail of an error about an unknown name."""
    options = sorted(options)
    near = nearest(name, options)
    known = f"known: {', '.join(options)}"
    return f"did you mean {near!r}? ({known})" if near else known


# Other projects' words for names here, both as _plain gives them.
_OTHER_WORDS = {
    "linear": "logistic",
    "linearprobe": "logistic",
    "webdataset": "tar",
    "img2dataset": "tar",
    "huggingface": "parquet",
    "imagenet": "folder",
    "directory": "folder",
}


def nearest(name: str, options: Iterable[str], cutoff: float = 0.5) -> str | None:
    """The option that ``name`` stands for: spelled nearly so, whatever the case and the signs
    between words, or else part of it."""
    plain = {_plain(option): option for option in options}
    other = _OTHER_WORDS.get(_plain(name))
    if other in plain:
        return plain[other]
    near = difflib.get_close_matches(_plain(name), plain, n=1, cutoff=max(cutoff, 0.7))
    if not near and _plain(name):
        near = sorted((key for key in plain if _plain(name) in key), key=len)
    near = near or difflib.get_close_matches(_plain(name), plain, n=1, cutoff=cutoff)
    return plain[near[0]] if near else None


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum() or letter in ".")
