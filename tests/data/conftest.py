"""Tiny image shards for the data tests, and the converter's command in this process."""

import contextlib
import pathlib
import runpy
import sys

import numpy as np
import pytest

from tests.data.image_shards import encode_image, make_record, smooth_image, write_shard
from tools import make_records as tool
from webssl_jax.config import UserError
from webssl_jax.data import records
from webssl_jax.data.converter import runners


@pytest.fixture(scope="session")
def image_records() -> list[records.Record]:
    """64 images of 20 to 300 px, JPEG, WebP and PNG in turns, of 3 classes, every 8th without."""
    rng = np.random.default_rng(0)
    made = []
    for number in range(64):
        width, height = (int(side) for side in rng.integers(20, 301, 2))
        fmt = ("JPEG", "WEBP", "PNG")[number % 3]
        image = encode_image(smooth_image(rng, width, height), fmt)
        label = None if number % 8 == 7 else ("zebra", "ant", "moth")[number % 5 % 3]
        made.append(make_record(image, number, label))
    return made


@pytest.fixture(scope="session")
def shards(tmp_path_factory, image_records):
    """A folder with the 64 images in train-0000i-of-00004.arrayrecord, 16 each."""
    folder = tmp_path_factory.mktemp("shards")
    for index in range(4):
        items = [records.encode(r) for r in image_records[16 * index : 16 * (index + 1)]]
        write_shard(folder / records.shard_name("train", index, 4), items)
    return folder


@pytest.fixture
def make_records(monkeypatch, capsys):
    """make_records without a pool, in this process: (exit code, stdout, stderr or the error)."""

    @contextlib.contextmanager
    def here(workers):
        yield lambda function, shards, progress: [function(s, progress) for s in shards]

    monkeypatch.setattr(runners, "pool", here)

    def call(*args):
        capsys.readouterr()
        try:
            code = tool.main([str(arg) for arg in args])
        except UserError as error:
            return 2, capsys.readouterr().out, str(error)
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def invoke(monkeypatch, capsys):
    """make_records in this process: (exit code, stdout, stderr)."""

    tool = pathlib.Path(__file__).parents[2] / "tools/make_records.py"

    def call(*args):
        monkeypatch.setattr(sys, "argv", [str(tool), *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(tool), run_name="__main__")
        return stop.value.code, *capsys.readouterr()

    return call
