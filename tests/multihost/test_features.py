"""Features made by several processes on several devices give the figures of one."""

import pytest

from tests.multihost.test_processes import _found


@pytest.mark.parametrize(
    "rows, devices", [("knn", 1), pytest.param("knn,probe", 4, marks=pytest.mark.slow)]
)
def test_two_processes_and_eight_devices_give_the_figures_of_one(tmp_path, rows, devices):
    """The same features up to rounding, so at most an item in a hundred may fall otherwise."""
    (alone,) = _found("feature_worker", 1, 1, tmp_path / "alone", rows)
    both = _found("feature_worker", 2, devices, tmp_path / "both", rows)
    assert both[0] == both[1]
    others = [both[0]]
    if devices > 1:
        others += _found("feature_worker", 1, 2 * devices, tmp_path / "eight", rows)
    for other in others:
        assert other["fingerprint"] == alone["fingerprint"]
        for row, one in alone["rows"].items():
            theirs = other["rows"][row]
            assert theirs["data"] == one["data"]
            pairs = [(theirs["metrics"], one["metrics"])]
            pairs += [(theirs["baselines"][name], x) for name, x in one["baselines"].items()]
            for found, wanted in pairs:
                assert found == pytest.approx(wanted, abs=0.011), row
            hits = [x["items"]["top1"] for x in (one, theirs)]
            assert sum(a != b for a, b in zip(*hits)) <= len(hits[0]) // 100 + 1
