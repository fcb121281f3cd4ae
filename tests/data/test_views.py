"""Views: the images of torchvision, from whatever file is thrown at them."""

import io
import json
import pathlib
import pickle
import struct
import zlib

import numpy as np
import pytest
from image_shards import encode_image, smooth_image
from PIL import Image

from webssl_jax.data import views
from webssl_jax.data.views import DecodeError, EvalView, RandomResizedCropView, decode_image

GOLDEN = pathlib.Path(__file__).parent / "golden"
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


@pytest.mark.parametrize("name", ["landscape", "portrait", "small", "exact"])
def test_eval_view_equals_torchvision_resize_and_centre_crop(name):
    golden = np.load(GOLDEN / "preprocess.npz")
    ours = EvalView(size=64, resize=73)(encode_image(golden[f"{name}/image"]))
    assert ours.dtype == np.uint8
    np.testing.assert_array_equal(ours, golden[f"{name}/eval_73_64"])


def test_a_banner_too_thin_to_resize_is_a_decode_error():
    flat = encode_image(np.full((1, 60_000, 3), 7, np.uint8))  # would be 4 gigapixels
    with pytest.raises(DecodeError, match="60000 x 1 pixels: too thin"):
        EvalView(size=224, resize=256)(flat)
    view = RandomResizedCropView(224)(flat, np.random.default_rng(0))
    assert (view["image"] == 7).all()


@pytest.mark.parametrize("case", ["global_0.32_1", "local_0.05_0.32"])
def test_crop_geometry_has_torchvisions_distribution(case):
    golden = json.loads((GOLDEN / "preprocess.json").read_text())["crops"][case]
    height, width = golden["image_hw"]
    scale = tuple(float(s) for s in case.split("_")[1:])
    rng = np.random.default_rng(1)
    n = 6000
    boxes = np.array(
        [views.sample_crop(width, height, scale, (3 / 4, 4 / 3), rng) for _ in range(n)]
    )
    left, top, w, h = boxes.T
    assert (left >= 0).all() and (top >= 0).all()
    assert (left + w <= width).all() and (top + h <= height).all()
    for name, values in (("area", w * h / (width * height)), ("aspect", w / h)):
        mean, std, low, high = golden[name]
        # Four standard errors of the difference from a golden sample of 2,000.
        assert abs(values.mean() - mean) < 4 * std * (1 / n + 1 / 2000) ** 0.5
        assert abs(values.std() / std - 1) < 0.08
        # Rounding to pixels moves the ends by at most half a pixel a side.
        assert abs(values.min() - low) < 0.03 and abs(values.max() - high) < 0.04
    # Corners are uniform over where the crop fits.
    free = height - h
    share = (top[free > 5] / free[free > 5]).mean()
    assert abs(share - 0.5) < 0.03


def test_ten_failed_tries_fall_back_to_the_centre():
    rng = np.random.default_rng(0)
    draw = lambda w, h: views.sample_crop(w, h, (0.9, 1.0), (3 / 4, 4 / 3), rng)  # noqa: E731
    assert draw(1000, 10) == (493, 0, 13, 10)
    assert draw(10, 1000) == (0, 493, 10, 13)
    assert draw(1, 1) == (0, 0, 1, 1)


def test_a_crop_is_cut_before_it_is_resized():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)
    ours = views.open_image(encode_image(pixels)).decode().crop((30, 20, 25, 31), 24)
    cut = Image.fromarray(pixels[20:51, 30:55]).resize((24, 24), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(cut))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_crop_is_that_of_the_upright_image(orientation):
    rng = np.random.default_rng(0)
    stored = Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    decoded = views.open_image(save(stored, "PNG", exif=exif)).decode()
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
    small = views.open_image(data).decode(48 / min(box[2:]))
    assert small.reduction == 8 and small.pixels.size == (101, 76)  # rounded up
    ours = np.asarray(small.crop(box, 48)).astype(int)
    full = np.asarray(views.open_image(data).decode().crop(box, 48)).astype(int)
    # Half a pixel of misplacement is a mean difference of 5 here.
    assert np.abs(ours - full).mean() < 1.0


@pytest.mark.parametrize("size", [8, 48, 224])
def test_the_smallest_decode_that_serves_the_crop_is_taken(size):
    data = encode_image(np.zeros((333, 507, 3), np.uint8), "JPEG")
    rng = np.random.default_rng(size)
    for _ in range(50):
        _, _, w, h = views.sample_crop(507, 333, (0.05, 1.0), (3 / 4, 4 / 3), rng)
        scale = max(size / w, size / h)
        reduction = views.open_image(data).decode(scale).reduction
        if reduction > 1:
            assert min(w, h) / reduction >= size
        if reduction < 8:
            assert min(w, h) / (2 * reduction) < size * 1.03  # whole pixels are asked for


def test_a_view_is_a_function_of_bytes_and_generator_state():
    data = encode_image(smooth_image(np.random.default_rng(0), 90, 70), "WEBP")
    view = RandomResizedCropView(32)
    first, again, other = (view(data, np.random.default_rng(s))["image"] for s in (5, 5, 6))
    assert first.shape == (32, 32, 3) and first.dtype == np.uint8
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_half_of_the_views_are_flipped():
    ramp = np.repeat(np.linspace(0, 255, 64).astype(np.uint8)[None, :, None], 64, 0).repeat(3, 2)
    data, rng = encode_image(ramp), np.random.default_rng(0)
    view = RandomResizedCropView(16)
    flipped = [
        image[8, 0, 0] > image[8, -1, 0] for image in (view(data, rng)["image"] for _ in range(400))
    ]
    assert 0.42 < np.mean(flipped) < 0.58
    kept = [RandomResizedCropView(16, flip=0.0)(data, rng)["image"] for _ in range(20)]
    assert all(image[8, 0, 0] < image[8, -1, 0] for image in kept)


def test_views_pickle_and_compare():
    for view in (RandomResizedCropView(48, scale=(0.3, 1.0)), EvalView(48, 56)):
        assert pickle.loads(pickle.dumps(view)) == view
    with pytest.raises(ValueError, match="smaller than the crop"):
        EvalView(size=56, resize=48)


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
    opened = views.open_image(data)
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
