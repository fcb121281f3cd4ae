"""Every test runs on the CPU, as eight devices, so that meshes are real."""

import atexit
import logging
import os
import shutil
import signal
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    # Else XLA's CPU devices may start independent collectives in different orders and wait for each
    # other for ever: seen on two cores with eight devices, with the first flag alone in two of
    # three runs of tests/methods/test_dino.py. With the second a device has one order.
    " --xla_cpu_enable_concurrency_optimized_scheduler=false"
    " --xla_cpu_multi_thread_eigen=false"
)
os.environ["HF_HUB_OFFLINE"] = "1"
# Tests check what is computed, not how fast: without XLA's optimisations for the CPU, compiling
# takes half as long, and it is most of their time. What is compiled for TPUs stays the same.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
# What one test compiles, no other does again: nor pytest's other workers, which have this from it,
# nor the processes that tests start.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="webssl_tests_")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import pytest

from tests.e2e import runner
from tests.once import once

# A shell that starts something in the background has Ctrl-C ignored in it, and in all that it
# starts in turn; the tests send Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def logging_as_before():
    """An entry point that a test calls sets up the logging of its process, for itself alone."""
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    yield
    root.setLevel(level)
    root.handlers[:] = handlers


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory):
    """The losses of a run that nobody disturbed."""

    def make(workdir):
        result = runner.train(workdir)
        assert result.code == 0, result.output
        return runner.losses(workdir)

    return {int(step): loss for step, loss in once(tmp_path_factory, "unbroken", make).items()}
