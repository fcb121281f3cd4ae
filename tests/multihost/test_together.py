"""What two processes compute together is what one process computes. One launch
serves all."""

import json
import subprocess
import sys

import numpy as np
import pytest

from tests.e2e import runner
from tests.multihost import contrasts, features, probes
from tests.once import once


def launch(folder, devices, *modules, timeout=300):
    """What each of two processes with ``devices`` devices finds: {module: what its ``compute``
    returns}."""
    address = f"localhost:{runner.free_port()}"
    command = [sys.executable, "-m", "tests.multihost.worker", address, "2"]
    running = [
        subprocess.Popen(
            [*command, str(i), folder, *modules],
            env=runner.environment(devices, processes=2),
            cwd=runner.ROOT,
            text=True,
            stdout=subprocess.PIPE,
        )
        for i in range(2)
    ]
    try:
        printed = runner.outputs_of(running, timeout)
    finally:
        for process in running:
            process.kill()
    return [json.loads(text.split("FOUND ")[1]) for text in printed]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    modules = ("contrasts", "local_disks", "features")
    return once(tmp_path_factory, "two", lambda folder: launch(folder, 2, *modules))


def test_contrasts_and_their_gradients_are_those_of_one_process(found):
    """Softmax and sigmoid; gradients of both sides' features, of scale and bias. float32, only the
    order of sums differs: 2e-6 relative, and 1e-7 of gradients near zero."""
    alone = contrasts.compute()
    for together in (one["contrasts"] for one in found):
        assert (alone["devices"], together["devices"]) == (8, 4)
        for name, expected in alone["found"].items():
            assert len(expected) == {"softmax": 4, "sigmoid": 5}[name]
            for ours, theirs in zip(together["found"][name], expected, strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=2e-6, atol=1e-7)


def test_the_replicas_of_a_slice_share_out_what_they_write_to_their_disks(found):
    """Each array once, about half of the bytes each, and both get the whole back, bit for bit."""
    one, other = (each["local_disks"] for each in found)
    assert one["same"] and other["same"]
    assert not set(one["names"]) & set(other["names"])
    assert one["written"] + other["written"] == one["state"]
    assert 0.3 < one["written"] / one["state"] < 0.7


def test_features_and_their_neighbours_are_those_of_one_process(found, tmp_path):
    _assert_same_figures([each["features"] for each in found], features.compute(tmp_path))


@pytest.mark.slow
def test_heads_fitted_by_two_processes_of_four_devices_are_those_of_one(tmp_path):
    found = launch(tmp_path / "two", 4, "probes", timeout=3000)
    _assert_same_figures([each["probes"] for each in found], probes.compute(tmp_path / "one"))


def _assert_same_figures(found, alone):
    """The same features up to rounding, so at most an item in a hundred may fall otherwise; of
    scenes a pixel in a hundred."""
    first, second = found
    assert first == second
    assert first["fingerprint"] == alone["fingerprint"]
    for row, one in alone["rows"].items():
        theirs = first["rows"][row]
        assert theirs["data"] == one["data"]
        pairs = [(theirs["metrics"], one["metrics"])]
        pairs += [(theirs["baselines"][name], x) for name, x in one["baselines"].items()]
        for ours, wanted in pairs:
            assert ours == pytest.approx(wanted, abs=0.011), row
        if "top1" in one["items"]:
            hits = [x["items"]["top1"] for x in (one, theirs)]
            assert sum(a != b for a, b in zip(*hits)) <= len(hits[0]) // 100 + 1
