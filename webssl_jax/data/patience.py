"""Patience with storage: what fails now may work in a moment."""

from __future__ import annotations

import errno
import re
import threading
from collections.abc import Callable
from typing import TypeVar

import tenacity

from webssl_jax.config import UserError

PATIENCE_SECONDS = 60.0  # of who does not say how long
_LONGEST_PAUSE = 30.0
# What no waiting mends, unless somebody puts back what was there before.
_LASTING = {
    errno.ENOENT,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
}
# How riegeli, under ArrayRecord, reports a call to the system that failed. Damage reads otherwise.
_SYSTEM_CALL = re.compile(r"\b[a-z0-9]+\(\) failed: ")
T = TypeVar("T")


def may_pass(error: Exception) -> bool:
    """Whether an error of the file system, or of a reader of ArrayRecord, may be gone in a
    moment."""
    if isinstance(error, OSError):
        return error.errno not in _LASTING
    return _SYSTEM_CALL.search(str(error)) is not None


def patiently(
    action: Callable[[], T],
    seconds: float,
    kind: type[UserError],
    say: Callable[[UserError], None],
    enough: threading.Event,
) -> T:
    """What ``action`` returns. While it raises errors of ``kind`` it is called again: after 0.1,
    0.2, 0.4, ... seconds, at most 30 at a time.

    Args:
      seconds: after which the error is raised.
      say: called with each error that is waited for.
      enough: set to end the waiting.
    """

    def tell(state: tenacity.RetryCallState) -> None:
        assert state.outcome is not None
        error = state.outcome.exception()
        assert isinstance(error, UserError)
        say(error)

    return tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(kind),
        # random, so that a thousand threads and hosts do not ask at the same moments
        wait=tenacity.wait_exponential_jitter(initial=0.1, max=_LONGEST_PAUSE, jitter=0.1),
        stop=tenacity.stop_any(
            tenacity.stop_before_delay(seconds), tenacity.stop_when_event_set(enough)
        ),
        before_sleep=tell,
        sleep=tenacity.sleep_using_event(enough),
        reraise=True,
    )(action)
