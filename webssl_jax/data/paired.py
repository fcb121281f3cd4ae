"""One crop at two sizes: a student's and its teacher's, on the host."""

from __future__ import annotations

import dataclasses

import numpy as np

from webssl_jax.data.views import crop_at


@dataclasses.dataclass(frozen=True)
class PairedView:
    """One random crop, maybe flipped, resized to ``size`` and to ``teacher_size`` pixels. The other
    fields are those of ``views.RandomResizedCropView``."""

    size: int
    teacher_size: int
    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5

    def __call__(self, data: bytes, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """``{"image": (size, size, 3), "teacher_image": (teacher_size, teacher_size, 3)}``, uint8.

        Raises:
          DecodeError: if the image cannot be decoded.
        """
        sizes = (self.size, self.teacher_size)
        image, teacher = crop_at(sizes, data, self.scale, self.ratio, self.flip, rng)
        return {"image": image, "teacher_image": teacher}
