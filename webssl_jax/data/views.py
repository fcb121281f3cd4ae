"""Views: from an encoded image to the uint8 arrays a network is fed, on the host.

Geometry and resampling follow torchvision's ``RandomResizedCrop``, ``Resize`` and ``CenterCrop`` on
PIL images (antialiased bicubic), which the DINOv2, MAE and CLIP originals use. Normalisation
belongs on the device. Views are frozen dataclasses, so that they pickle and can be written into a
config dump.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from PIL import Image

from webssl_jax.data.decode import MAX_PIXELS, Box, DecodeError, decode_image, open_image


def sample_crop(
    width: int,
    height: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    rng: np.random.Generator,
) -> Box:
    """Draws a box as torchvision's ``RandomResizedCrop.get_params`` does.

    Area uniform in ``scale`` (shares of the image), aspect width/height log-uniform in ``ratio``;
    ten tries, then the largest centred box whose aspect lies in ``ratio``.
    """
    area = width * height
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        target = area * rng.uniform(scale[0], scale[1])
        aspect = math.exp(rng.uniform(low, high))
        w = round(math.sqrt(target * aspect))
        h = round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = int(rng.integers(height - h + 1))
            return int(rng.integers(width - w + 1)), top, w, h
    w, h = width, height
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    return (width - w) // 2, (height - h) // 2, w, h


@dataclasses.dataclass(frozen=True)
class RandomResizedCropView:
    """One random crop, resized to a square, and maybe flipped: all that MAE does, and, with
    ``scale`` (0.9, 1) and ``flip`` 0, all that MetaCLIP does to its images.

    ``scale`` bounds the crop's share of the image area, ``ratio`` its width/height, ``flip`` is
    the probability of a left-right flip.
    """

    size: int
    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5

    def __call__(self, data: bytes, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """``{"image": (size, size, 3) uint8}``.

        Raises:
          DecodeError: if the image cannot be decoded.
        """
        opened = open_image(data)
        box = sample_crop(opened.width, opened.height, self.scale, self.ratio, rng)
        flip = rng.random() < self.flip
        decoded = opened.decode(scale=max(self.size / box[2], self.size / box[3]))
        image = decoded.crop(box, self.size)
        if flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return {"image": np.asarray(image)}


@dataclasses.dataclass(frozen=True)
class EvalView:
    """Shorter side resized to ``resize``, then the central ``size`` x ``size`` pixels.

    Always from the full decode: published figures come from it, and a JPEG decoded smaller differs
    by a grey level or two.
    """

    size: int
    resize: int

    def __post_init__(self) -> None:
        if self.resize < self.size:
            raise ValueError(f"EvalView: resize {self.resize} is smaller than the crop {self.size}")

    def __call__(self, data: bytes) -> np.ndarray:
        """(size, size, 3) uint8.

        Raises:
          DecodeError: if the image cannot be decoded, or is too thin to be resized.
        """
        image = decode_image(data)
        short = min(image.size)
        # int(), not round(): torchvision truncates the longer side.
        w, h = (int(self.resize * side / short) for side in image.size)
        if w * h > MAX_PIXELS:
            raise DecodeError(f"{image.width} x {image.height} pixels: too thin for {self}")
        left, top = round((w - self.size) / 2), round((h - self.size) / 2)
        image = image.resize((w, h), Image.Resampling.BICUBIC)
        return np.asarray(image.crop((left, top, left + self.size, top + self.size)))
