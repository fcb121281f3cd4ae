"""Labelled images: from a record to an image and the number of its class, on the host."""

from __future__ import annotations

import dataclasses

import numpy as np

from webssl_jax.data.records import Record, RecordError
from webssl_jax.data.views import RandomResizedCropView, RecordView


@dataclasses.dataclass(frozen=True)
class LabelledView(RecordView):
    """An image as ``crop`` gives it, and where its label stands in ``classes``."""

    crop: RandomResizedCropView
    classes: tuple[str, ...]

    def __call__(self, record: Record, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """``{"image": (size, size, 3) uint8, "label": () int32}``.

        Raises:
          DecodeError: if the image cannot be decoded.
          RecordError: if it has no label, or none of ``classes``; the loader puts another record in
            its place and counts it.
        """
        if record.label not in self.classes:
            raise RecordError(
                "no label" if record.label is None else f"label {record.label!r} is no class"
            )
        label = np.asarray(self.classes.index(record.label), np.int32)
        return self.crop(record.image, rng) | {"label": label}
