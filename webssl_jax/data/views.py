"""Views: from an encoded image to the uint8 arrays a network is fed, on the host.

Geometry and resampling follow torchvision's ``RandomResizedCrop``, ``Resize`` and ``CenterCrop`` on
PIL images (antialiased bicubic), which the DINOv2, MAE and CLIP originals use. Normalisation
belongs on the device. Views are frozen dataclasses, so that they pickle and can be written into a
config dump.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from webssl_jax.colours import IMAGENET_MEAN, IMAGENET_STD
from webssl_jax.colours import check as check_colours
from webssl_jax.data.decode import (
    MAX_PIXELS,
    Box,
    DecodeError,
    Size,
    decode_image,
    least_scale,
    open_image,
    ratio_of,
    sides,
)
from webssl_jax.data.records import Record

INTERPOLATIONS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
}


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


class RecordView(abc.ABC):
    """A view of a whole record, where the others see its encoded image alone."""

    @abc.abstractmethod
    def __call__(self, record: Record, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Arrays of one shape for all records.

        Raises:
          DecodeError, RecordError: if the record does not hold what is wanted; the loader counts it
            as damaged.
        """


@dataclasses.dataclass(frozen=True)
class Turns:
    """Views of which every batch is seen through one, drawn by ``shares`` of their sum."""

    views: tuple[Callable[[bytes, np.random.Generator], dict[str, np.ndarray]], ...]
    shares: tuple[float, ...]

    def number(self, seed: int, step: int) -> int:
        """Which view batch ``step`` is seen through: a function of the two alone."""
        chances = np.array(self.shares) / sum(self.shares)
        drawn = np.random.default_rng([seed, step, 1]).choice(len(chances), p=chances)
        return int(drawn)


def crop_at(
    sizes: Sequence[Size],
    data: bytes,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    flip: float,
    rng: np.random.Generator,
) -> list[np.ndarray]:
    """One crop of an encoded image, as :func:`sample_crop` draws it, maybe flipped, at each of
    ``sizes``: (height, width, 3) uint8.

    Raises:
      DecodeError: if the image cannot be decoded.
    """
    opened = open_image(data)
    box = sample_crop(opened.width, opened.height, scale, ratio, rng)
    turned = rng.random() < flip
    decoded = opened.decode(scale=max(least_scale(size, box) for size in sizes))
    crops = [decoded.crop(box, size) for size in sizes]
    if turned:
        crops = [crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for crop in crops]
    return [np.asarray(crop) for crop in crops]


@dataclasses.dataclass(frozen=True)
class RandomResizedCropView:
    """One random crop, resized, and maybe flipped: all that MAE does, and, with ``scale`` (0.9, 1)
    and ``flip`` 0, all that MetaCLIP does to its images.

    ``size`` is the side of a square or (height, width), ``scale`` bounds the crop's share of the
    image area, ``ratio`` its width/height over that of ``size``, ``flip`` is the probability of a
    left-right flip.
    """

    size: Size
    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5

    def __call__(self, data: bytes, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """``{"image": (height, width, 3) uint8}``.

        Raises:
          DecodeError: if the image cannot be decoded.
        """
        ratio = ratio_of(self.size, self.ratio)
        (image,) = crop_at([self.size], data, self.scale, ratio, self.flip, rng)
        return {"image": image}


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """How a network's images are made for inference, and the colours it expects.

    The shorter side is resized to ``resize`` pixels, then the central ``size`` x ``size`` pixels
    are cut out. With ``resize`` None both sides are resized to ``size``, and the aspect is lost
    (SigLIP's own); ``size`` may then be (height, width). ``mean`` and ``std`` are those of red,
    green and blue in [0, 1]; the network itself takes uint8 and normalises on the device.

    An image is always decoded at its full size: published figures come from that, and a JPEG that
    was decoded smaller differs by a grey level or two.

    Raises:
      ValueError: when a field is out of range.
    """

    size: int | tuple[int, ...]
    resize: int | None
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    interpolation: str = "bicubic"

    def __post_init__(self) -> None:
        if isinstance(self.size, tuple) and len(self.size) != 2 or min(self.shape) < 1:
            raise ValueError(f"Preprocess: size = {self.size} must be at least 1, or two sides")
        if self.shape[0] == self.shape[1]:
            object.__setattr__(self, "size", self.shape[0])  # one way to say it
        elif self.resize is not None:
            raise ValueError(f"Preprocess: size = {self.size} is no square, so resize must be None")
        if self.resize is not None and self.resize < self.shape[0]:
            raise ValueError(f"Preprocess: resize {self.resize} is smaller than size {self.size}")
        if self.interpolation not in INTERPOLATIONS:
            known = ", ".join(INTERPOLATIONS)
            raise ValueError(f"Preprocess: interpolation = {self.interpolation!r} is not {known}")
        check_colours(self.mean, self.std)

    @property
    def shape(self) -> tuple[int, ...]:
        """(height, width) in pixels."""
        return sides(self.size)

    @classmethod
    def of_view(
        cls,
        size: Size,
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
    ) -> Preprocess:
        """For a network that was trained on crops of ``size``: the centre of the image for a
        square; for others the whole image, stretched."""
        height, width = sides(size)
        return cls(size, with_margin(height) if height == width else None, mean, std)

    def __call__(self, data: bytes | Image.Image) -> np.ndarray:
        """(*shape, 3) uint8 of an encoded image, or of an RGB one.

        Raises:
          DecodeError: if the image cannot be decoded, is empty, or is too thin to be resized.
        """
        image = data if isinstance(data, Image.Image) else decode_image(data)
        if not min(image.size):
            raise DecodeError(f"{image.width} x {image.height} pixels: empty")
        method = INTERPOLATIONS[self.interpolation]
        height, width = self.shape
        if self.resize is None:
            return np.asarray(image.resize((width, height), method))
        short = min(image.size)
        # int(), not round(): torchvision truncates the longer side.
        w, h = (int(self.resize * side / short) for side in image.size)
        if w * h > MAX_PIXELS:
            raise DecodeError(f"{image.width} x {image.height} pixels: too thin for {self}")
        left, top = round((w - width) / 2), round((h - height) / 2)
        image = image.resize((w, h), method)
        return np.asarray(image.crop((left, top, left + width, top + height)))

    def at(self, size: int) -> Preprocess:
        """The same for images of ``size`` pixels, with the same share cut off at the edges."""
        if size == self.size:
            return self
        own = self.shape[0]
        if self.resize is None or self.resize == own:
            return dataclasses.replace(self, size=size, resize=self.resize and size)
        if self.resize == with_margin(own):
            return dataclasses.replace(self, size=size, resize=with_margin(size))
        resize = size + 2 * round(size * (self.resize / own - 1) / 2)
        return dataclasses.replace(self, size=size, resize=resize)

    def for_pixels(self) -> Preprocess:
        """The same pixels without the colours that a network expects: equal for all networks that
        see the same pixels."""
        return dataclasses.replace(self, mean=(0.0,) * 3, std=(1.0,) * 3)


def with_margin(size: int) -> int:
    """256 / 224 of ``size``, with an even margin, so that the crop is central."""
    return size + 2 * round(size * (256 / 224 - 1) / 2)
