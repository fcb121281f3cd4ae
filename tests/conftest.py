"""Every test runs on the CPU, as eight devices, so that meshes are real."""

import os
import signal

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

import pytest

from tests.e2e import runner

# A shell that starts something in the background has Ctrl-C ignored in it, and in all that it
# starts in turn; the tests send Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory, cache):
    """The losses of a run that nobody disturbed."""
    workdir = tmp_path_factory.mktemp("unbroken")
    result = runner.train(workdir, cache=cache)
    assert result.code == 0, result.output
    return runner.losses(workdir)
