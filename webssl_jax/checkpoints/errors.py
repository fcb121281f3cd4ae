"""What a storage can fail with: a full disk, a bucket that refuses, damaged bytes."""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from webssl_jax.cli import first_line
from webssl_jax.config import TransientError, UserError
from webssl_jax.errors import DISK_FULL

_CODES = "PERMISSION_DENIED|UNAUTHENTICATED|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED"
_OS_CODE = r"os_error_code='(\d+)'"  # of the kernel, in texts of tensorstore
_RETRY_SECONDS = 1.0
T = TypeVar("T")


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged or could not be written."""


class DamagedCheckpoint(CheckpointError):
    """A checkpoint whose bytes are not what was saved."""


class StorageError(CheckpointError, TransientError):
    """A checkpoint that the storage neither takes nor gives now; later it may."""


def read_with_retry(what: str, read: Callable[[], T]) -> T:
    """``read()``, called once more after a pause if the storage fails.

    Args:
      what: the part of a checkpoint that is read, for the message.

    Raises:
      DamagedCheckpoint: if that part is damaged or missing. Another checkpoint may be good.
      StorageError: if the storage fails. No checkpoint can be read then.
    """
    try:
        return _read(what, read)
    except StorageError:
        time.sleep(_RETRY_SECONDS)
        return _read(what, read)


def _read(what: str, read: Callable[[], T]) -> T:
    try:
        return read()
    except Exception as error:
        causes = list(causes_of(error))
        if any(isinstance(cause, (MemoryError, TypeError, NameError)) for cause in causes):
            raise  # a bug, or too little memory
        reason = first_line(causes[-1])
        if _is_damage(causes):
            raise DamagedCheckpoint(f"its {what} cannot be read ({reason})") from error
        raise StorageError(
            f"the {what} of a checkpoint cannot be read now ({reason}); mend that and start the "
            "same command again: nothing was changed"
        ) from error


def reason_of(error: BaseException) -> str:
    """What the kernel says, where an error of a disk has it; else the first line of its cause."""
    last = list(causes_of(error))[-1]
    if isinstance(last, OSError) and last.strerror:
        return last.strerror
    code = re.search(_OS_CODE, str(last))
    return os.strerror(int(code[1])) if code else first_line(last)


def is_full_disk(error: BaseException) -> bool:
    """Whether ``error`` or one of its causes says that no space is left."""
    return any(
        isinstance(cause, OSError)
        and cause.errno in DISK_FULL
        or any(os.strerror(code) in str(cause) for code in DISK_FULL)
        for cause in causes_of(error)
    )


def is_storage_failure(error: BaseException, in_bucket: bool) -> bool:
    """Whether ``error`` or one of its causes comes from a disk, a mount or a bucket, and is no bug.
    tensorstore gives a disk's error as a ValueError."""
    return any(
        isinstance(cause, OSError)
        or re.search(_OS_CODE, str(cause)) is not None
        or (in_bucket and is_bucket_failure(cause))
        for cause in causes_of(error)
    )


def is_bucket_failure(error: BaseException) -> bool:
    """Whether a bucket cannot be reached or may not be used. False when something in it is missing
    or broken."""
    if isinstance(error, FileNotFoundError):
        return False
    package = type(error).__module__.partition(".")[0]
    return (
        package in ("gcsfs", "google", "aiohttp")
        # Python's own, as gcsfs raises them; tensorstore says its code in a ValueError.
        or isinstance(error, (PermissionError, ConnectionError, TimeoutError))
        or re.match(r"Forbidden|Bad Request", str(error)) is not None
        or re.search(_CODES, str(error)) is not None
    )


def causes_of(error: BaseException | None) -> Iterator[BaseException]:
    """``error``, its cause, the cause of that, and so on."""
    while error is not None:
        yield error
        error = error.__cause__


def _is_damage(causes: list[BaseException]) -> bool:
    """Whether the bytes are at fault, and not the storage."""
    text = " ".join(map(str, causes))
    # tensorstore says everything in a ValueError, with the kernel's code in its text.
    code = re.search(_OS_CODE, text)
    codes = [int(code[1])] if code else [getattr(cause, "errno", None) for cause in causes]
    storage_failed = "RESOURCE_EXHAUSTED" in text or any(map(is_bucket_failure, causes))
    return set(codes) <= {None, errno.ENOENT} and not storage_failed
