"""From the bytes of an image file to pixels: formats, rotation, layouts, and what counts as damage.

The inputs come from the web, so every kind of file and of damage does occur; each has one defined
outcome, an image in RGB or a :class:`DecodeError` with its reason.
"""

from __future__ import annotations

import dataclasses
import io
import math
import re
import struct
import warnings
from collections.abc import Iterator

import numpy as np
import simplejpeg
from cykooz_resizer import CropBox, FilterType, ResizeAlg, ResizeOptions, Resizer
from PIL import Image, TiffImagePlugin

from webssl_jax.data import extra_formats

# Twice the pixels of an 8K frame. Everything beyond is a bomb or a map, and costs 200 MB to decode.
MAX_PIXELS = 1 << 26
# Named, because Pillow otherwise tries all it knows, among them EPS, which starts Ghostscript.
# AVIF and JPEG 2000 are optional parts of a Pillow build. JPEG brings MPO, phones' JPEG, with it.
_KNOWN = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "TGA")
EXTRA = tuple(extra_formats.MODULES)  # read where they are installed
Image.init()
extra_formats.register()
FORMATS = tuple(name for name in (*_KNOWN, *EXTRA) if name in Image.OPEN)
_MAGIC = (
    (0, b"\xff\xd8\xff", "JPEG"),
    (0, b"\x89PNG\r\n\x1a\n", "PNG"),
    (8, b"WEBP", "WEBP"),
    (0, b"GIF8", "GIF"),
    (0, b"BM", "BMP"),
    (0, b"II*\0", "TIFF"),
    (0, b"MM\0*", "TIFF"),
    (4, b"ftypavi", "AVIF"),
    (4, b"jP  ", "JPEG2000"),
    *((4, b"ftyp" + brand, "HEIF") for brand in (b"hei", b"hev", b"mif1", b"msf1")),
    (0, b"\xff\x0a", "JXL"),
    (0, b"\0\0\0\x0cJXL \r\n\x87\n", "JXL"),
)
MAGIC_BYTES = 16  # of a file's beginning, that format_of looks at
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
_DRAFTABLE = ("JPEG", "MPO")
_EXIF_ORIENTATION = 0x0112
_TIFF_BITS, _TIFF_PHOTOMETRIC = 258, 262
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

# Catmull and Rom's cubic is Pillow's BICUBIC (a = -1/2), widened when it shrinks an image as there.
# This implementation takes a fifth of Pillow's time. It rounds differently, by a quarter of a grey
# level in the mean, and cuts overshoot after columns, then rows, where Pillow does the reverse.
_BICUBIC = ResizeAlg.convolution(FilterType.catmull_rom)

# simplejpeg decodes by libjpeg-turbo to Pillow's pixels, in two thirds of its time.
_WHOLE_PIXELS = 1 << 22

# Pillow gives the memory of an image back to the system at once, and faulting it in again for the
# next one costs much: a JPEG of 500 x 375 pixels took 1.0 ms with, 0.6 ms without. So 8 blocks (of
# at most 16 MB) are kept.
Image.core.set_blocks_max(8)

# Pillow warns of what is decided here: too many pixels is an error, broken EXIF means no rotation.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\..*")

Box = tuple[int, int, int, int]  # left, top, width, height, in pixels
Size = int | tuple[int, ...]  # the side of a square, or (height, width), in pixels


def sides(size: Size) -> tuple[int, int]:
    """(height, width)."""
    height, width = size if isinstance(size, tuple) else (size, size)
    return height, width


def least_scale(size: Size, box: Box) -> float:
    """What an image may be reduced to without leaving a crop of ``box`` short of pixels."""
    height, width = sides(size)
    return max(width / box[2], height / box[3])


def ratio_of(size: Size, ratio: tuple[float, float]) -> tuple[float, float]:
    """The aspects (width / height) of crops that ``size`` then stretches by ``ratio``."""
    height, width = sides(size)
    return ratio[0] * width / height, ratio[1] * width / height


class DecodeError(ValueError):
    """An image that cannot be decoded. The message gives the reason."""


class TooManyPixelsError(DecodeError):
    """An image whose header promises more pixels than ``MAX_PIXELS``: a bomb, or a map."""


class MissingDecoderError(DecodeError):
    """An image of a format whose decoder is not installed."""


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
                wanted = math.ceil(image.width * scale), math.ceil(image.height * scale)
                stored_width = image.width
                if drafted := image.draft(None, wanted):
                    reduction = stored_width / drafted[1][2]
            image = (_whole_jpeg(image) if reduction == 1.0 else None) or _to_rgb(image)
        except DecodeError:
            raise
        except Exception as error:  # Pillow raises nearly every type there is on hostile bytes
            raise DecodeError(reason(error)) from None
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

    def crop(self, box: Box, size: Size) -> Image.Image:
        """A box of the true, upright image, resampled to ``size`` pixels.

        The crop comes before the resize, as in torchvision, so the filter does not see beyond the
        box. In a reduced image the box falls between pixels: the pixels it touches are cut out, and
        resampled from the exact place.
        """
        left, top, w, h = box
        height, width = sides(size)
        stored_width, stored_height = self.width, self.height
        if self.orientation in _SWAPS_AXES:
            left, top, w, h = top, left, h, w
            height, width = width, height
            stored_width, stored_height = stored_height, stored_width
        if self.orientation in _MIRRORS_X:
            left = stored_width - left - w
        if self.orientation in _MIRRORS_Y:
            top = stored_height - top - h
        exact = [edge / self.reduction for edge in (left, top, left + w, top + h)]
        x0, y0 = math.floor(exact[0]), math.floor(exact[1])
        image = self.pixels.crop((x0, y0, math.ceil(exact[2]), math.ceil(exact[3])))
        inner = CropBox(exact[0] - x0, exact[1] - y0, exact[2] - exact[0], exact[3] - exact[1])
        resized = Image.new("RGB", (width, height), None)  # all of it is written below
        # A resizer of its own for each call: one cannot serve two threads at once.
        Resizer().resize_pil(image, resized, ResizeOptions(_BICUBIC, crop_box=inner))
        turn = _TURNS.get(self.orientation)
        return resized if turn is None else resized.transpose(turn)


def format_of(data: bytes) -> str | None:
    """The format of an image file by its first bytes, None if it is none of these. What has no
    such mark (TGA, PPM) is not told."""
    for at, magic, name in _MAGIC:
        if data.startswith(magic, at):
            return name
    return None


def without_texts(data: bytes) -> bytes:
    """A PNG without its texts and its colour profile, which do not change a pixel here, and which
    may be of any size. Other data as they are."""
    if not data.startswith(_PNG) or not any(mark in data for mark in _PNG_TEXTS):
        return data
    parts, end = [_PNG], len(_PNG)
    for kind, begin, end in _png_chunks(data):
        if kind not in _PNG_TEXTS:
            parts.append(data[begin:end])
    return b"".join([*parts, data[end:]])


def png_text(data: bytes, keyword: str) -> str | None:
    """The plain (tEXt) text of a PNG under a keyword. Others are not unpacked, as they may be of
    any size."""
    head = keyword.encode("latin-1") + b"\0"
    for kind, begin, end in _png_chunks(data):
        if kind == b"tEXt" and data.startswith(head, begin + 8):
            return data[begin + 8 + len(head) : end - 4].decode("latin-1")
    return None


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(kind, begin, end) of each."""
    at = len(_PNG)
    while at + 12 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, at)
        yield kind, at, at + 12 + size
        at += 12 + size


def open_image(data: bytes) -> OpenedImage:
    """Reads the header of an encoded image.

    Raises:
      DecodeError: if the format is unknown or the header is broken.
      TooManyPixelsError: if there are more than ``MAX_PIXELS`` pixels.
    """
    try:
        if format_of(data) == "JXL":
            _check_pixels(*extra_formats.jxl_size(data))
        image = Image.open(io.BytesIO(without_texts(data)), formats=FORMATS)
    except TooManyPixelsError:
        raise
    except Image.UnidentifiedImageError:
        if (kind := format_of(data)) in EXTRA and kind not in FORMATS:
            raise MissingDecoderError(f"{kind}: pip install 'webssl_jax[formats]'") from None
        head = bytes(data[:8])
        raise DecodeError(
            f"not an image of a known format ({len(data)} bytes, starting {head!r})"
        ) from None
    except Image.DecompressionBombError as error:
        raise TooManyPixelsError(str(error)) from None
    except Exception as error:  # as above
        raise DecodeError(reason(error)) from None
    width, height = image.size
    _check_pixels(width, height)
    if width * height == 0:
        raise DecodeError(f"{width} x {height} pixels: empty")
    orientation = _orientation(image)
    if orientation in _SWAPS_AXES:
        width, height = height, width
    return OpenedImage(image, orientation, width, height)


def _check_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise TooManyPixelsError(
            f"{width} x {height} pixels are more than the limit of {MAX_PIXELS:,}"
        )


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


def upright_rgb(image: Image.Image) -> Image.Image:
    """An image that Pillow has opened or made, as :func:`decode_image` would give it.

    Raises:
      DecodeError: see :meth:`OpenedImage.decode`.
    """
    return OpenedImage(image, _orientation(image), *image.size).decode().upright()


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 where there is none. TIFF and JPEG XL come turned, the latter unless
    it holds a whole JPEG."""
    turned = image.format == "TIFF" or (image.format == "JXL" and not getattr(image, "jpeg", False))
    if "exif" not in image.info or turned:
        return 1
    try:
        return image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # browsers, too, show a picture with broken EXIF as it lies
        return 1


def _whole_jpeg(image: Image.Image) -> Image.Image | None:
    """What ``_to_rgb`` makes of a colour JPEG, sooner; None for what is left to Pillow: other
    files, large ones, whose copy would take much memory, and broken ones, which it judges."""
    if image.format not in _DRAFTABLE or image.mode != "RGB":
        return None
    file = getattr(image, "fp", None)
    if not isinstance(file, io.BytesIO) or image.width * image.height > _WHOLE_PIXELS:
        return None
    try:
        pixels = simplejpeg.decode_jpeg(file.getvalue(), "RGBX")
    except ValueError:
        return None
    whole = Image.new("RGB", image.size, None)  # frombytes of Image would fill it with black first
    whole.frombytes(pixels, "raw", "RGBX")
    return whole


def _to_rgb(image: Image.Image) -> Image.Image:
    image.load()
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        return _deep_grey_to_rgb(image)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    if image.mode in ("I", "F"):
        raise DecodeError(f"pixels of mode {image.mode!r} have no defined range")
    return image.convert("RGB")


def _deep_grey_to_rgb(image: Image.Image) -> Image.Image:
    """Grey of more than 8 bits. Pillow hands out the stored numbers: those of a TIFF may have 12
    bits, or count from white; those of a PGM it has scaled to 16 bits."""
    tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
    white = 2 ** tags.get(_TIFF_BITS, (16,))[0] - 1
    pixels = np.asarray(image).astype(np.float32) * (255 / white)
    if tags.get(_TIFF_PHOTOMETRIC) == 0:
        pixels = 255 - pixels
    return Image.fromarray(np.round(pixels).astype(np.uint8)).convert("RGB")


def reason(error: Exception) -> str:
    """An exception in words, without the addresses of the Python objects that Pillow names."""
    words = re.sub(r" <[\w.]+ object at 0x[0-9a-f]+>", "", str(error))
    return f"{type(error).__name__}: {words}" if words else type(error).__name__
