"""As ``features``, with rows that train heads: logistic regression, a linear probe, segmentation
and depth. All devices of two processes meet at each update, which takes minutes."""

from unittest import mock

import jax
from jax.experimental import multihost_utils

from tests.evaluators.scenes import class_file, scene_shard
from tests.multihost import features
from webssl_jax.evaluators.dense import losses

LOGISTIC = {"kind": "logistic", "last_blocks": 1, **features.DATA}
LINEAR = {"kind": "linear", "last_blocks": 1, "iterations": 6, "batch": 32, **features.DATA}


def compute(folder):
    if jax.process_index() == 0:
        folder.mkdir(parents=True)
        scene_shard(folder, "train", range(16))
        scene_shard(folder, "test", range(100, 105))
        class_file(folder)
    multihost_utils.sync_global_devices("scenes are there")
    shards = {name: str(folder / f"{name}-*.arrayrecord") for name in ("train", "test")}
    data = {**shards, "steps": 6, "batch": 8}
    classes = str(folder / "classes.txt")
    segmentation = {"kind": "segmentation", "classes": classes, "size": 32, **data}
    depth = {"kind": "depth", "layout": "plain", "size": (40, 56), "layers": 4, **data}
    rows = {"probe": LOGISTIC, "linear": LINEAR, "segmentation": segmentation, "depth": depth}
    with mock.patch.object(losses, "WARMUP_STEPS", 2):
        return features.compute(folder, rows)
