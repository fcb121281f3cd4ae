"""Starts real training processes, small enough to finish in seconds, and kills them."""

import atexit
import concurrent.futures
import dataclasses
import functools
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

from tests.e2e import forks

ROOT = pathlib.Path(__file__).parent.parent.parent
MICRO = {
    "model.size": "micro",
    "method.view.image_size": 32,
    "method.decoder.width": 32,
    "method.decoder.heads": 2,
    "global_batch": 16,
    "total_steps": 12,
    "optim.warmup_steps": 2,
    "optim.lr": 1e-3,
    "optim.lr_scaling": "none",
    "sharding.max_unsharded_fraction": 0.2,  # small parts weigh more in a small network
    "log.every_steps": 1,
    "log.trackers": "none",
    "pictures.kinds": "none",
    "checkpoint.every_steps": 3,
    "data.threads": 2,
    "data.retry_minutes": 1,
    # whoever hangs prints its stacks, well before a test gives up on it
    "host.stuck_minutes": 3,
    "host.stuck_pause_minutes": 4,
}


@dataclasses.dataclass
class Result:
    code: int
    output: str


SPEC = "configs/web_mae.py:size=tiny"


def command(workdir, overrides=(), flags=(), spec=SPEC):
    """``overrides`` go before MICRO; one of None takes MICRO's away."""
    settings = {k: v for k, v in (MICRO | dict(overrides)).items() if v is not None}
    return [
        "-m",
        "webssl_jax.train",
        "--config",
        str(ROOT / spec),
        "--workdir",
        str(workdir),
        *flags,
        *(f"--config.{key}={value}" for key, value in settings.items()),
    ]


def environment(devices=1, processes=1):
    # The flags of tests/conftest.py.
    xla = f"--xla_force_host_platform_device_count={devices} --xla_cpu_multi_thread_eigen=false"
    if processes == 1:
        # Not for several processes: their orders of collectives then differ, and gloo ends the run
        # with "Received data size doesn't match expected size".
        xla += " --xla_cpu_enable_concurrency_optimized_scheduler=false"
    return os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "XLA_FLAGS": xla}


def start(
    workdir, overrides=(), devices=1, flags=(), largest_file_kib=None, processes=1, spec=SPEC
):
    arguments = command(workdir, overrides, flags, spec)
    return forks.Process(_server(), arguments, environment(devices, processes), largest_file_kib)


@functools.cache
def _server():
    """The address of this process's own forking process (forks.py), which ends with it."""
    address = pathlib.Path(tempfile.mkdtemp(prefix="webssl_forks_")) / "socket"
    command = [sys.executable, "-m", "tests.e2e.forks", str(address)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    server = subprocess.Popen(command, env=environment(), cwd=ROOT, text=True, **pipes)

    def end():
        server.stdin.close()
        server.wait(timeout=60)
        shutil.rmtree(address.parent)

    atexit.register(end)
    assert server.stdout.readline() == "ready\n"
    return address


def train(workdir, overrides=(), devices=1, flags=(), largest_file_kib=None, spec=SPEC):
    return _result(start(workdir, overrides, devices, flags, largest_file_kib, spec=spec), 300)


def python(*arguments, timeout=300):
    """Runs an entry point or a tool of the project to its end."""
    return _result(start_program(*arguments), timeout)


def start_program(*arguments):
    return forks.Process(_server(), list(map(str, arguments)), environment())


def _result(process, timeout):
    try:
        output, _ = process.communicate(timeout)
    finally:
        process.kill()
    return Result(process.returncode, output)


def train_together(
    workdir,
    processes,
    devices=1,
    overrides=(),
    kill_after_step=None,
    sent=signal.SIGKILL,
    to=slice(None),
    spec=SPEC,
    wait_for=slice(None),
):
    """One run of several processes with ``devices`` devices each. Those of ``to`` get the signal
    ``sent``, or are handed to it, once ``kill_after_step`` is written. Returns the results of those
    of ``wait_for``, and kills the others then."""
    port = free_port()
    path = pathlib.Path(workdir) / "metrics.jsonl"
    before = _written(path)
    running = [
        start(
            workdir,
            overrides,
            devices,
            flags=[
                "--coordinator",
                f"localhost:{port}",
                "--num-processes",
                str(processes),
                "--process-id",
                str(i),
            ],
            processes=processes,
            spec=spec,
        )
        for i in range(processes)
    ]
    try:
        if kill_after_step is not None:
            while _written(path) == before or last_step(path) < kill_after_step:
                ended = [process for process in running if process.poll() is not None]
                assert not ended, ended[0].communicate()[0]
                time.sleep(0.005)
            for process in running[to]:
                sent(process) if callable(sent) else process.send_signal(sent)
        outputs = outputs_of(running[wait_for])
    finally:
        for process in running:
            process.kill()
    print(*outputs, sep="\n---- the next process\n")  # whole, where pytest cuts an assertion's
    return [Result(p.returncode, output) for p, output in zip(running[wait_for], outputs)]


def outputs_of(processes, timeout=300):
    """What each printed, once all have ended. Read at the same time: a process whose pipe is full
    stops, and with it all that wait for it."""
    with concurrent.futures.ThreadPoolExecutor(len(processes)) as pool:
        return list(pool.map(lambda process: process.communicate(timeout=timeout)[0], processes))


def kill_loader_worker(process):
    """Kills the one process that decodes for a training with ``data.workers`` of 1."""
    children = ["pgrep", "--parent", str(process.pid), "--full", "multiprocessing.spawn"]
    (worker,) = subprocess.run(children, capture_output=True, check=True).stdout.split()
    os.kill(int(worker), signal.SIGKILL)


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def kill_at(process, path, step, sent=signal.SIGKILL):
    """Waits until ``metrics.jsonl`` holds ``step``, then sends the signal. Returns the output."""
    wait_for_step(process, path, step)
    process.send_signal(sent)
    return process.communicate(timeout=120)[0]


def wait_for_step(process, path, step, timeout=240.0):
    """Waits until ``metrics.jsonl`` holds ``step``, of a process that has just been started."""
    deadline, before = time.monotonic() + timeout, _written(path)
    while _written(path) == before or last_step(path) < step:
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise AssertionError(f"never reached step {step}: {process.communicate()[0]}")
        time.sleep(0.005)


def _written(path):
    """When; rows of an earlier start are older."""
    return path.stat().st_mtime_ns if path.exists() else None


def last_step(path):
    lines = path.read_text().split("\n")[:-1]
    return json.loads(lines[-1])["step"] if lines else -1


def losses(workdir):
    """{step: loss as written, digit for digit}."""
    rows = [
        json.loads(line)
        for line in (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()
    ]
    steps = [row["step"] for row in rows]
    assert steps == sorted(set(steps)), f"a step is missing its place or written twice: {steps}"
    return {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}
