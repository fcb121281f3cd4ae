"""One crop at two sizes: a student's and its teacher's, on the host."""

from __future__ import annotations

import dataclasses

import numpy as np
from PIL import Image

from webssl_jax.data.decode import open_image
from webssl_jax.data.views import sample_crop


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
        opened = open_image(data)
        box = sample_crop(opened.width, opened.height, self.scale, self.ratio, rng)
        flip = rng.random() < self.flip
        sides = {"image": self.size, "teacher_image": self.teacher_size}
        decoded = opened.decode(scale=max(sides.values()) / min(box[2:]))
        crops = {name: decoded.crop(box, side) for name, side in sides.items()}
        if flip:
            turn = Image.Transpose.FLIP_LEFT_RIGHT
            crops = {name: crop.transpose(turn) for name, crop in crops.items()}
        return {name: np.asarray(crop) for name, crop in crops.items()}
