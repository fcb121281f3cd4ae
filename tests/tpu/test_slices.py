import pytest

from webssl_jax.config import UserError
from webssl_jax.sharding import slices
from webssl_jax.telemetry.throughput import PEAK_FLOPS

# name, chips, devices, machines: the naming traps
SLICES = [
    ("v4-512", (4, 8, 8), 256, 256, 64),
    ("v5p-8", (2, 2, 1), 4, 4, 1),
    ("v5p-256", (4, 4, 8), 128, 128, 32),
    ("v5p-512", (4, 8, 8), 256, 256, 64),
    ("v5p-3072", (8, 12, 16), 1536, 1536, 384),
    ("v5p-17920", (16, 20, 28), 8960, 8960, 2240),
    ("v5e-8", (2, 4), 8, 8, 1),
    ("v5e-256", (16, 16), 256, 256, 64),
    ("v6e-256", (16, 16), 256, 256, 64),
    ("tpu7x-16", (2, 2, 2), 8, 16, 2),
]


@pytest.mark.parametrize("name, sides, chips, devices, hosts", SLICES)
def test_a_cloud_name_means_what_the_cloud_means_by_it(name, sides, chips, devices, hosts):
    found = slices.find(name)
    assert (found.sides, found.chips, found.hosts) == (sides, chips, hosts)
    assert found.chips * found.chip.devices == devices


def test_gclouds_own_word_for_v5e_is_understood():
    assert slices.find("v5litepod-256") == slices.find("v5e-256")


@pytest.mark.parametrize(
    "name, near",
    [
        ("v5p-500", "v5p-384, v5p-512"),
        ("v5e-512", "v5e-256"),
        ("v5-256", "v5"),
        ("v5p", "v5p-256"),
        ("512", "v5p-256"),
    ],
)
def test_a_name_that_does_not_exist_is_answered_by_those_that_do(name, near):
    with pytest.raises(UserError, match=f"--slice {name}: .*{near}"):
        slices.find(name)


def test_every_generation_knows_its_public_peak():
    assert all(chip.device_kind in PEAK_FLOPS for chip in slices.CHIPS.values())


def test_rings_have_twice_the_links_of_lines():
    assert slices.find("v5p-128").ici == 6 * 90e9  # a torus of 4 x 4 x 4
    assert slices.find("v5p-64").ici == 3 * 90e9  # 2 x 4 x 4 is no torus
    assert slices.find("v5e-256").ici == 4 * 45e9
    assert slices.find("tpu7x-128").ici == 6 * 100e9 / 2  # two devices share a chip's links


@pytest.mark.parametrize("name", ["v4-8", "v5e-8", "v5p-8", "v6e-4", "tpu7x-8", "v5e-1"])
def test_the_compiler_has_the_devices_that_the_name_says(name):
    slice_ = slices.find(name)
    devices = slice_.devices()
    assert len(devices) == slice_.chips * slice_.chip.devices
    assert devices[0].device_kind == slice_.chip.device_kind


def test_two_slices_are_two_for_the_compiler():
    devices = slices.find("v5e-16").devices(2)
    assert [device.slice_index for device in devices] == [0] * 16 + [1] * 16


def test_without_libtpu_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(slices.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'webssl_jax\[plan\]'"):
        slices.find("v5e-4").devices()
