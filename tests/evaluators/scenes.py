"""Small scenes with a class and a depth for each pixel, both plain in the colours."""

import numpy as np

from tests.data.image_shards import encode_image
from tests.evaluators.small_models import shard
from webssl_jax.data import annotations, records

CLASSES = ("ground", "box", "ball")
COLOURS = np.array([(60, 60, 60), (220, 60, 40), (40, 80, 220)])
METRES = (4.0, 1.5, 2.5)


def scene(seed, height=40, width=56):
    """(image (h, w, 3) uint8, classes (h, w) uint8, metres (h, w) float32): blocks of 8 pixels; the
    rightmost columns have no class and no depth."""
    rng = np.random.default_rng(seed)
    coarse = rng.choice(3, size=(height // 8, width // 8), p=(0.5, 0.3, 0.2))
    classes = np.kron(coarse, np.ones((8, 8), int)).astype(np.uint8)
    image = COLOURS[classes] + rng.integers(-20, 21, (height, width, 3))
    metres = np.take(METRES, classes).astype(np.float32)
    classes[:, -3:], metres[:, -3:] = 255, 0
    return np.clip(image, 0, 255).astype(np.uint8), classes, metres


def record(image, key, **annotated):
    """An encoded record with annotations."""
    height, width = image.shape[:2]
    data = encode_image(image)
    return records.encode(
        records.Record(data, (), key, width, height, "scenes", annotations=annotated)
    )


def scene_shard(folder, name, seeds, **size):
    """The pattern of a shard of scenes with ``mask`` and ``depth``."""
    items = []
    for seed in seeds:
        image, classes, metres = scene(seed, **size)
        annotated = {
            "mask": annotations.encode_mask(classes),
            "depth": annotations.encode_depth(metres),
        }
        items.append(record(image, str(seed), **annotated))
    return shard(folder, name, items)


def class_file(folder):
    """A file with the names of the classes."""
    path = folder / "classes.txt"
    path.write_text("\n".join(CLASSES))
    return str(path)
