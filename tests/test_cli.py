"""How every entry point ends: also when its output breaks, or a thread never ends."""

import errno
import os
import pathlib
import subprocess
import sys

from webssl_jax import cli

ROOT = pathlib.Path(__file__).parent.parent
STUCK = """
import logging, sys, threading
from webssl_jax import cli
from webssl_jax.errors import TransientError

def main():  # a thread that waits for ever, as orbax's do after a save that failed
    threading.Thread(target=threading.Event().wait).start()
    if sys.argv[1] == "fails":
        raise TransientError("words")
    logging.info("words")

cli._LONGEST_END = 0.2
cli.run(main)
"""


def test_a_program_ends_in_time_with_its_code_and_its_words_find_a_way_out():
    """Though a thread never ends, and the disk of its log is full."""
    for unbuffered, ending, code in (("", "fails", 75), ("1", "fails", 75), ("1", "succeeds", 0)):
        with open("/dev/full", "w") as full:
            done = subprocess.run(
                [sys.executable, "-c", STUCK, ending],
                cwd=ROOT,
                env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
                stdout=subprocess.PIPE,
                stderr=full,
                timeout=300,
                text=True,
            )
        assert done.returncode == code
        assert done.stdout == ("error: words\n" if code else "words\n")


def test_a_caller_that_catches_the_end_goes_on_without_a_time_limit():
    """As a notebook does, or these tests."""
    lines = ["import time", "from webssl_jax import cli", "cli._LONGEST_END = 0.05"]
    lines += ["try: cli.run(lambda: 0)", "except SystemExit: time.sleep(0.5)", "print('goes on')"]
    code = "\n".join(lines)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "goes on\n"), done.stderr


def test_a_stream_that_breaks_raises_nothing_and_says_why():
    reader, writer = os.pipe()
    piped, full = cli.Stream(open(writer, "w")), cli.Stream(open("/dev/full", "w"))
    print("a line", file=piped, flush=True)
    assert os.read(reader, 100) == b"a line\n" and piped.failure is None
    os.close(reader)
    for stream, code in ((piped, errno.EPIPE), (full, errno.ENOSPC)):
        print("lost", file=stream, flush=True)
        assert stream.failure.errno == code
        print("more", file=stream, flush=True)
        stream.close()
