"""For packages of tests that check arithmetic, not speed: XLA's optimisations off halves their
time, which is nearly all compiling. A conftest.py imports the fixture."""

import jax
import pytest


@pytest.fixture(autouse=True, scope="package")
def quick_compilation():
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
