"""PyTorch's files without PyTorch: the same numbers both ways, and nothing in them ever runs."""

import argparse
import collections
import datetime
import functools
import os
import pathlib
import pickle
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest
import torch

from tests.weights import samples
from webssl_jax.weights import load, torch_file
from webssl_jax.weights.safetensors_io import Spec
from webssl_jax.weights.stored import Stored, WeightsError


def save(path, value, **options):
    torch.save(value, path, **options)
    return path


def read(tensor):
    array = tensor.read()
    return array.astype(np.float32) if array.dtype == ml_dtypes.bfloat16 else array


def test_every_tensor_that_torch_saves_is_read_bit_for_bit(tmp_path):
    torch.manual_seed(0)
    base = torch.randn(6, 4, 5)
    tensors = {
        "float": base,
        "half": base.half(),
        "bfloat": base.bfloat16(),
        "long": torch.arange(7),
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 3),
        "transposed": base.permute(2, 0, 1),
        "slice": base[1:3, :, 2],
        "row": base[4],
        "parameter": torch.nn.Parameter(base.clone()),
    }
    found = torch_file.open_file(save(tmp_path / "x.pth", tensors))
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert found[name].shape == tuple(tensor.shape)
        wanted = tensor.detach()
        wanted = wanted.float() if wanted.dtype == torch.bfloat16 else wanted
        np.testing.assert_array_equal(read(found[name]), wanted.numpy(), err_msg=name)
    part = found["transposed"].read(part=2, parts=5)
    np.testing.assert_array_equal(part, tensors["transposed"].numpy()[2:3])


def test_a_training_checkpoint_gives_its_weights_and_all_beside_them_is_read_past(tmp_path):
    """Original MAE saves optimiser, scaler, epoch and an argparse.Namespace beside the model;
    others a figure of NumPy, paths, dates."""
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    checkpoint = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "epoch": 799,
        "scaler": {"scale": 65536.0, "growth_factor": 2.0},
        "args": argparse.Namespace(lr=1.5e-4, output_dir=pathlib.Path("out"), accum=None),
        "best_acc": np.float64(71.3),
        "labels": {np.int64(3): np.arange(4.0)},
        "shape": torch.Size([2, 3]),
        "where": [torch.device("cpu"), torch.float16, {"a set"}, 1 + 2j],
        "meters": collections.defaultdict(list, loss=[1.0]),
        "seen": collections.Counter("aab"),
        "queue": collections.deque([1]),
        "at": datetime.datetime(2025, 4, 1),
    }
    found = torch_file.open_file(save(tmp_path / "x.pth", checkpoint))
    assert found["epoch"] == 799 and found["scaler"]["scale"] == 65536.0
    assert vars(found["args"]) == {}  # an empty thing
    np.testing.assert_array_equal(read(found["model"]["weight"]), model.weight.detach().numpy())
    assert isinstance(found["optimizer"]["state"][0]["exp_avg"], Stored)


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_loads_what_we_write_bit_for_bit(tmp_path, mmap):
    rng = np.random.default_rng(0)
    tensors = {
        "a.weight": rng.normal(size=(70, 3)),
        "b": rng.normal(size=()),
        "c": np.zeros((0, 2)),
    }
    tensors = {name: np.asarray(x, np.float32) for name, x in tensors.items()}
    specs = [Spec("a.weight", (70, 3)), Spec("b", (), "bfloat16"), Spec("c", (0, 2))]
    extra = {"webssl_jax": {"heads": 300, "big": 2**40, "ratio": 0.75, "on": True, "name": "é"}}
    torch_file.write_file(tmp_path / "x.pth", "model", specs, iter(tensors.items()), extra)
    found = torch.load(tmp_path / "x.pth", weights_only=True, mmap=mmap)
    assert found["webssl_jax"] == extra["webssl_jax"]
    assert list(found["model"]) == list(tensors)
    assert found["model"]["b"].dtype == torch.bfloat16
    np.testing.assert_array_equal(found["model"]["a.weight"].numpy(), tensors["a.weight"])
    np.testing.assert_array_equal(
        found["model"]["b"].float().numpy(), tensors["b"].astype(ml_dtypes.bfloat16)
    )
    assert zipfile.ZipFile(tmp_path / "x.pth").testzip() is None


def test_what_would_be_lost_beside_bare_tensors_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no place for webssl_jax"):
        torch_file.write_file(tmp_path / "x.pth", None, [], iter(()), {"webssl_jax": {"heads": 2}})
    assert list(tmp_path.iterdir()) == []


class _Runs:
    """Unpickling it calls a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "make, named",
    [
        (lambda mark: _Runs(os.system, f"touch {mark}"), "posix.system"),
        (lambda mark: _Runs(eval, f"open({str(mark)!r}, 'w')"), "__builtin__.eval"),
        (lambda mark: _Runs(pathlib.Path.touch, mark), "__builtin__.getattr"),
        (lambda mark: functools.partial(os.mkdir, mark), "functools.partial"),
        (lambda mark: np.save, "numpy.save"),
        (lambda mark: _Runs(int, "3"), "__builtin__.long"),
        (lambda mark: _Runs(argparse.Namespace, "x"), "argparse.Namespace"),
        (lambda mark: _Runs(torch.load, str(mark)), "torch.serialization.load"),
    ],
)
def test_a_pickle_that_would_run_code_is_refused_by_name_and_runs_nothing(tmp_path, make, named):
    mark = tmp_path / "mark"
    path = save(tmp_path / "x.pth", {"model": {"w": torch.zeros(2)}, "args": make(mark)})
    with pytest.raises(WeightsError, match=f"holds .*({named})") as caught:
        torch_file.open_file(path)
    assert "\n" not in str(caught.value) and not mark.exists()


def test_files_of_old_torch_and_bare_pickles_are_refused_with_the_way_to_convert(tmp_path):
    old = save(tmp_path / "a.pth", {"w": torch.zeros(2)}, _use_new_zipfile_serialization=False)
    bare = tmp_path / "b.pth"
    bare.write_bytes(pickle.dumps({"w": np.zeros(2)}))
    for path in (old, bare):
        with pytest.raises(WeightsError, match="before 1.6.*torch.save"):
            torch_file.open_file(path)


def archive(path, description, data=bytes(8), **options):
    with zipfile.ZipFile(path, "w", **options) as file:
        file.writestr("x/data.pkl", description)
        file.writestr("x/data/0", data)
    return path


def describe(numbers=2, shape=(2,), strides=(1,), first=0):
    """The pickle of {"w": tensor} with any claims about it."""
    specs = [Spec("w", (2,))]
    data = torch_file._pickle("model", specs, {})
    number = b"J" + struct.pack("<i", 2)
    one = b"(J" + struct.pack("<i", 1) + b"t"

    def integer(n):
        return b"\x8a\x08" + struct.pack("<q", n)

    def tuple_of(values):
        return b"(" + b"".join(map(integer, values)) + b"t"

    head, claim, rest = data.partition(number + b"tQ")
    rest = rest.replace(
        b"J\0\0\0\0(" + number + b"t" + one, integer(first) + tuple_of(shape) + tuple_of(strides)
    )
    return head + integer(numbers) + b"tQ" + rest


def test_the_claims_of_the_next_test_are_read_when_they_are_true(tmp_path):
    found = torch_file.open_file(archive(tmp_path / "x.pth", describe()))
    assert found["model"]["w"].shape == (2,)


@pytest.mark.parametrize(
    "claims",
    [
        dict(numbers=2**40),
        dict(shape=(2**40,)),
        dict(shape=(2**31, 2**31), strides=(0, 0)),
        dict(shape=(3,)),
        dict(first=1),
        dict(first=-1),
        dict(shape=(-2,)),
        dict(strides=(2,)),
        dict(strides=(-1,)),
        dict(shape=(2, 1)),
    ],
    ids=str,
)
def test_a_tensor_that_claims_more_than_its_storage_holds_is_refused(tmp_path, claims):
    with pytest.raises(WeightsError, match="x.pth: ") as caught:
        torch_file.open_file(archive(tmp_path / "x.pth", describe(**claims)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "description, named",
    [
        (b"\x80\x02]q\x01.", "holds no dict"),
        (b"\x80\x02}r\xff\xff\xff\x7f.", None),  # a memo of 2^31 places
        (b"\x80\x02" + b"(" * 100000 + b"t" * 100000 + b".", "no dict"),
        (b"\x80\x05\x8e" + b"\xff" * 8 + b".", "damaged"),  # bytes of 2^64
        (b"\x80\x02}U\x01ah\x09s.", "damaged"),  # a memo that was never written
        (b"\x80\x02}(U\x01au.", "damaged"),
        (b"\x80\x02s.", "damaged"),
        (b"\x80\x02}", "damaged"),
        (b"", "damaged"),
        (b"\x80\x02}\x97.", "READONLY_BUFFER|NEXT_BUFFER"),
    ],
    ids=str,
)
def test_a_pickle_bomb_ends_in_one_line_and_takes_no_memory(tmp_path, description, named):
    path = archive(tmp_path / "x.pth", description)
    if named is None:
        assert torch_file.open_file(path) == {}
        return
    with pytest.raises(WeightsError, match=named) as caught:
        torch_file.open_file(path)
    assert "\n" not in str(caught.value)


def test_compressed_members_are_refused(tmp_path):
    path = archive(tmp_path / "x.pth", describe(), bytes(8), compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(WeightsError, match="data.pkl is compressed"):
        torch_file.open_file(path)


def test_one_flipped_bit_in_a_tensor_is_noticed_by_its_checksum(tmp_path):
    path = samples.write("mae-pth", tmp_path)
    file = torch_file.open_file(path)["model"]["blocks.1.mlp.fc1.weight"]
    data = bytearray(path.read_bytes())
    data[file.offset + 100] ^= 1
    path.write_bytes(data)
    with pytest.raises(WeightsError, match="does not have its checksum"):
        load.load(path)


@pytest.mark.parametrize("content", [b"", b"PK", b"PK\x03\x04", b"<html>", bytes(1000)])
def test_what_is_no_checkpoint_is_refused_by_name(tmp_path, content):
    path = tmp_path / "x.pth"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match="x.pth"):
        torch_file.open_file(path)


def test_a_dict_of_names_that_stands_for_itself_is_no_endless_walk(tmp_path):
    model = collections.OrderedDict()
    model["itself"] = model
    with pytest.raises(WeightsError, match="holds no tensors"):
        load.load(save(tmp_path / "x.pth", {"model": model}))


def test_a_torchscript_archive_is_named_as_one_with_the_way_to_its_weights(tmp_path):
    with zipfile.ZipFile(tmp_path / "clip.pt", "w", compression=zipfile.ZIP_DEFLATED) as file:
        for name in ("data.pkl", "code/__torch__.py", "constants.pkl"):  # of torch.jit.save
            file.writestr(f"clip/{name}", b"x")
    with pytest.raises(WeightsError, match="is a TorchScript archive.*state_dict") as caught:
        torch_file.open_file(tmp_path / "clip.pt")
    assert "\n" not in str(caught.value)
