"""What can be said of a record without any network."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from PIL import Image

from webssl_jax.config import UserError
from webssl_jax.data.decode import decode_image
from webssl_jax.data.records import Record


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Sides in pixels, bytes, captions and their longest length in characters; and of the image,
    shrunk to at most ``side`` pixels: colourfulness (Hasler and Suesstrunk 2003), the share of
    pixels of its most frequent colour (of 4,096), and the share of pixels on a sharp edge."""

    side: int = 128

    version: ClassVar[int] = 1
    columns: ClassVar[Mapping[str, pa.DataType]] = {
        "width": pa.int32(),
        "height": pa.int32(),
        "bytes": pa.int64(),
        "captions": pa.int32(),
        "caption_length": pa.int32(),
        "colourfulness": pa.float32(),
        "flat": pa.float32(),
        "edges": pa.float32(),
    }

    def __post_init__(self) -> None:
        if self.side < 1:
            raise UserError(f"--scorer statistics:side={self.side}: must be at least 1")

    def __call__(self, records: Sequence[Record]) -> list[dict[str, Any]]:
        return [self._score(record) for record in records]

    def _score(self, record: Record) -> dict[str, Any]:
        small = decode_image(record.image, self.side)
        small.thumbnail((self.side, self.side), Image.Resampling.BOX)
        values = np.asarray(small, np.float32)
        colours = (values.astype(np.int32) // 16) @ (256, 16, 1)
        grey = values.mean(-1)
        steps = [np.abs(np.diff(grey, axis=axis)) > 48 for axis in (0, 1)]
        return {
            "width": record.width,
            "height": record.height,
            "bytes": len(record.image),
            "captions": len(record.captions),
            "caption_length": max(map(len, record.captions), default=0),
            "colourfulness": _colourfulness(values),
            "flat": np.bincount(colours.ravel()).max() / colours.size,
            "edges": sum(int(step.sum()) for step in steps) / (2 * grey.size),
        }


def _colourfulness(pixels: np.ndarray) -> float:
    red, green, blue = np.moveaxis(pixels, -1, 0)
    a, b = red - green, (red + green) / 2 - blue
    return float(np.hypot(a.std(), b.std()) + 0.3 * np.hypot(a.mean(), b.mean()))
