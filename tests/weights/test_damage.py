"""240 random damages of weight files: each ends in one clear line or in an unchanged load.

Out of reach without a checksum, and so not among them: another finite number in the payload of a
safetensors file, and another plausible value in a config.json. PyTorch's files have checksums.
"""

import json
import os
import random
import shutil
import struct

import numpy as np
import pytest

from tests.weights import samples
from webssl_jax import params
from webssl_jax.config import UserError
from webssl_jax.weights import load, safetensors_io

DAMAGES = 240


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """[(path, what it loads)] of every container: one file, several with an index, a .pth."""
    root = tmp_path_factory.mktemp("whole")
    paths = []
    for family in samples.FAMILIES:
        paths.append(samples.write(family, root))
    for family in ("hf-clip", "open-clip", "open-clip-pth"):
        paths.append(samples.write(family, root, samples.make_clip()))
    (root / "shards").mkdir()
    paths.append(samples.write("hf-vit-mae", root / "shards", max_file_bytes=40_000))
    return [(path, load.load(path)) for path in paths]


def overwrite(file, begin, end, rng):
    """One bit, one byte or a stretch between ``begin`` and ``end``."""
    data = bytearray(file.read_bytes())
    place = rng.randrange(begin, min(end, len(data)))
    kind = rng.randrange(3)
    if kind == 0:
        data[place] ^= 1 << rng.randrange(8)
    elif kind == 1:
        data[place] = rng.randrange(256)
    else:
        length = rng.randrange(1, 64)
        stop = min(place + length, end, len(data))
        data[place:stop] = bytes(rng.randrange(256) for _ in range(stop - place))
    file.write_bytes(data)
    return f"{('bit', 'byte', 'stretch')[kind]} at {place}"


def header_end(file):
    return 8 + struct.unpack("<Q", file.read_bytes()[:8])[0]


def damage(path, rng):
    """Damages a copy in one way and says which."""
    files = sorted(p for p in path.iterdir()) if path.is_dir() else [path]
    file = rng.choice([f for f in files if f.name != "README.md"])
    size = file.stat().st_size
    kind = rng.choice(["cut", "empty", "append", "gone", "middle", "bytes", "bytes", "bytes"])
    where = ""
    if kind == "cut":
        os.truncate(file, rng.randrange(size))
    elif kind == "empty":
        os.truncate(file, 0)
    elif kind == "append":
        with open(file, "ab") as out:
            out.write(bytes(rng.randrange(1, 4096)))
    elif kind == "gone":
        file.unlink()
    elif kind == "middle":  # bytes missing from the middle
        data = file.read_bytes()
        begin = rng.randrange(size)
        file.write_bytes(data[:begin] + data[begin + rng.randrange(1, 256) :])
    elif file.suffix == ".safetensors":
        where = overwrite(file, 0, header_end(file), rng)
    elif file.suffix == ".json":
        values = json.loads(file.read_text())
        key = rng.choice(sorted(values))
        where = f"{key} of another kind"
        values[key] = rng.choice([[], {}, "x\ny", -1, 10**30, float("nan")])
        file.write_text(json.dumps(values))
    else:
        where = overwrite(file, 0, size, rng)
    return f"{path.name}: {file.name}: {kind} {where}"


def same(one, other):
    a, b = params.flatten(one.params), params.flatten(other.params)
    return (
        set(a) == set(b)
        and all(np.array_equal(a[k], b[k]) for k in a)
        and (one.family, one.networks) == (other.family, other.networks)
    )


def test_every_damage_ends_in_one_line_or_in_an_unchanged_load(whole, tmp_path):
    rng = random.Random(0)
    refused = 0
    for number in range(DAMAGES):
        path, wanted = whole[number % len(whole)]
        copy = tmp_path / str(number) / path.name
        copy.parent.mkdir()
        (shutil.copytree if path.is_dir() else shutil.copy)(path, copy)
        what = damage(copy, rng)
        try:
            got = load.load(copy)
        except UserError as error:  # anything else is a traceback, and fails the test
            line = str(error)
            assert "\n" not in line and str(tmp_path) in line and len(line) < 2000, what
            refused += 1
        else:
            assert same(got, wanted), f"{what}: loaded other weights without a word"
        shutil.rmtree(copy.parent)
    assert refused > DAMAGES / 2, "the damages did not touch what is read"


@pytest.mark.parametrize(
    "header",
    [
        b"[" * 1_000_000,
        b'{"a":' * 100_000,
        b'{"a":' + b"9" * 100_000 + b"}",
        b'{"a":{"dtype":"F32","shape":[9223372036854775807,9223372036854775807],'
        b'"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[true],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":["F32"],"shape":[1],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[-4,0]}}',
        b'{"a\\nb":7}',
        b"\xff\xfe{}",
    ],
    ids=range(10),
)
def test_a_header_bomb_ends_in_one_line(tmp_path, header):
    file = tmp_path / "x.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(UserError, match="x.safetensors") as caught:
        safetensors_io.open_file(file)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_a_header_that_claims_gigabytes_is_not_read(tmp_path):
    file = tmp_path / "x.safetensors"
    with open(file, "wb") as out:
        out.write(struct.pack("<Q", 2**33))
        out.truncate(2**34)  # a hole
    with pytest.raises(UserError, match="is not a safetensors file"):
        safetensors_io.open_file(file)
