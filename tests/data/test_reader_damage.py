"""Random damages of tars and parquet files: each has a defined outcome, and nothing is lost
silently."""

import gzip
import io
import itertools
import json
import signal
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.conversions import counts, read_shards, run_engine
from tests.data.image_shards import encode_image
from webssl_jax.config import UserError
from webssl_jax.data.converter.parquet_reader import Columns, ParquetReader, list_parquet
from webssl_jax.data.converter.tar_reader import TarReader, list_tars

IMAGES = 8
COLUMNS = Columns("image", ("text",), None, "label")
SECONDS = 60  # an outcome that takes longer is a hang


def _images():
    """PNGs, which have checksums, each larger than the zeros that may end a tar."""
    pixels = np.random.default_rng(0).integers(0, 256, (IMAGES, 72, 72, 3), dtype=np.uint8)
    return [encode_image(image) for image in pixels]


def _tar():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for i, image in enumerate(_images()):
            fields = json.dumps({"caption": f"größe {i}"}).encode()
            name = f"{'long' * 30 if i % 3 == 1 else 'folder'}/{i:05d}"
            for suffix, data in (("png", image), ("json", fields), ("txt", b"caption %d" % i)):
                info = tarfile.TarInfo(f"{name}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def _parquet(compression, **writing):
    table = pa.table(
        {
            "image": _images(),
            "text": [f"größe {i}" for i in range(IMAGES)],
            "label": [i % 3 for i in range(IMAGES)],
        }
    )
    file = io.BytesIO()
    pq.write_table(table, file, compression=compression, row_group_size=3, **writing)
    return file.getvalue()


FILES = {
    "plain.tar": _tar,
    "gzip.tar": lambda: gzip.compress(_tar(), mtime=0),
    "plain.parquet": lambda: _parquet("none", use_dictionary=False),
    "zstd.parquet": lambda: _parquet("zstd", data_page_version="2.0"),
}


def damage(data, kind, rng):
    """``data`` with one damage of the kind, at a random place of random size."""
    data, size = bytearray(data), len(data)
    length = int(2 ** rng.uniform(0, np.log2(size / 2)))
    at = int(rng.integers(0, size - length))
    if kind == "flipped":
        for place in rng.integers(0, size, rng.integers(1, 9)):
            data[place] ^= 1 << int(rng.integers(8))
    elif kind == "end flipped":  # where parquet keeps what everything else depends on
        data[size - 1 - int(rng.integers(0, min(size, 1500)))] ^= 1 << int(rng.integers(8))
    elif kind == "truncated":
        del data[at:]
    elif kind == "zeroed":
        data[at : at + length] = bytes(length)
    elif kind == "spliced":
        source = int(rng.integers(0, size - length))
        data[at : at + length] = data[source : source + length]
    elif kind == "removed":
        del data[at : at + length]
    elif kind == "extended":
        data += rng.bytes(length)
    return bytes(data)


KINDS = ("flipped", "end flipped", "truncated", "zeroed", "spliced", "removed", "extended")


def outcome(folder, name, data):
    """Converts a damaged file: the statistics, or the line that refuses it."""
    folder.mkdir()
    path = folder / name
    path.write_bytes(data)
    signal.alarm(SECONDS)  # its default action ends the whole test run, visibly
    try:
        if name.endswith(".tar"):
            root, units = list_tars([str(path)])
            reader = TarReader(str(root), "test")
        else:
            root, units = list_parquet([str(path)], COLUMNS)
            reader = ParquetReader(str(root), "test", COLUMNS, str(root))
        stats = run_engine(folder / "out", reader, units, shards=2)
    except UserError as error:
        assert "\n" not in str(error) and name in str(error)
        return str(error)
    finally:
        signal.alarm(0)
    found = read_shards(folder / "out")
    dropped = sum(counts(stats["dropped"]).values())
    assert len(found) == stats["kept"] == stats["inputs"] - dropped
    # Nothing is lost silently: what is neither kept nor dropped is behind a damage that is named.
    if stats["inputs"] < IMAGES:
        assert any(name in key for row in stats["notes"].values() for key in row["examples"])
    return stats


@pytest.mark.parametrize("trials", [14, pytest.param(43, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", FILES)
def test_a_random_damage_ends_in_counts_or_one_line(tmp_path, name, trials):
    data = FILES[name]()
    whole = outcome(tmp_path / "whole", name, data)
    assert whole["kept"] == whole["captioned"] == IMAGES and whole["notes"] == {}
    rng = np.random.default_rng(3)
    unharmed = 0
    for trial, kind in zip(range(trials), itertools.cycle(KINDS)):
        found = outcome(tmp_path / str(trial), name, damage(data, kind, rng))
        unharmed += isinstance(found, dict) and not found["notes"] and not found["dropped"]
    assert unharmed < trials / 3  # the damages were such: most of them were found
