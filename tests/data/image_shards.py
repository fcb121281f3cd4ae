"""Makes encoded images, records and shards for the data tests."""

import dataclasses
import io

import numpy as np
from array_record.python import array_record_module
from PIL import Image

from webssl_jax.data import records


def encode_image(pixels: np.ndarray, fmt: str = "PNG", **options) -> bytes:
    """An encoded file of (H, W, 3) or (H, W) uint8 pixels."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, fmt, **options)
    return buffer.getvalue()


def smooth_image(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """(height, width, 3) uint8 of soft blobs, for lossy codecs and resampling."""
    coarse = rng.integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image)


@dataclasses.dataclass(frozen=True)
class ListSource:
    """Encoded records in memory."""

    items: tuple[bytes, ...]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]

    def describe(self, index):
        return f"list record {index}"


def write_shard(path, items: list[bytes]) -> None:
    """Writes encoded records as one ArrayRecord file."""
    writer = array_record_module.ArrayRecordWriter(str(path), records.WRITER_OPTIONS)
    for item in items:
        writer.write(item)
    writer.close()


def make_record(image: bytes, number: int, label: str | None = None) -> records.Record:
    return records.Record(
        image=image, captions=(), key=f"{number:04d}", width=1, height=1, source="test", label=label
    )
