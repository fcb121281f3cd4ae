"""A training whose machine and storage fail: arguments are those of ``webssl_jax.train``.

    attempt 1   after step 2 the shards are taken away and the loader worker is killed; the third
                open of a shard that fails brings them back. After step 7 the disk is read-only.
    attempt 2   the disk is read-only
    from then   nothing but this: every hundredth open of a shard fails

Python tells a hook of every file that it opens, in this process and in the loader's; what the hook
raises is what the caller gets, as from the kernel.
"""

import errno
import os
import pathlib
import signal
import subprocess
import sys

SET = pathlib.Path(os.environ["FAULTS_SET"])  # a folder of shards
AWAY = SET.with_name("away")
WORKDIR = os.environ["FAULTS_WORKDIR"]
ATTEMPTS = pathlib.Path(os.environ["FAULTS_ATTEMPTS"])
CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink"}
read_only, opens, missed = False, 0, 0


def hook(event, arguments):
    global opens, missed
    if event != "open" and event not in CHANGES:
        return
    path = arguments[0]
    if not isinstance(path, (str, os.PathLike)):
        return
    path = os.fspath(path)
    writes = event in CHANGES or arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if read_only and writes and path.startswith(WORKDIR):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)
    if event == "open" and path.startswith(f"{SET}/"):
        opens += 1
        if opens % 100 == 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        if not SET.exists():
            missed += 1
            if missed == 3:
                AWAY.rename(SET)


def after_step(step):
    """Attempt 1."""
    global read_only
    if step == 2:
        SET.rename(AWAY)
        children = ["pgrep", "--parent", str(os.getpid()), "--full", "multiprocessing.spawn"]
        (worker,) = subprocess.run(children, capture_output=True, check=True).stdout.split()
        os.kill(int(worker), signal.SIGKILL)
    if step == 7:
        read_only = True


sys.addaudithook(hook)

if __name__ == "__main__":
    from webssl_jax import cli, train
    from webssl_jax.telemetry.writer import MetricWriter

    attempt = int(ATTEMPTS.read_text()) + 1
    ATTEMPTS.write_text(str(attempt))
    read_only = attempt == 2
    if attempt == 1:
        write = MetricWriter.scalars

        def scalars(self, step, values):
            write(self, step, values)
            after_step(step)

        MetricWriter.scalars = scalars
    cli.run(train.main)
