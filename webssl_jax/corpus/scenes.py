"""Scenes with a class for each pixel, out of cut-out pictures (emoji rendered in 3D, with their
alpha channel) on photographs of landscapes: exact masks where no segmentation set can be had.

Hue, saturation and brightness of every figure and ground are drawn anew, so colours tell nothing of
a class. Figures and grounds of test scenes are in no training scene.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from webssl_jax.corpus.mini_web import packages, readers
from webssl_jax.corpus.mini_web.catalogue import BY_NAME, Source
from webssl_jax.data import annotations as annotation
from webssl_jax.data import records
from webssl_jax.data.converter.items import Dropped

TOPICS = ("animals", "faces", "food", "people", "vehicles")
CLASSES = {"many": ("background", *TOPICS), "two": ("background", "figure")}
FIGURES, GROUNDS = "emoji-fluent3d", "endless-sky"
_TEST = 4  # every fourth figure and ground is of the test scenes


class Material(NamedTuple):
    """Encoded pictures. figures: {topic: those with an alpha channel}. grounds: photographs."""

    figures: Mapping[str, Sequence[bytes]]
    grounds: Sequence[bytes]


def read(cache: Path) -> dict[str, Material]:
    """{"train", "test": their figures and grounds}, out of the packages in ``cache``."""
    figures: dict[str, dict[str, list[bytes]]] = {
        part: {topic: [] for topic in TOPICS} for part in ("train", "test")
    }
    grounds: dict[str, list[bytes]] = {"train": [], "test": []}
    for picture in _pictures(BY_NAME[FIGURES], cache):
        if picture.topic in TOPICS and isinstance(picture.image, bytes):
            figures[_part(picture.group)][picture.topic].append(picture.image)
    for picture in _pictures(BY_NAME[GROUNDS], cache):
        if picture.key.startswith("land/") and isinstance(picture.image, bytes):
            grounds[_part(picture.key)].append(picture.image)
    return {part: Material(figures[part], grounds[part]) for part in grounds}


def _pictures(source: Source, cache: Path) -> Iterator[readers.Picture]:
    tree = packages.read_all(source.packages, cache, source.pattern)
    yield from (x for x in source.reader(tree) if not isinstance(x, Dropped))


def _part(key: str) -> str:
    return "train" if int(readers.digest(key), 16) % _TEST else "test"


def scene(
    rng: np.random.Generator, material: Material, side: int
) -> tuple[Image.Image, np.ndarray]:
    """(image of ``side`` x ``side`` pixels, classes (side, side) uint8: 0, or 1 + topic). Two to
    four figures, a third to two thirds of a side large; later ones lie before earlier ones."""
    image = _tinted(_ground(rng, material.grounds, side), rng)
    classes = np.zeros((side, side), np.uint8)
    for _ in range(rng.integers(2, 5)):
        topic = int(rng.integers(len(TOPICS)))
        of = material.figures[TOPICS[topic]]
        figure = Image.open(io.BytesIO(of[int(rng.integers(len(of)))])).convert("RGBA")
        size = int(rng.uniform(1 / 3, 2 / 3) * side)
        figure = figure.resize((size, size), Image.Resampling.BICUBIC)
        figure = figure.rotate(rng.uniform(-20, 20))
        if rng.random() < 0.5:
            figure = figure.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        # up to a sixth of it lies outside
        x, y = (int(z) for z in rng.integers(-(size // 6), side - size + size // 6 + 1, 2))
        alpha = figure.getchannel("A")
        image.paste(_tinted(figure.convert("RGB"), rng), (x, y), alpha)
        shape = Image.new("L", (side, side))
        shape.paste(alpha, (x, y))
        classes[np.asarray(shape) > 127] = 1 + topic
    return image, classes


def _ground(rng: np.random.Generator, grounds: Sequence[bytes], side: int) -> Image.Image:
    photo = Image.open(io.BytesIO(grounds[int(rng.integers(len(grounds)))])).convert("RGB")
    cut = int(rng.uniform(0.4, 1) * min(photo.size))
    x, y = (int(rng.integers(length - cut + 1)) for length in photo.size)
    box = (x, y, x + cut, y + cut)
    return photo.resize((side, side), Image.Resampling.BICUBIC, box)


def _tinted(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    hue, saturation, value = np.moveaxis(np.asarray(image.convert("HSV"), np.float32), -1, 0)
    hue = (hue + rng.integers(256)) % 256
    saturation, value = saturation * rng.uniform(0.5, 1.3), value * rng.uniform(0.7, 1.2)
    made = np.stack([hue, saturation, value], axis=-1).clip(0, 255).astype(np.uint8)
    return Image.fromarray(made, "HSV").convert("RGB")


def write(output: Path, name: str, material: Material, count: int, side: int, seed: int) -> None:
    """``count`` scenes as a shard in each of the folders ``many`` (a class a topic) and ``two``
    (figure and background), which exist."""
    rng = np.random.default_rng(seed)
    shard = records.shard_name(name, 0, 1)
    writers = {
        kind: ArrayRecordWriter(str(output / kind / shard), records.WRITER_OPTIONS)
        for kind in CLASSES
    }
    for number in range(count):
        image, classes = scene(rng, material, side)
        file = io.BytesIO()
        image.save(file, "JPEG", quality=95)
        for kind, writer in writers.items():
            mask = classes if kind == "many" else np.minimum(classes, 1)
            annotated = {"mask": annotation.encode_mask(mask)}
            key = f"{name}/{number}"
            record = records.Record(
                file.getvalue(), (), key, side, side, "scenes", annotations=annotated
            )
            writer.write(records.encode(record))
    for writer in writers.values():
        writer.close()
