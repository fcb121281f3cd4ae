"""Views of an image together with a value for each of its pixels: what is done to the one in space
is done to the other. As mmsegmentation and the Monocular-Depth-Estimation-Toolbox train, on which
DINOv2's dense evaluations stand.

The originals resize with OpenCV's bilinear rule, which does not smooth when it shrinks; so do
these.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
from PIL import Image

from webssl_jax.data import annotations as annotation
from webssl_jax.data import photometric
from webssl_jax.data.decode import DecodeError, decode_image
from webssl_jax.data.records import Record, RecordError
from webssl_jax.data.views import RecordView

IGNORE = 255  # of labels: a pixel without a class
_TRIES = 10  # to find a crop that is not nearly all of one class
# A part of an image: (first row, end, first column, end); or (height, width), from the middle of
# the bottom, where the camera of a car sees the road.
Area = tuple[int, ...]


def resize(
    image: Image.Image, width: int, height: int, part: tuple[int, int, int, int] | None = None
) -> np.ndarray:
    """An RGB image in another size, bilinear between the nearest four pixels, or a part of it.

    part: (left, top, right, bottom) of what comes out; None for all. Only that is computed.

    Returns:
      (H, W, 3) uint8.
    """
    left, top, right, bottom = part or (0, 0, width, height)
    across, down = image.width / width, image.height / height
    if (across, down) == (1, 1):
        return np.asarray(image)[top:bottom, left:right]
    out, to = (right - left, bottom - top), (across, 0, left * across, 0, down, top * down)
    made = []
    for plane in image.split():  # in float: of 8 bits it would cut off what it should round
        plane = plane.convert("F")
        made.append(plane.transform(out, Image.Transform.AFFINE, to, Image.Resampling.BILINEAR))
    return np.rint(np.stack([np.asarray(plane) for plane in made], axis=-1)).astype(np.uint8)


def size_for(image: Image.Image, short: int) -> tuple[int, int]:
    """(width, height) of the image with a shorter side of ``short`` pixels, rounded."""
    scale = short / min(image.size)
    width, height = (int(side * scale + 0.5) for side in image.size)
    return width, height


@dataclasses.dataclass(frozen=True)
class ClassTable:
    """From the numbers that a mask holds to classes.

    names: of the classes 0, 1, ... of: {number in the mask: class}, as pairs; other numbers are
    no class.
    """

    names: tuple[str, ...]
    of: tuple[tuple[int, int], ...]

    @functools.cached_property
    def table(self) -> np.ndarray:
        """(65536,) uint8, with 255 for what is no class."""
        table = np.full(2**16, IGNORE, np.uint8)
        for number, own in self.of:
            table[number] = own
        return table

    def __call__(self, record: Record) -> np.ndarray:
        """(height, width) uint8: the classes of a record's mask.

        Raises:
          RecordError: if the mask is missing, damaged, or of another size than the image.
        """
        return self.table[annotation.mask(record)]


@dataclasses.dataclass(frozen=True)
class SegmentationView(RecordView):
    """A square of a resized image and of its mask, for training.

    The shorter side is resized to ``short`` times a number uniform in ``scale``. Of it a square of
    ``crop`` pixels is cut; one of which more than ``most`` of the labelled pixels are of one class
    is drawn again, ten times at most. Then a flip, mmsegmentation's photometric distortion, and
    where the image is smaller than the square, filling up at the right and below: the mask with
    255, the image with ``fill``, the mean colour of the network, so that it sees nearly zeros.
    """

    classes: ClassTable
    short: int
    crop: int
    scale: tuple[float, float]
    fill: tuple[int, int, int]
    most: float = 0.75

    def __call__(self, record: Record, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """``{"image": (crop, crop, 3) uint8, "mask": (crop, crop) uint8}``.

        Raises:
          DecodeError, RecordError: for an image or a mask that cannot be read.
        """
        image, mask = decode_image(record.image), self.classes(record)
        width, height = size_for(image, int(self.short * rng.uniform(*self.scale)))
        mask = annotation.resize_mask(mask, width, height)
        x, y = self._place(mask, rng)
        part = x, y, min(x + self.crop, width), min(y + self.crop, height)
        pixels = resize(image, width, height, part)
        mask = mask[y : y + self.crop, x : x + self.crop]
        if rng.random() < 0.5:
            pixels, mask = pixels[:, ::-1], mask[:, ::-1]
        pixels = distort(pixels, rng)
        height, width = mask.shape
        whole = np.empty((self.crop, self.crop, 3), np.uint8)
        whole[:] = self.fill
        labels = np.full((self.crop, self.crop), IGNORE, np.uint8)
        whole[:height, :width], labels[:height, :width] = pixels, mask
        return {"image": whole, "mask": labels}

    def _place(self, mask: np.ndarray, rng: np.random.Generator) -> tuple[int, int]:
        for _ in range(_TRIES + 1):
            y, x = (int(rng.integers(max(side - self.crop, 0) + 1)) for side in mask.shape)
            counts = np.bincount(mask[y : y + self.crop, x : x + self.crop].ravel(), minlength=256)
            counts = counts[:IGNORE]
            if (counts > 0).sum() > 1 and counts.max() < self.most * counts.sum():
                break
        return x, y


def distort(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """mmsegmentation's photometric distortion of (H, W, 3) uint8: with one half each, brightness
    (+- 32), contrast, saturation (times 0.5 to 1.5) and hue (+- 36 degrees); contrast before the
    last two or after them."""
    if rng.random() < 0.5:
        pixels = _clipped(pixels + np.float32(rng.uniform(-32, 32)))
    contrast_first = rng.random() < 0.5
    if contrast_first:
        pixels = _contrast(pixels, rng)
    if rng.random() < 0.5:
        pixels = saturate(pixels, rng.uniform(0.5, 1.5))
    if rng.random() < 0.5:
        turned = photometric.hue(Image.fromarray(pixels), int(rng.integers(-18, 18)) / 180)
        pixels = np.asarray(turned)
    return pixels if contrast_first else _contrast(pixels, rng)


def saturate(pixels: np.ndarray, factor: float) -> np.ndarray:
    """HSV's saturation times ``factor``, at most 1; hue and value stay. (H, W, 3) uint8."""
    values = pixels.astype(np.float32)
    value, low = values.max(axis=-1, keepdims=True), values.min(axis=-1, keepdims=True)
    most = value / np.maximum(value - low, 1)
    return _clipped(value - (value - values) * np.minimum(factor, most))


def _contrast(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    if rng.random() < 0.5:
        return _clipped(pixels * np.float32(rng.uniform(0.5, 1.5)))
    return pixels


def _clipped(values: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


@dataclasses.dataclass(frozen=True)
class DepthView(RecordView):
    """A part of an image and its depth, for training, as the toolbox's NYU recipe.

    The image's ``area`` (None: all of it) is resized to ``size`` (height, width; None: as it is).
    It is turned by up to ``degrees`` either way with one half, flipped with one half, and a part of
    ``crop`` (height, width) is cut. With one half its colours are changed: a power of 0.9 to 1.1 of
    the grey levels (0 to 255, as published, so that it brightens and darkens much), times
    ``brightness``, times 0.9 to 1.1 for each colour.
    """

    area: Area | None
    crop: tuple[int, int]
    units_per_metre: float
    degrees: float = 2.5
    brightness: tuple[float, float] = (0.75, 1.25)
    size: tuple[int, int] | None = None

    def __call__(self, record: Record, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """``{"image": (H, W, 3) uint8, "depth": (H, W) float32}`` in metres, 0 where unknown.

        Raises:
          DecodeError, RecordError: for an image or depths that cannot be read, or too small ones.
        """
        image, depth = read_depth(record, self.area, self.units_per_metre)
        if self.size:
            image = Image.fromarray(resize(image, *self.size[::-1]))
            depth = annotation.resize_mask(depth, *self.size[::-1])
        if rng.random() < 0.5:
            angle = rng.uniform(-self.degrees, self.degrees)
            image = image.rotate(angle, Image.Resampling.BILINEAR)
            depth = np.asarray(Image.fromarray(depth).rotate(angle, Image.Resampling.NEAREST))
        if rng.random() < 0.5:
            image, depth = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), depth[:, ::-1]
        height, width = self.crop
        if depth.shape[0] < height or depth.shape[1] < width:
            raise RecordError(
                f"{depth.shape[1]} x {depth.shape[0]} pixels are less than a crop of {width} x "
                f"{height}"
            )
        y, x = (int(rng.integers(side - cut + 1)) for side, cut in zip(depth.shape, self.crop))
        pixels = np.asarray(image)[y : y + height, x : x + width]
        depth = depth[y : y + height, x : x + width]
        if rng.random() < 0.5:
            pixels = self._colours(pixels, rng)
        return {"image": np.ascontiguousarray(pixels), "depth": np.ascontiguousarray(depth)}

    def _colours(self, pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        changed = pixels.astype(np.float32) ** np.float32(rng.uniform(0.9, 1.1))
        factors = rng.uniform(*self.brightness) * rng.uniform(0.9, 1.1, size=3)
        return _clipped(changed * factors.astype(np.float32))


def read_depth(
    record: Record, area: Area | None, units_per_metre: float
) -> tuple[Image.Image, np.ndarray]:
    """A record's image and its depth (height, width) float32 in metres, of ``area`` alone.

    Raises:
      DecodeError, RecordError: for what cannot be read, or an area that the image does not have.
    """
    depth = annotation.depth(record, units_per_metre=units_per_metre)
    image = decode_image(record.image)
    if area is None:
        return image, depth
    y0, y1, x0, x1 = box(area, *depth.shape)
    return image.crop((x0, y0, x1, y1)), depth[y0:y1, x0:x1]


def box(area: Area, height: int, width: int) -> tuple[int, int, int, int]:
    """(first row, end, first column, end) of an area of an image of that size.

    Raises:
      DecodeError: if the image does not have it.
    """
    if len(area) == 2:
        left = (width - area[1]) // 2
        found = height - area[0], height, left, left + area[1]
    else:
        found = area[0], area[1], area[2], area[3]
    if found[0] < 0 or found[1] > height or found[2] < 0 or found[3] > width:
        raise DecodeError(f"{width} x {height} pixels: too small for the area {area}")
    return found
