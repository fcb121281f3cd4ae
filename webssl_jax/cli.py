"""What all entry points share: flags and overrides, one clear line for bad input, exit codes.

Exit codes: 0 done (also when the run had already finished) · 1 a bug, with traceback · 2 bad input
or a full disk, one line · 75 start the same command again: stopped by SIGTERM, SIGHUP or a
preemption notice after saving, or by trouble that may pass, as of storage (one line) · 130 stopped
by Ctrl-C after saving (one process; several treat Ctrl-C as SIGTERM).
"""

from __future__ import annotations

import argparse
import atexit
import errno
import faulthandler
import importlib
import io
import logging
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from typing import Any, NoReturn, TextIO, cast

from webssl_jax.errors import DISK_FULL, TransientError, UserError, suggest

EXIT_FAILURE = 1
EXIT_BAD_INPUT = 2
EXIT_RESTART = 75  # EX_TEMPFAIL of sysexits.h: what a launcher reads as "start me again"
EXIT_INTERRUPTED = 130
_STORAGE = (errno.EIO, errno.EROFS, errno.ESTALE, errno.ENOTCONN, errno.EREMOTEIO, errno.ETIMEDOUT)
_LONGEST_END = 10.0  # seconds that threads have to end with the program


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

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """As argparse's own, with the nearest choice."""
        if action.choices is not None and value not in action.choices:
            hint = suggest(str(value), map(str, action.choices))
            raise argparse.ArgumentError(action, f"no such choice {value!r}; {hint}")

    def parse_with_overrides(
        self, argv: list[str] | None = None, prefix: str | tuple[str, ...] = "--config."
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parses flags and splits off ``--config.a.b=c``, with this ``prefix``, as the override
        ``a.b=c``. Of several prefixes overrides keep theirs: ``config.a.b=c``."""
        cut = len(prefix) if isinstance(prefix, str) else len("--")
        args, unknown = self.parse_known_args(argv)
        overrides, others = [], []
        rest = iter(unknown)
        for item in rest:
            if not item.startswith(prefix):
                others.append(item)
            elif "=" in item:
                overrides.append(item[cut:])
            else:  # --config.a.b c
                value = next(rest, None)
                if value is None or value.startswith("--"):
                    self.error(f"{item}: give a value")
                overrides.append(f"{item[cut:]}={value}")
        if others:
            self.error(f"unrecognized arguments: {' '.join(others)}")
        return args, overrides


started = ""  # the module whose main() runs, where that is not __main__


def start(module: str) -> NoReturn:
    """Imports an entry point and runs its ``main``."""
    global started
    started = module
    run(importlib.import_module(module).main)


def help_early(parser: Callable[[], ArgumentParser], module: str) -> None:
    """Answers ``--help`` before anything is imported that takes seconds, such as jax. An entry
    point calls it between its parser and these imports, with its ``__name__``. Where it was not
    started, but imported, nothing happens."""
    if module in ("__main__", started) and not {"-h", "--help"}.isdisjoint(sys.argv[1:]):
        parser().parse_known_args()


TIME = "%m-%d %H:%M:%S "  # before the lines of what runs for long


def log_to_stderr(level: int = logging.INFO, timed: bool = False) -> None:
    """Plain lines, with the time before them if ``timed``. Of libraries only errors are shown, and
    none of orbax (which logs through absl): it raises in the main thread what its threads log."""
    # absl has installed a handler of its own
    form = "%(asctime)s%(message)s" if timed else "%(message)s"
    logging.basicConfig(level=level, format=form, datefmt=TIME, force=True)
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
    code 2; trouble that may pass, one line and 75. ``kill -USR1`` prints the stacks of all threads,
    and the process goes on."""
    stderr = sys.__stderr__ or sys.stderr
    faulthandler.register(signal.SIGUSR1, file=stderr, all_threads=True)
    output = Stream(sys.stdout)
    sys.stdout, sys.stderr = cast(TextIO, output), cast(TextIO, Stream(sys.stderr))
    log_to_stderr()
    try:
        code = main()
        output.flush()
        if not code and output.failure and not isinstance(output.failure, BrokenPipeError):
            raise UserError(f"the output could not be written ({output.failure.strerror})")
    except UserError as error:
        _fail(error, str(error))
    except KeyboardInterrupt as error:  # before the loop could save, or a second Ctrl-C
        print("interrupted", file=sys.stderr)
        _exit(error, EXIT_INTERRUPTED, "interrupted")
    except OSError as error:
        place = error.filename or error
        if error.errno in DISK_FULL:
            _fail(error, f"no space left: {place}; free some and start the same command again")
        if is_storage_trouble(error):
            line = f"{place}: {error.strerror}; mend that and start the same command again"
            _fail(error, line, EXIT_RESTART)
        _fail_with_traceback(error)
    except Exception as error:
        if words := _platform_trouble(error):
            _fail(error, words)
        _fail_with_traceback(error)
    _end(code or 0)


def is_storage_trouble(error: OSError) -> bool:
    """Whether a disk or a mount failed, though nothing need be wrong with the path: it may pass."""
    return error.errno in _STORAGE


class Stream:
    """``sys.stdout`` or ``sys.stderr`` of a program that does not fail with it: its disk may be
    full, its reader gone, its terminal closed. ``failure`` says so then. What is written from
    there on goes to the other of the two, or nowhere.

    Without it every line of a log could raise, also in the middle of a save.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream
        self.failure: OSError | None = None

    def write(self, text: str) -> int:
        """As of any stream; raises nothing."""
        if not self._do(lambda: self._stream.write(text)):
            if isinstance(self._stream.buffer, io.RawIOBase):  # PYTHONUNBUFFERED: else it is kept
                self._do(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """As of any stream; raises nothing."""
        self._do(self._stream.flush)

    def _do(self, action: Callable[[], object]) -> bool:
        try:
            action()
            return True
        except OSError as error:
            # What is in its buffer would fail again, at the latest when the program ends.
            target = None if self.failure else _other(self._stream.fileno())
            self.failure = self.failure or error
            with open(os.devnull, "w") as null:
                os.dup2(null.fileno() if target is None else target, self._stream.fileno())
            self.flush()
            return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _other(number: int) -> int | None:
    """The other of the descriptors 1 and 2, if that is another file."""
    other = {1: 2, 2: 1}.get(number)
    if other is None or os.path.sameopenfile(other, number):
        return None
    return other


def log_failure() -> str:
    """Why the log of this program cannot be written; empty while it can."""
    failure = sys.stderr.failure if isinstance(sys.stderr, Stream) else None
    return (failure.strerror or str(failure)) if failure else ""


def _platform_trouble(error: Exception) -> str:
    """One line for a platform that jax cannot use, which it tells in many ways."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames or not frames[-1].filename.endswith("jax/_src/xla_bridge.py"):
        return ""
    asked = os.environ.get("JAX_PLATFORMS", "")
    says = f" ({first_line(error)})" if str(error) else ""
    return (
        f"JAX_PLATFORMS={asked}: jax cannot use this platform here{says}; unset it, or install "
        "what it needs (pip install '.[tpu]' or '.[cuda12]')"
    )


def _fail(error: Exception, line: str, code: int | None = None) -> NoReturn:
    line = " ".join(line.split())
    if code is None:
        code = EXIT_RESTART if isinstance(error, TransientError) else EXIT_BAD_INPUT
    if _wants_traceback():
        traceback.print_exc()
    else:
        # One write: print() makes two, between which other threads may write.
        sys.stderr.write(f"error: {line}\n")
    _exit(error, code, line)


def _fail_with_traceback(error: Exception) -> NoReturn:
    for call in _before_traceback:
        call(error)
    traceback.print_exc()
    first = str(error).strip().partition("\n")[0][:300]
    _exit(error, EXIT_FAILURE, f"{type(error).__name__}: {first}")


def _exit(error: BaseException, code: int, line: str) -> NoReturn:
    for call in _before_exit:
        call(error, code, line)
    _end(code)


def _end(code: int) -> NoReturn:
    """Ends the program. Python waits for all threads then, and one of a library may wait for ever,
    as orbax's do after a save that failed: so this has a time limit."""
    # Called when the program really ends, before the waiting: whoever catches SystemExit goes on.
    threading._register_atexit(_limit_end, code)  # type: ignore[attr-defined]  # CPython has it
    sys.exit(code)


def _limit_end(code: int) -> None:
    limit = threading.Timer(_LONGEST_END, os._exit, [code])
    limit.daemon = True
    limit.start()
    # Called first of all, when the threads have ended: jax may wait longer for other processes.
    atexit.register(limit.cancel)


def _wants_traceback() -> bool:
    return "--traceback" in sys.argv or bool(os.environ.get("WEBSSL_TRACEBACK"))
