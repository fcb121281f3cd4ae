import pytest

from tests.e2e import runner


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
