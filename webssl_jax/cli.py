"""What all entry points share: flags and overrides, one clear line for bad input, exit codes.

Exit codes: 0 done (also when the run had already finished) · 1 a bug, with traceback · 2 bad input
or a full disk, one line · 75 stopped by SIGTERM or a preemption notice after saving: start the same
command again · 130 stopped by Ctrl-C after saving (one process; several treat Ctrl-C as SIGTERM).
"""

from __future__ import annotations

import argparse
import errno
import faulthandler
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

from webssl_jax.errors import UserError, suggest

EXIT_FAILURE = 1
EXIT_BAD_INPUT = 2
EXIT_RESTART = 75  # EX_TEMPFAIL of sysexits.h: what a launcher reads as "start me again"
EXIT_INTERRUPTED = 130


class ArgumentParser(argparse.ArgumentParser):
    """argparse whose errors are one line, with the nearest flag that exists."""

    def __init__(self, **options: Any):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(allow_abbrev=False, formatter_class=formatter, **options)
        self.add_argument(
            "--traceback", action="store_true", help="show the traceback of an error in the input"
        )

    def error(self, message: str) -> NoReturn:
        prefix = "unrecognized arguments: "
        if message.startswith(prefix):
            flag = message.removeprefix(prefix).split()[0].split("=")[0]
            flags = [f for f in self._option_string_actions if f[:2] == "--"]
            message = f"{flag}: no such flag; {suggest(flag, flags)}"
        print(f"error: {message}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)

    def parse_with_overrides(
        self, argv: list[str] | None = None, prefix: str = "--config."
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parses flags and splits off ``--config.a.b=c``, with this ``prefix``, as the override
        ``a.b=c``."""
        args, unknown = self.parse_known_args(argv)
        overrides, others = [], []
        rest = iter(unknown)
        for item in rest:
            if not item.startswith(prefix):
                others.append(item)
            elif "=" in item:
                overrides.append(item.removeprefix(prefix))
            else:  # --config.a.b c
                value = next(rest, None)
                if value is None or value.startswith("--"):
                    self.error(f"{item}: give a value")
                overrides.append(f"{item.removeprefix(prefix)}={value}")
        if others:
            self.error(f"unrecognized arguments: {' '.join(others)}")
        return args, overrides


def log_to_stderr(level: int = logging.INFO) -> None:
    """Plain lines without prefix. Of libraries only errors are shown, and none of orbax (which logs
    through absl): it raises in the main thread what its threads log."""
    # absl has installed a handler of its own
    logging.basicConfig(level=level, format="%(message)s", force=True)
    logging.getLogger("jax").setLevel(logging.ERROR)
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    for name in ("gcsfs", "fsspec"):  # their callers report what they raise
        logging.getLogger(name).setLevel(logging.CRITICAL)
    # When a checkpoint cannot be written, the main thread reports it. A hundred writes fail with
    # it, and asyncio and tensorstore's threads would report each.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    sys.unraisablehook = _unraisablehook


def first_line(error: BaseException) -> str:
    """The first line of its text, at most 200 characters."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]


_reported: set[tuple] = set()


def _unraisablehook(event: sys.UnraisableHookArgs) -> None:
    """Reports an exception that no caller can catch, as in a callback from a C++ thread. One line
    for each type of error and line of code: a part of a checkpoint that cannot be read raises one
    for each of its arrays."""
    if _wants_traceback():
        sys.__unraisablehook__(event)
        return
    frames = [(f.f_code, line) for f, line in traceback.walk_tb(event.exc_traceback)]
    kind = (event.exc_type, *frames[-1:])
    if kind not in _reported:
        _reported.add(kind)
        text = first_line(event.exc_value) if event.exc_value else ""
        logging.warning("in the background: %s: %s", event.exc_type.__name__, text)


_before_traceback: list[Callable[[Exception], None]] = []
_before_exit: list[Callable[[BaseException, int, str], None]] = []


def on_failure(
    before_traceback: Callable[[Exception], None],
    before_exit: Callable[[BaseException, int, str], None],
) -> None:
    """Adds what an entry point calls when it ends with an error.

    Args:
      before_traceback: called with the error before its traceback is printed. It may end the
        process with a better message.
      before_exit: called with the error, the exit code and one line, when all is printed.
    """
    _before_traceback.append(before_traceback)
    _before_exit.append(before_exit)


def run(main: Callable[[], int | None]) -> NoReturn:
    """Runs ``main`` and exits with its code. An error that a user can mend is one line and exit
    code 2. ``kill -USR1`` prints the stacks of all threads, and the process goes on."""
    stderr = sys.__stderr__ or sys.stderr
    faulthandler.register(signal.SIGUSR1, file=stderr, all_threads=True)
    log_to_stderr()
    try:
        code = main()
    except UserError as error:
        _fail(error, str(error))
    except KeyboardInterrupt as error:  # before the loop could save, or a second Ctrl-C
        print("interrupted", file=sys.stderr)
        _exit(error, EXIT_INTERRUPTED, "interrupted")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            _fail_with_traceback(error)
        place = error.filename or error
        _fail(error, f"no space left: {place}; free some and start the same command again")
    except Exception as error:
        _fail_with_traceback(error)
    sys.stdout.flush()
    sys.exit(code or 0)


def _fail(error: Exception, line: str) -> NoReturn:
    line = " ".join(line.split())
    if _wants_traceback():
        traceback.print_exc()
    else:
        # One write: print() makes two, between which other threads may write.
        sys.stderr.write(f"error: {line}\n")
    _exit(error, EXIT_BAD_INPUT, line)


def _fail_with_traceback(error: Exception) -> NoReturn:
    for call in _before_traceback:
        call(error)
    traceback.print_exc()
    first = str(error).strip().partition("\n")[0][:300]
    _exit(error, EXIT_FAILURE, f"{type(error).__name__}: {first}")


def _exit(error: BaseException, code: int, line: str) -> NoReturn:
    for call in _before_exit:
        call(error, code, line)
    sys.exit(code)


def _wants_traceback() -> bool:
    return "--traceback" in sys.argv or bool(os.environ.get("WEBSSL_TRACEBACK"))
