"""Safetensors written as a stream: the official library reads them, damage is named, a full disk
leaves nothing."""

import json
import resource
import signal

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from webssl_jax.weights import safetensors_io as io
from webssl_jax.weights.tables import WeightsError


def make_tensors():
    rng = np.random.default_rng(0)
    shapes = {"b.weight": (5, 7), "a": (1, 1, 3), "scalar": (), "c.weight": (4, 3, 2, 2)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def specs_of(tensors, dtype="float32"):
    return [io.Spec(name, array.shape, dtype) for name, array in tensors.items()]


def write(folder, dtype="float32", **options):
    tensors = make_tensors()
    return io.write_folder(folder, specs_of(tensors, dtype), iter(tensors.items()), **options)


def test_the_official_library_reads_what_we_write_bit_for_bit(tmp_path):
    assert write(tmp_path) == [tmp_path / "model.safetensors"]
    with safe_open(tmp_path / "model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(make_tensors())
        for name, array in make_tensors().items():
            np.testing.assert_array_equal(file.get_tensor(name), array)


def test_we_read_what_the_official_library_writes_bit_for_bit(tmp_path):
    save_file(make_tensors(), tmp_path / "x.safetensors")
    reader = io.open_file(tmp_path / "x.safetensors")
    assert set(reader.keys()) == set(make_tensors())
    for name, array in make_tensors().items():
        np.testing.assert_array_equal(reader[name].read(), array)


def test_transposed_views_are_written_in_their_own_order(tmp_path):
    array = np.arange(6, dtype=np.float32).reshape(2, 3).T
    io.write_folder(tmp_path, [io.Spec("x", array.shape)], [("x", array)])
    np.testing.assert_array_equal(io.open_file(tmp_path)["x"].read(), array)


def test_bfloat16_is_rounded_to_nearest(tmp_path):
    write(tmp_path, dtype="bfloat16")
    reader = io.open_file(tmp_path)
    for name, array in make_tensors().items():
        assert reader[name].read().dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(reader[name].read(), array.astype(ml_dtypes.bfloat16))


def test_over_the_size_limit_there_are_several_files_and_an_index(tmp_path):
    files = write(tmp_path, max_file_bytes=160)
    assert [f.name for f in files] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]
    index = json.loads(files[-1].read_text())
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in make_tensors().values())
    reader = io.open_file(tmp_path)
    for name, array in make_tensors().items():
        np.testing.assert_array_equal(reader[name].read(), array)
    files[1].unlink()
    with pytest.raises(WeightsError, match="not there: model-00002-of-00002.safetensors"):
        io.open_file(tmp_path)


def test_a_full_disk_is_one_line_and_leaves_nothing_behind(tmp_path):
    """The limit on the size of a file stands in for the end of the disk: the same failing write."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(
            WeightsError, match="cannot write .*model.safetensors: File too large"
        ) as caught:
            io.write_folder(tmp_path, [io.Spec("x", (4096,))], [("x", np.zeros(4096, np.float32))])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []


def test_an_error_in_the_stream_leaves_an_earlier_file_as_it_was(tmp_path):
    write(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()

    def stream():
        yield next(iter(make_tensors().items()))
        raise WeightsError("diverged")

    with pytest.raises(WeightsError, match="diverged"):
        io.write_folder(tmp_path, specs_of(make_tensors()), stream())
    assert [f.name for f in tmp_path.iterdir()] == ["model.safetensors"]
    assert (tmp_path / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:5],
        lambda data: data[:40],
        lambda data: data[:-1],
        lambda data: data + b"\0",
        lambda data: b"\xff" * 8 + data[8:],
        lambda data: data[:8] + b"[" + data[9:],
        lambda data: data.replace(b'"F32"', b'"Q99"', 1),
        lambda data: data.replace(b'"shape":[5,7]', b'"shape":[5,8]'),
        lambda data: data.replace(b'"shape":[5,7]', b'"shape":["]]]'),
    ],
)
def test_a_damaged_file_is_refused_by_name(tmp_path, damage):
    write(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(WeightsError, match="model.safetensors") as caught:
        io.open_file(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_refused_by_name(tmp_path):
    with pytest.raises(WeightsError, match="model.safetensors: no such file"):
        io.open_file(tmp_path)
