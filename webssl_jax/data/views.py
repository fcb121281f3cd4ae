"""Views: from an encoded image to the uint8 arrays a network is fed, on the host.

Geometry and resampling follow torchvision's ``RandomResizedCrop``, ``Resize`` and ``CenterCrop`` on
PIL images (antialiased bicubic), which the DINOv2, MAE and CLIP originals use. Normalisation and
photometric work belong on the device. Views are frozen dataclasses, so that they pickle and can be
written into a config dump.
"""

from __future__ import annotations

import dataclasses
import io
import math
import warnings

import numpy as np
from PIL import Image

# Twice the pixels of an 8K frame. Everything beyond is a bomb or a map, and costs 200 MB to decode.
MAX_PIXELS = 1 << 26
# Named, because Pillow otherwise tries all it knows, among them EPS, which starts Ghostscript.
# AVIF and JPEG 2000 are optional parts of a Pillow build. JPEG brings MPO, phones' JPEG, with it.
_KNOWN = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "TGA")
Image.init()
FORMATS = tuple(name for name in _KNOWN if name in Image.OPEN)
_DRAFTABLE = ("JPEG", "MPO")
_EXIF_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# The same turns as: swap the axes, then mirror x, then mirror y of the stored image.
_SWAPS_AXES, _MIRRORS_X, _MIRRORS_Y = (5, 6, 7, 8), (2, 3, 7, 8), (3, 4, 6, 7)

# Pillow warns of what is decided here: too many pixels is an error, broken EXIF means no rotation.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\..*")

Box = tuple[int, int, int, int]  # left, top, width, height, in pixels


class DecodeError(ValueError):
    """An image that cannot be decoded. The message gives the reason."""


@dataclasses.dataclass(frozen=True)
class OpenedImage:
    """An image whose header was read and whose pixels were not.

    ``width`` and ``height`` are those seen after the EXIF rotation, in pixels.
    """

    image: Image.Image
    orientation: int
    width: int
    height: int

    def decode(self, scale: float = 1.0) -> DecodedImage:
        """Decodes to RGB. To be called once.

        Args:
          scale: the least acceptable size as a share of the true one. A JPEG is then decoded at the
            smallest of 1/8, 1/4, 1/2 and 1 that is not below it (the inverse DCT does the
            averaging); others ignore it.

        Raises:
          DecodeError: for truncated or otherwise broken data, and for pixels without a defined
            range.
        """
        image, reduction = self.image, 1.0
        try:
            if scale < 1.0 and image.format in _DRAFTABLE:
                wanted = tuple(math.ceil(side * scale) for side in image.size)
                stored_width = image.width
                if drafted := image.draft(None, wanted):
                    reduction = stored_width / drafted[1][2]
            image = _to_rgb(image)
        except DecodeError:
            raise
        except Exception as error:  # Pillow raises nearly every type there is on hostile bytes
            raise DecodeError(_reason(error)) from None
        return DecodedImage(image, reduction, self.orientation, self.width, self.height)


@dataclasses.dataclass(frozen=True)
class DecodedImage:
    """RGB pixels as they are stored, that is before the EXIF rotation.

    A pixel stands for ``reduction`` x ``reduction`` of the true ones (1, 2, 4 or 8; those at the
    right and lower edge stand for what remains). ``width`` and ``height`` are true and upright.
    """

    pixels: Image.Image
    reduction: float
    orientation: int
    width: int
    height: int

    def upright(self) -> Image.Image:
        """The whole image after the EXIF rotation."""
        turn = _TURNS.get(self.orientation)
        return self.pixels if turn is None else self.pixels.transpose(turn)

    def crop(self, box: Box, size: int) -> Image.Image:
        """A box of the true, upright image, resampled to ``size`` x ``size`` pixels.

        The crop comes before the resize, as in torchvision, so the filter does not see beyond the
        box. In a reduced image the box falls between pixels: the pixels it touches are cut out, and
        resampled from the exact place.
        """
        left, top, w, h = box
        stored_width, stored_height = self.width, self.height
        if self.orientation in _SWAPS_AXES:
            left, top, w, h = top, left, h, w
            stored_width, stored_height = stored_height, stored_width
        if self.orientation in _MIRRORS_X:
            left = stored_width - left - w
        if self.orientation in _MIRRORS_Y:
            top = stored_height - top - h
        exact = [edge / self.reduction for edge in (left, top, left + w, top + h)]
        x0, y0 = math.floor(exact[0]), math.floor(exact[1])
        image = self.pixels.crop((x0, y0, math.ceil(exact[2]), math.ceil(exact[3])))
        inner = (exact[0] - x0, exact[1] - y0, exact[2] - x0, exact[3] - y0)
        image = image.resize((size, size), Image.Resampling.BICUBIC, box=inner)
        turn = _TURNS.get(self.orientation)
        return image if turn is None else image.transpose(turn)


def open_image(data: bytes) -> OpenedImage:
    """Reads the header of an encoded image.

    Raises:
      DecodeError: if the format is unknown, the header is broken, or there are more than
        ``MAX_PIXELS`` pixels.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.UnidentifiedImageError:
        head = bytes(data[:8])
        raise DecodeError(
            f"not an image of a known format ({len(data)} bytes, starting {head!r})"
        ) from None
    except Exception as error:  # as above
        raise DecodeError(_reason(error)) from None
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise DecodeError(f"{width} x {height} pixels are more than the limit of {MAX_PIXELS:,}")
    if width * height == 0:
        raise DecodeError(f"{width} x {height} pixels: empty")
    orientation = _orientation(image)
    if orientation in _SWAPS_AXES:
        width, height = height, width
    return OpenedImage(image, orientation, width, height)


def decode_image(data: bytes, min_size: int | None = None) -> Image.Image:
    """Decodes to an upright RGB image: EXIF rotation, grey, palette, CMYK, alpha (over white), 16
    bits (scaled), animation (first frame).

    Args:
      data: the encoded file.
      min_size: if given, a JPEG may come out smaller, as long as its shorter side has this many
        pixels.

    Raises:
      DecodeError: see :func:`open_image` and :meth:`OpenedImage.decode`.
    """
    opened = open_image(data)
    scale = 1.0 if min_size is None else min_size / min(opened.width, opened.height)
    return opened.decode(scale).upright()


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
    """One random crop, resized to a square, and maybe flipped: the whole augmentation of MAE.

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

    def __post_init__(self):
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


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 where there is none. Pillow turns TIFF by itself."""
    if "exif" not in image.info or image.format == "TIFF":
        return 1
    try:
        return image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # browsers, too, show a picture with broken EXIF as it lies
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    image.load()
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16"):
        pixels = np.asarray(image).astype(np.float32)
        return Image.fromarray(np.round(pixels / 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    if image.mode in ("I", "F"):
        raise DecodeError(f"pixels of mode {image.mode!r} have no defined range")
    return image.convert("RGB")


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
