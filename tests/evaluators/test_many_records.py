"""Extraction from 200,000 records takes no more memory than from 20,000.

Also a command, which prints rates and memory: python tests/evaluators/test_many_records.py 200000
"""

import json
import pathlib
import re
import subprocess
import sys
import tempfile
import time

import pytest

from tests.data.test_million_records import tiny_png
from tests.e2e import runner

WORKER = """
import json, pathlib, sys
import jax, numpy as np
from ml_collections import ConfigDict
from webssl_jax.evaluators import datasets, features
from webssl_jax.model import Model
from webssl_jax.models.features import Want
from webssl_jax.models.sizes import ViTConfig
from webssl_jax.models.vit import ViT
from webssl_jax.sharding import mesh as meshes, rules
from webssl_jax.data.views import Preprocess
from webssl_jax.weights.networks import Networks

pattern, folder = sys.argv[1:]
config = ViTConfig(width=16, depth=1, heads=2, patch_size=8, image_size=8, position="sincos")
mesh = meshes.create(ConfigDict({"replica": 1, "fsdp": -1, "tensor": 1}))
params = {"encoder": ViT(config).init(jax.random.key(0), np.zeros((1, 8, 8, 3)))["params"]}
params = jax.device_put(params, rules.shardings(params, mesh))
model = Model(Networks(config, preprocess=Preprocess(8, 8)), params)
cache = features.Cache(pathlib.Path(folder), batch=512, threads=4)
store = cache.pooled(model, datasets.open_dataset(pattern, datasets.LABELLED), Want(patches="mean"))
peak = next(x for x in open("/proc/self/status") if x.startswith("VmHWM"))
print("FOUND " + json.dumps([len(store), store.array("cls").shape, int(peak.split()[1]) / 1024]))
"""


def write_shard(path, count):
    from array_record.python import array_record_module

    from webssl_jax.data import records

    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for number in range(count):
        record = records.Record(
            tiny_png(number), (), f"{number:07d}", 1, 1, "test", f"class {number % 7}"
        )
        writer.write(records.encode(record))
    writer.close()


def extract(folder, count):
    """(rows, shape of CLS, MB at the peak, seconds)."""
    path = pathlib.Path(folder) / "train-00000-of-00001.arrayrecord"
    write_shard(path, count)
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", WORKER, str(path), str(pathlib.Path(folder) / "cache")],
        env=runner.environment(),
        cwd=runner.ROOT,
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(re.search("FOUND (.*)", done.stdout)[1])
    return *found, time.perf_counter() - began


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_records(tmp_path):
    """What grows is the list of labels, 100 bytes a record: 18 MB of 180,000 more."""
    (tmp_path / "few").mkdir(), (tmp_path / "many").mkdir()
    few, shape, little, _ = extract(tmp_path / "few", 20_000)
    assert few == 20_000 and shape == [20_000, 16]
    many, _, much, _ = extract(tmp_path / "many", 200_000)
    assert many == 200_000
    assert much < little + 60, (little, much)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        rows, _, megabytes, seconds = extract(place, int(sys.argv[1]))
        rate = rows / seconds
        print(f"{rows:,} records in {seconds:.0f} s ({rate:,.0f}/s), peak {megabytes:.0f} MB")
