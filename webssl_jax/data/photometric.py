"""Colour distortions of DINOv2's crops, on the host, in 8 bits.

Each operation is torchvision's on PIL images, which the originals run: brightness, contrast,
saturation and greyscale to the grey level; hue and blur, which are the expensive ones there, are
written anew on arrays and agree within the rounding (the tests state by how much). No operation
needs more than 16 bits a channel: the arrays of a crop stay in the cache.

What a crop undergoes is drawn first (:class:`Drawn`) and done afterwards, here or, from the same
numbers, on the device (``methods/distortions.py``).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

_BLUR_RADIUS = 4  # DINOv2's kernel has 9 taps, whatever the sigma
_BLUR_SIGMA = (0.1, 2.0)
SEXTANT = 128  # steps of hue from red to yellow, yellow to green, ...: 255 x 128 fits 16 bits
CIRCLE = 6 * SEXTANT
_FIRST_SEXTANTS = SEXTANT * np.array([5, 3, 1], np.uint16).reshape(3, 1, 1)  # red, green, blue


def brightness(image: Image.Image, factor: float) -> Image.Image:
    """Every channel times ``factor`` (>= 0), clipped."""
    return Image.blend(Image.new("RGB", image.size), image, factor)


def contrast(image: Image.Image, factor: float) -> Image.Image:
    """Distance from the mean grey of the image times ``factor`` (>= 0), clipped."""
    mean = int(np.asarray(image.convert("L")).mean() + 0.5)
    return Image.blend(Image.new("RGB", image.size, (mean, mean, mean)), image, factor)


def saturation(image: Image.Image, factor: float) -> Image.Image:
    """Distance from the pixel's own grey times ``factor`` (>= 0), clipped."""
    return Image.blend(grayscale(image), image, factor)


def grayscale(image: Image.Image) -> Image.Image:
    """The luma of ITU-R BT.601 in all three channels."""
    return image.convert("L").convert("RGB")


def hue(image: Image.Image, turns: float) -> Image.Image:
    """Turns the hue of HSV by ``turns`` (1 is the full circle), keeping saturation and value.

    Hue lies on a circle of six sextants. With V the largest channel, C the distance to the
    smallest and x the hue counted in sextants, a channel is V - C clip(2 - |k - 2|, 0, 1), where
    k = (n + x) mod 6 and n = 5, 3, 1 for red, green, blue.
    """
    red, green, blue = (np.asarray(plane) for plane in image.split())
    value = np.maximum(np.maximum(red, green), blue)
    chroma = (value - np.minimum(np.minimum(red, green), blue)).astype(np.int16)
    r, g, b = (plane.astype(np.int16) for plane in (red, green, blue))
    # Of several largest channels red comes before green and green before blue.
    offset, start = r - g, np.full(r.shape, 4 * SEXTANT, np.int16)
    for largest, difference, sextant in ((green == value, b - r, 2), (red == value, g - b, 0)):
        np.copyto(offset, difference, where=largest)
        np.copyto(start, sextant * SEXTANT, where=largest)
    x = offset.astype(np.float32)
    x *= SEXTANT
    x /= np.maximum(chroma, 1)
    x = np.rint(x, out=x).astype(np.int16)
    x += start
    x += CIRCLE + _steps(turns)
    x = _modulo_circle(_modulo_circle(x.view(np.uint16)))  # of less than three circles
    k = _modulo_circle(x + _FIRST_SEXTANTS).view(np.int16)
    k -= 2 * SEXTANT
    np.abs(k, out=k)
    np.subtract(2 * SEXTANT, k, out=k)
    np.maximum(k, 0, out=k)  # np.clip costs as much as both
    np.minimum(k, SEXTANT, out=k)
    k *= chroma
    k += SEXTANT // 2
    k >>= SEXTANT.bit_length() - 1
    turned = [Image.fromarray(plane) for plane in value - k.astype(np.uint8)]
    return Image.merge("RGB", turned)


def blur(pixels: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur with a kernel of 9 taps, as torchvision's: cut there, mirrored at the edges.

    Args:
      pixels: (H, W, 3) uint8, H and W at least 5.
      sigma: of the Gaussian before it is cut, in pixels.

    Returns:
      (H, W, 3) uint8.
    """
    taps = _taps(sigma)
    radius = len(taps) - 1
    if not radius:
        return pixels
    height, width, _ = pixels.shape
    padded = np.empty((height + 2 * radius, width, 3), np.uint8)
    padded[radius : radius + height] = pixels
    padded[:radius] = pixels[radius:0:-1]
    padded[radius + height :] = pixels[-2 : -2 - radius : -1]
    rows = _weigh([padded[i : i + height] for i in range(2 * radius + 1)], taps)
    padded = np.empty((height, width + 2 * radius, 3), np.uint8)
    padded[:, radius : radius + width] = rows
    padded[:, :radius] = rows[:, radius:0:-1]
    padded[:, radius + width :] = rows[:, -2 : -2 - radius : -1]
    flat = padded.reshape(height, -1)  # a long inner axis is several times faster than one of 3
    shifted = [flat[:, 3 * i : 3 * (i + width)] for i in range(2 * radius + 1)]
    return _weigh(shifted, taps).reshape(pixels.shape)


def solarize(pixels: np.ndarray) -> np.ndarray:
    """Inverts what is 128 or more of (H, W, 3) uint8."""
    return np.minimum(pixels, ~pixels)


@dataclasses.dataclass(frozen=True)
class Distortion:
    """The random distortion of one crop, in DINOv2's order: jitter, greyscale, blur, solarize.

    With probability ``jitter`` brightness, contrast and saturation are changed by factors uniform
    in 1 +- their field and the hue by turns uniform in +- ``hue``, in random order. ``grayscale``,
    ``blur`` (sigma uniform in 0.1 to 2 pixels) and ``solarize`` are probabilities.
    """

    jitter: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    grayscale: float = 0.2
    blur: float = 0.0
    solarize: float = 0.0

    def draw(self, rng: np.random.Generator) -> Drawn:
        """What one crop undergoes."""
        jitter: tuple[tuple[int, float], ...] = ()
        if rng.random() < self.jitter:
            amounts = (
                rng.uniform(1 - self.brightness, 1 + self.brightness),
                rng.uniform(1 - self.contrast, 1 + self.contrast),
                rng.uniform(1 - self.saturation, 1 + self.saturation),
                rng.uniform(-self.hue, self.hue),
            )
            order = rng.permutation(len(JITTER)).tolist()
            jitter = tuple((which, amounts[which]) for which in order)
        gray = rng.random() < self.grayscale
        sigma = rng.uniform(*_BLUR_SIGMA) if rng.random() < self.blur else None
        return Drawn(jitter, gray, sigma, rng.random() < self.solarize)

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> np.ndarray:
        """(H, W, 3) uint8 of an RGB image."""
        return self.draw(rng)(image)


JITTER = ("brightness", "contrast", "saturation", "hue")  # functions of this module
NUMBERS = 2 * len(JITTER) + 2 + _BLUR_RADIUS
PLACES = ("host", "device")


class Drawn(NamedTuple):
    """What one crop undergoes: operations of the jitter in their order, each a place in ``JITTER``
    and its amount; whether it becomes grey; the sigma of its blur, None for none; whether it is
    solarized."""

    jitter: tuple[tuple[int, float], ...] = ()
    gray: bool = False
    sigma: float | None = None
    solarize: bool = False

    def __call__(self, image: Image.Image) -> np.ndarray:
        """(H, W, 3) uint8 of an RGB image."""
        for which, amount in self.jitter:
            image = globals()[JITTER[which]](image, amount)
        if self.gray:
            image = grayscale(image)
        pixels = np.asarray(image)
        if self.sigma is not None:
            pixels = blur(pixels, self.sigma)
        return solarize(pixels) if self.solarize else pixels

    def numbers(self) -> np.ndarray:
        """(NUMBERS,) float32, the same for a device; :func:`parts` says what stands where. All are
        0 where nothing is done."""
        made = np.zeros(NUMBERS, np.float32)
        jitter, flags, taps = np.split(made, (2 * len(JITTER), NUMBERS - _BLUR_RADIUS))
        for place, (which, amount) in enumerate(self.jitter):
            is_hue = JITTER[which] == "hue"
            jitter[2 * place : 2 * place + 2] = which + 1, _steps(amount) if is_hue else amount
        flags[:] = self.gray, self.solarize
        if self.sigma is not None:
            sides = _taps(self.sigma)[1:]
            taps[: len(sides)] = sides
        return made


def check_place(distort_on: str) -> None:
    """Refuses what is no place to distort crops on.

    Raises:
      ValueError: naming those there are.
    """
    if distort_on not in PLACES:
        raise ValueError(f"distort_on = {distort_on!r} is not one of {', '.join(PLACES)}")


def numbers_of(crops: str) -> str:
    """The name in a batch of the :meth:`Drawn.numbers` of the crops of that name."""
    return f"{crops}_distortions"


def parts(numbers: Any) -> tuple[Any, Any, Any, Any]:
    """(jitter, grey, solarize, taps) of an array (NUMBERS, ...), as of :meth:`Drawn.numbers`.

    jitter: (4, 2, ...), for each operation in its order 1 + its place in ``JITTER``, or 0 for none,
    and its amount, of hue in steps of ``CIRCLE``. Of the blur the weights at distances 1 to 4, as
    of :func:`blur`. The others are 1 for yes.
    """
    cut = 2 * len(JITTER)
    jitter = numbers[:cut].reshape(len(JITTER), 2, *numbers.shape[1:])
    return jitter, numbers[cut], numbers[cut + 1], numbers[cut + 2 :]


def _steps(turns: float) -> int:
    """Turns of hue in steps of ``CIRCLE``, at least 0."""
    return round(turns * 6 * SEXTANT) % CIRCLE


def _modulo_circle(x: np.ndarray) -> np.ndarray:
    """Takes one circle off uint16 hues of one circle or more. The others would wrap round."""
    return np.minimum(x, x - np.uint16(CIRCLE))


def _taps(sigma: float) -> list[int]:
    """Weights at distances 0, 1, ... in 1/256, summing to 256 over both sides, without the zeros at
    the end. What rounding leaves over goes to the middle."""
    weights = [math.exp(-0.5 * (i / sigma) ** 2) for i in range(_BLUR_RADIUS + 1)]
    total = 2 * sum(weights) - weights[0]
    sides = [round(256 * weight / total) for weight in weights[1:]]
    while sides and not sides[-1]:
        sides.pop()
    return [256 - 2 * sum(sides), *sides]


def _weigh(shifted: list[np.ndarray], taps: list[int]) -> np.ndarray:
    """The weighted sum of uint8 arrays, in pairs at equal distance from the middle one, as uint8.

    The sum is at most 255 x 256 + 128, so 16 bits hold it.
    """
    radius = len(taps) - 1
    total = shifted[radius].astype(np.uint16)
    total *= taps[0]
    pair = np.empty_like(total)
    for distance in range(1, radius + 1):
        np.add(shifted[radius - distance], shifted[radius + distance], out=pair, dtype=np.uint16)
        pair *= taps[distance]
        total += pair
    total += 128
    total >>= 8
    return total.astype(np.uint8)
