"""Decoding: one defined outcome for every file that is thrown at it."""

import io
import struct
import zlib

import numpy as np
import pytest
from cykooz_resizer import CpuExtensions, FilterType, ResizeAlg, ResizeOptions, Resizer
from PIL import Image

from tests.data.image_shards import encode_image, smooth_image
from webssl_jax.data.decode import DecodedImage, DecodeError, _whole_jpeg, decode_image, open_image
from webssl_jax.data.views import RandomResizedCropView

GREEN, WHITE = (20, 160, 60), (255, 255, 255)


def save(image: Image.Image, fmt: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, fmt, **options)
    return buffer.getvalue()


def png16(pixels: np.ndarray) -> bytes:
    """A 16-bit PNG, grey (H, W) or RGB (H, W, 3), which Pillow cannot write in colour."""
    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 16, 2 if pixels.ndim == 3 else 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def test_a_crop_is_cut_before_it_is_resized():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)
    pixels[20:51, 30:55] = 99
    ours = open_image(encode_image(pixels)).decode().crop((30, 20, 25, 31), 24)
    assert (np.asarray(ours) == 99).all()


@pytest.mark.parametrize(
    "box, size", [((30, 20, 360, 290), 224), ((101, 57, 200, 160), 98), ((0, 0, 60, 70), 98)]
)
def test_a_crop_is_resized_as_pillow_does_but_for_rounding(box, size):
    image = Image.fromarray(smooth_image(np.random.default_rng(0), 400, 320))
    left, top, w, h = box
    ours = open_image(save(image, "PNG")).decode().crop(box, size)
    cut = image.crop((left, top, left + w, top + h))
    theirs = np.asarray(cut.resize((size, size), Image.Resampling.BICUBIC)).astype(int)
    error = np.abs(np.asarray(ours) - theirs)
    assert error.max() <= 3 and error.mean() < 0.4


def test_an_image_in_several_of_pillows_memory_blocks_is_resized_alike():
    coarse = Image.fromarray(smooth_image(np.random.default_rng(0), 130, 110))
    image = coarse.resize((2600, 2200))  # 23 MB; a block holds 16
    ours = DecodedImage(image, 1.0, 1, 2600, 2200).crop((40, 30, 2500, 2150), 64)
    theirs = image.crop((40, 30, 2540, 2180)).resize((64, 64), Image.Resampling.BICUBIC)
    error = np.abs(np.asarray(ours).astype(int) - np.asarray(theirs))
    assert error.max() <= 3 and error.mean() < 0.4


def test_resizing_gives_the_same_pixels_on_every_processor():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8))
    ours = DecodedImage(image, 1.0, 1, 80, 60).crop((3, 5, 70, 50), 57)
    for extensions in (CpuExtensions.none, Resizer().cpu_extensions):
        resizer, resized = Resizer(), Image.new("RGB", (57, 57))
        resizer.cpu_extensions = extensions
        options = ResizeOptions(ResizeAlg.convolution(FilterType.catmull_rom))
        resizer.resize_pil(image.crop((3, 5, 73, 55)), resized, options)
        assert resized.tobytes() == ours.tobytes(), extensions


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_crop_is_that_of_the_upright_image(orientation):
    rng = np.random.default_rng(0)
    stored = Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    decoded = open_image(save(stored, "PNG", exif=exif)).decode()
    upright = np.asarray(decoded.upright())
    assert upright.shape == (decoded.height, decoded.width, 3)
    crop = decoded.crop((11, 17, 30, 30), 30)
    np.testing.assert_array_equal(np.asarray(crop), upright[17:47, 11:41])


@pytest.mark.parametrize("orientation", [1, 3, 6])
@pytest.mark.parametrize("box", [(101, 67, 443, 391), (358, 212, 443, 391), (0, 0, 801, 603)])
def test_a_drafted_jpeg_gives_nearly_the_view_of_the_full_one(orientation, box):
    coarse = Image.fromarray(smooth_image(np.random.default_rng(0), 100, 75))
    stored = coarse.resize((801, 603), Image.Resampling.BICUBIC)
    if orientation == 6:
        box = (box[1], box[0], box[3], box[2])
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = save(stored, "JPEG", quality=95, exif=exif)
    small = open_image(data).decode(48 / min(box[2:]))
    assert small.reduction == 8 and small.pixels.size == (101, 76)  # rounded up
    ours = np.asarray(small.crop(box, 48)).astype(int)
    full = np.asarray(open_image(data).decode().crop(box, 48)).astype(int)
    # Half a pixel of misplacement is a mean difference of 5 here.
    assert np.abs(ours - full).mean() < 1.0


def test_a_whole_jpeg_has_the_pixels_of_pillows_decoder():
    rng = np.random.default_rng(0)
    noisy = smooth_image(rng, 61, 47) ^ rng.integers(0, 32, (47, 61, 3), dtype=np.uint8)
    image = Image.fromarray(noisy)
    kinds = [{"subsampling": kind, "quality": 20 + 30 * kind} for kind in range(3)]
    kinds += [{"progressive": True}, {"restart_marker_blocks": 2}, {"keep_rgb": True}]
    for options in kinds:
        data = save(image, "JPEG", **options)
        ours = _whole_jpeg(open_image(data).image)
        assert ours is not None, options
        theirs = np.asarray(Image.open(io.BytesIO(data)))
        np.testing.assert_array_equal(np.asarray(ours), theirs, str(options))
        np.testing.assert_array_equal(np.asarray(open_image(data).decode().pixels), theirs)
        assert ours.mode == "RGB" and _whole_jpeg(open_image(data[:-200]).image) is None
    for mode, kind in (("L", "JPEG"), ("CMYK", "JPEG"), ("RGB", "PNG")):  # these are Pillow's
        assert _whole_jpeg(open_image(save(image.convert(mode), kind)).image) is None


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied(orientation, fmt):
    upright = np.zeros((32, 48, 3), np.uint8)
    upright[:16, :24] = GREEN  # a mark in the upper left corner
    # What a camera stores: the inverse of the turn a viewer must make.
    inverse = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]
    stored = Image.fromarray(upright)
    stored = stored if inverse is None else stored.transpose(Image.Transpose(inverse))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = save(stored, fmt, exif=exif, **({"quality": 100} if fmt in ("JPEG", "WEBP") else {}))
    opened = open_image(data)
    assert (opened.width, opened.height) == (48, 32)
    pixels = np.asarray(opened.decode().upright()).astype(int)
    assert np.abs(pixels[4:12, 4:20] - GREEN).max() < 12
    assert pixels[20:].max() < 12 and pixels[:, 28:].max() < 12


def test_every_pixel_layout_becomes_rgb():
    rgb = np.zeros((16, 16, 3), np.uint8) + np.array(GREEN, np.uint8)
    image = Image.fromarray(rgb)
    clear = image.convert("RGBA")
    clear.putalpha(0)
    half = image.convert("RGBA")
    half.putalpha(128)
    palette = Image.new("P", (16, 16), 1)
    palette.putpalette([0, 0, 0, *GREEN])
    frames = [image, Image.new("RGB", (16, 16), "red")]
    grey = Image.new("L", (16, 16), 99)
    cases = {
        "rgb": (save(image, "PNG"), GREEN),
        "grey": (save(grey, "PNG"), (99,) * 3),
        "grey jpeg": (save(grey, "JPEG"), (99,) * 3),
        "one bit": (save(Image.new("1", (16, 16), 1), "PNG"), WHITE),
        "palette": (save(palette, "PNG"), GREEN),
        "palette with a clear colour": (save(palette, "PNG", transparency=1), WHITE),
        "rgb with a clear colour": (save(image, "PNG", transparency=GREEN), WHITE),
        "clear": (save(clear, "PNG"), WHITE),
        "clear webp": (save(clear, "WEBP", lossless=True), WHITE),
        "half clear": (save(half, "PNG"), [(c * 128 + 255 * 127) / 255 for c in GREEN]),
        "grey and alpha": (save(Image.merge("LA", (grey, Image.new("L", (16, 16)))), "PNG"), WHITE),
        "cmyk": (save(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG"), (255, 0, 0)),
        "cmyk tiff": (save(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "TIFF"), (255, 0, 0)),
        "grey of 16 bits": (png16(np.full((16, 16), 100 * 257)), (100,) * 3),
        "rgb of 16 bits": (png16(np.full((16, 16, 3), 100 * 257)), (100,) * 3),
        "animated gif": (save(frames[0], "GIF", save_all=True, append_images=frames[1:]), GREEN),
        "animated webp": (
            save(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True),
            GREEN,
        ),
    }
    for name, (data, expected) in cases.items():
        decoded = decode_image(data)
        assert decoded.mode == "RGB" and decoded.size == (16, 16), name
        error = np.abs(np.asarray(decoded).astype(int) - np.array(expected)).max()
        assert error <= 3, f"{name}: off by {error}"


def damaged_files() -> dict[str, tuple[bytes, str]]:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    files = {f: encode_image(noise, f) for f in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")}
    bomb = bytearray(files["PNG"])
    bomb[16:24] = struct.pack(">II", 60_000, 60_000)
    bomb[29:33] = struct.pack(">I", zlib.crc32(bytes(bomb[12:29])))
    flipped = bytearray(files["PNG"])
    flipped[len(flipped) // 2] ^= 0xFF
    return {f"truncated {f}": (d[: len(d) // 2], ".") for f, d in files.items()} | {
        "empty": (b"", "not an image"),
        "text": (b"<html>404 not found</html>", "not an image of a known format \\(26 bytes"),
        "bomb": (bytes(bomb), "60000 x 60000 pixels|exceeds limit"),
        "flipped bit": (bytes(flipped), "."),
        "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
        "floating point": (save(Image.new("F", (9, 9), 0.5), "TIFF"), "no defined range"),
    }


@pytest.mark.parametrize("name", damaged_files())
def test_a_damaged_image_is_a_decode_error_with_its_reason(name):
    data, reason = damaged_files()[name]
    with pytest.raises(DecodeError, match=reason) as error:
        decode_image(data)
    assert str(error.value)
    with pytest.raises(DecodeError):
        RandomResizedCropView(8)(data, np.random.default_rng(0))


def test_broken_exif_means_no_rotation():
    data = save(Image.new("RGB", (9, 5)), "JPEG", exif=b"Exif\0\0garbage")
    assert decode_image(data).size == (9, 5)
