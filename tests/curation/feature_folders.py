"""Shards and features of them that no model has made: what lies near what is known."""

import json

import numpy as np

from tests.data.image_shards import encode_image, make_record, write_shard
from webssl_jax.curation.feature_pool import FeaturePool
from webssl_jax.data import records
from webssl_jax.data.sources import ArrayRecordSource
from webssl_jax.evaluators import feature_files

IMAGE = encode_image(np.zeros((2, 2, 3), np.uint8))


def make(folder, features, gaps=(), parts=3):
    """A pool of three shards, one of them empty, with (n, D) float32 features in several files."""
    count = len(features)
    cuts = [0, count // 3, count // 3, count]
    shards = folder / "shards"
    shards.mkdir(parents=True)
    for i, (start, stop) in enumerate(zip(cuts, cuts[1:], strict=False)):
        made = [records.encode(make_record(IMAGE, number)) for number in range(start, stop)]
        write_shard(shards / f"p-{i:05d}-of-00003.arrayrecord", made)
    made = folder / "features"
    made.mkdir()
    facts = {"weights": "w", "images": count, "columns": ["cls"], "dtype": "float32"}
    facts["input"] = feature_files.input_digest(ArrayRecordSource(str(shards)))
    (made / feature_files.FACTS).write_text(json.dumps(facts))
    for part, numbers in enumerate(np.array_split(np.arange(count), parts)):
        images = [
            feature_files._Image(int(i), f"{i:04d}", None, None, "gone" if i in gaps else None)
            for i in numbers
        ]
        there = features[[i for i in numbers if i not in gaps]]
        table = feature_files._table(images, {"cls": there}, "float32")
        feature_files._save(table, made / f"part-{part:05d}-of-{parts:05d}.parquet")
    return FeaturePool.open(made, [str(shards)], "cls")
