"""Awkward images: each is RGB of a defined size and colour, or a counted substitute in a batch.

``test_decode.py`` has the common layouts, rotations and damages; here is the rest of what the web
holds, and the way of all of it through the converter and the loader.
"""

import functools
import io
import json
import os
import pathlib
import struct
import subprocess
import sys
import textwrap
import zlib

import numpy as np
import pytest
from PIL import Image

from tests.data.image_shards import encode_image, make_record, write_shard
from webssl_jax.data import records
from webssl_jax.data.decode import DecodeError, TooManyPixelsError, decode_image
from webssl_jax.data.pipeline import TrainLoader, read_some
from webssl_jax.data.sources import ArrayRecordSource
from webssl_jax.data.views import Preprocess, RandomResizedCropView

ROOT = pathlib.Path(__file__).parent.parent.parent
GREY, RED, WHITE = (100,) * 3, (255, 0, 0), (255,) * 3
GREY16 = 100 * 257
SHORT, LONG = 3, 4  # types of TIFF values


def save(image, fmt, **options):
    buffer = io.BytesIO()
    image.save(buffer, fmt, **options)
    return buffer.getvalue()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(pixels, colour_type, *extra, size=None):
    """A PNG of 8 or 16 bits from (H, W, C) numbers; ``size`` is what the header says instead."""
    depth = 8 * pixels.dtype.itemsize
    rows = b"".join(b"\0" + row.astype(f">u{depth // 8}").tobytes() for row in pixels)
    width, height = size or pixels.shape[1::-1]
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    body = [chunk(b"IHDR", header), *extra, chunk(b"IDAT", zlib.compress(rows))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(body) + chunk(b"IEND", b"")


def tiff(data, tags, side=4):
    """A little-endian TIFF of one strip. ``tags``: {tag: list of values}."""
    tags = {256: [side], 257: [side], 259: [1], 278: [side], 279: [len(data)], 273: [0]} | tags
    strip = 8 + 2 + 12 * len(tags) + 4 + sum(2 * len(v) for v in tags.values() if len(v) > 2)
    tags[273] = [strip]
    at, entries, long_values = 8 + 2 + 12 * len(tags) + 4, b"", b""
    for tag, values in sorted(tags.items()):
        kind = LONG if tag == 273 else SHORT
        raw = struct.pack(f"<{len(values)}{'I' if kind == LONG else 'H'}", *values)
        if len(raw) > 4:
            raw, long_values = struct.pack("<I", at + len(long_values)), long_values + raw
        entries += struct.pack("<HHI", tag, kind, len(values)) + raw.ljust(4, b"\0")
    head = b"II*\0" + struct.pack("<IH", 8, len(tags))
    return head + entries + bytes(4) + long_values + data


def filled(value, channels, dtype="<u2"):
    return np.full((4, 4, channels), value, dtype)


def cmyk_jpeg(ink, adobe=True):
    """As Photoshop writes it: ink counted downwards from 255. ``adobe``: and says so."""
    data = save(Image.new("CMYK", (4, 4), ink), "JPEG", quality=100)
    if adobe:
        return data
    at = data.index(b"\xff\xee")
    return data[:at] + data[at + 2 + struct.unpack(">H", data[at + 2 : at + 4])[0] :]


def ycck_jpeg():
    """Red as YCC of its ink and black, the second way of Photoshop."""
    cyan = Image.new("RGB", (1, 1), (0, 255, 255)).convert("YCbCr").getpixel((0, 0))
    data = bytearray(cmyk_jpeg(tuple(255 - c for c in (*cyan, 255))))
    data[data.index(b"Adobe") + 11] = 2
    return bytes(data)


def with_exif(orientation, kind=SHORT):
    entry = struct.pack(">HHHIH", 1, 0x0112, kind, 1, orientation) + bytes(6)
    exif = b"Exif\0\0MM\0*\0\0\0\x08" + entry
    return save(Image.new("RGB", (4, 4), RED), "PNG", exif=exif)


@functools.cache
def half_a_gigabyte():
    """As few bytes as it can be packed into."""
    packer = zlib.compressobj(9)
    return b"".join(packer.compress(bytes(1 << 20)) for _ in range(512)) + packer.flush()


@functools.cache
def whole_images():
    """{name: (file, (height, width), colour)}."""
    red = Image.new("RGB", (4, 4), RED)
    others = [Image.new("RGB", (4, 4), c) for c in ("blue", "green")]
    frames = {"save_all": True, "append_images": others}
    grey_tiff = {258: [16], 262: [1], 277: [1]}
    deep = np.full((4, 4), GREY16, ">u2").tobytes()
    text = chunk(b"zTXt", b"x\0\0" + half_a_gigabyte())
    many = (chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(1 << 20), 9)) for _ in range(100))
    grey = png(filled(100, 3, "u1"), 2)
    square = {
        "tiff 16-bit grey": (tiff(filled(GREY16, 1).tobytes(), grey_tiff), GREY),
        "tiff 16-bit grey, counted from white": (
            tiff(filled(155 * 257, 1).tobytes(), grey_tiff | {262: [0]}),
            GREY,
        ),
        "tiff 12-bit grey": (tiff(b"\x64\x06\x46" * 8, grey_tiff | {258: [12]}), GREY),
        "tiff 16-bit rgb": (
            tiff(filled(GREY16, 3).tobytes(), {258: [16] * 3, 262: [2], 277: [3]}),
            GREY,
        ),
        "tiff 16-bit rgb, clear": (
            tiff(
                filled([GREY16] * 3 + [0], 4).tobytes(),
                {258: [16] * 4, 262: [2], 277: [4], 338: [2]},
            ),
            WHITE,
        ),
        "tiff 16-bit cmyk": (
            tiff(filled([0, 65535, 65535, 0], 4).tobytes(), {258: [16] * 4, 262: [5], 277: [4]}),
            RED,
        ),
        "tiff lab": (save(Image.new("LAB", (4, 4), (110, 128, 128)), "TIFF"), (102,) * 3),
        "tiff fax": (save(Image.new("1", (4, 4), 1), "TIFF", compression="group4"), WHITE),
        "pgm 16-bit": (b"P5 4 4 65535\n" + deep, GREY),
        "ppm 16-bit": (b"P6 4 4 65535\n" + filled(GREY16, 3, ">u2").tobytes(), GREY),
        "png 16-bit grey and alpha": (png(filled([GREY16, 65535], 2), 4), GREY),
        "png 16-bit grey and alpha, clear": (png(filled([GREY16, 0], 2), 4), WHITE),
        "png 16-bit rgba": (png(filled([GREY16] * 3 + [65535], 4), 6), GREY),
        "png 16-bit rgb with a clear colour": (
            png(filled(GREY16, 3), 2, chunk(b"tRNS", struct.pack(">3H", *[GREY16] * 3))),
            WHITE,
        ),
        "jpeg 2000 16-bit": (save(Image.new("I;16", (4, 4), GREY16), "JPEG2000"), GREY),
        "cmyk jpeg": (cmyk_jpeg((0, 255, 255, 0)), RED),
        "cmyk jpeg without the adobe marker": (cmyk_jpeg((0, 255, 255, 0), adobe=False), RED),
        "ycck jpeg": (ycck_jpeg(), RED),
        "progressive jpeg": (save(red, "JPEG", progressive=True, quality=100), RED),
        "jpeg of a phone, two pictures": (save(red, "MPO", quality=100, **frames), RED),
        "apng": (save(red, "PNG", **frames), RED),
        "apng with a still first": (save(red, "PNG", default_image=True, **frames), RED),
        "animated gif": (save(red, "GIF", **frames), RED),
        "animated webp": (save(red, "WEBP", lossless=True, **frames), RED),
        "bmp of 32 bits": (save(Image.new("RGBA", (4, 4), (*RED, 0)), "BMP"), RED),
        "tga, run lengths": (save(red, "TGA", compression="tga_rle"), RED),
        "orientation 0": (with_exif(0), RED),
        "orientation 9": (with_exif(9), RED),
        "orientation in words": (with_exif(0x6C00, kind=2), RED),
        "a colour profile of 500 MB": (
            png(filled(100, 3, "u1"), 2, chunk(b"iCCP", b"x\0\0" + half_a_gigabyte())),
            GREY,
        ),
        "a text of 500 MB": (png(filled(100, 3, "u1"), 2, text), GREY),
        "a text of 500 MB behind the pixels": (grey[:-12] + text + grey[-12:], GREY),
        "100 texts of 1 MB": (png(filled(100, 3, "u1"), 2, *many), GREY),
        "a text with a wrong checksum": (
            png(filled(100, 3, "u1"), 2, chunk(b"tEXt", b"x\0y")[:-1] + b"?"),
            GREY,
        ),
        "500 MB behind 16 pixels": (
            b"\x89PNG\r\n\x1a\n"
            + chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 8, 2, 0, 0, 0))
            + chunk(b"IDAT", half_a_gigabyte())
            + chunk(b"IEND", b""),
            (0, 0, 0),
        ),
    } | {
        f"broken colour profile, {fmt}": (
            save(red, fmt, icc_profile=b"no profile" * 20, **options),
            RED,
        )
        for fmt, options in [
            ("PNG", {}),
            ("TIFF", {}),
            ("JPEG", {"quality": 100}),
            ("WEBP", {"lossless": True}),
        ]
    }
    return {name: (data, (4, 4), colour) for name, (data, colour) in square.items()} | {
        "1 x 1": (encode_image(np.full((1, 1, 3), 100, np.uint8)), (1, 1), GREY),
        "1 x 2000": (encode_image(np.full((2000, 1), 100, np.uint8), "JPEG"), (2000, 1), GREY),
        "4000 x 3": (encode_image(np.full((3, 4000, 3), 100, np.uint8), "WEBP"), (3, 4000), GREY),
    }


@functools.cache
def bombs():
    """{name: file} whose headers promise 60,000 x 60,000 pixels."""
    jpeg = bytearray(encode_image(np.zeros((16, 16, 3), np.uint8), "JPEG"))
    at = jpeg.index(b"\xff\xc0") + 5
    jpeg[at : at + 4] = struct.pack(">HH", 60_000, 60_000)
    screen = struct.pack("<HHBBB", 60_000, 60_000, 0x80, 0, 0) + bytes(6)
    frame = b"," + struct.pack("<HHHHB", 0, 0, 60_000, 60_000, 0) + b"\x02\x02\x4c\x01\x00;"
    side = {256: [60_000], 257: [60_000], 258: [8], 262: [1], 277: [1]}
    return {
        "png bomb": png(filled(0, 3, "u1"), 2, size=(60_000, 60_000)),
        "jpeg bomb": bytes(jpeg),
        "gif bomb": b"GIF89a" + screen + frame,
        "tiff bomb": tiff(bytes(100), side),
        "just above the limit": png(filled(0, 3, "u1"), 2, size=(8193, 8193)),
    }


@functools.cache
def broken_images():
    """{name: (file, its reason)}."""
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    bad_sum = bytearray(png(noise, 2))
    bad_sum[-20] ^= 1
    pixels = filled(0, 3, "u1")
    grey = {262: [1], 277: [1]}
    return {
        "zero bytes": (b"", "not an image of a known format \\(0 bytes"),
        "html": (b"<!DOCTYPE html><html>Not found</html>", "not an image of a known format"),
        "noise": (bytes(range(256)) * 4, "not an image of a known format"),
        "a video": (b"\0\0\0\x18ftypisom\0\0\2\0isomiso2mp41" + bytes(500), "."),
        "half a progressive jpeg": (encode_image(noise, "JPEG", progressive=True)[:600], "."),
        "half a gif": (encode_image(noise, "GIF")[:900], "."),
        "a png with a wrong checksum": (bytes(bad_sum), "broken data stream"),
        "a png without pixels": (png(pixels, 2)[:33] + chunk(b"IEND", b""), "."),
        "a tiff whose table is elsewhere": (b"II*\0\xf0\xff\xff\xff" + bytes(99), "not an image"),
        "a tiff without end": (b"II*\0\x08\0\0\0\x60\xea" + bytes(99), "."),
        "a gif of 0 x 0": (b"GIF89a" + bytes(4) + b"\x80\0\0" + bytes(6) + b";", "."),
        "a bmp without pixels": (
            b"BM"
            + struct.pack("<IHHI", 1080, 0, 0, 1078)
            + struct.pack("<IiiHHIIiiII", 40, 4000, 4000, 1, 8, 1, 2, 0, 0, 0, 0)
            + bytes(1026),
            ".",
        ),
        "32-bit whole numbers": (
            tiff(filled(9, 1, "<u4").tobytes(), grey | {258: [32]}),
            "no defined range",
        ),
        "16-bit numbers with sign": (
            tiff(filled(9, 1).tobytes(), grey | {258: [16], 339: [2]}),
            "no defined range",
        ),
        "floating point": (
            tiff(filled(0.5, 1, "<f4").tobytes(), grey | {258: [32], 339: [3]}),
            "no defined range",
        ),
    }


@pytest.mark.parametrize("name", whole_images())
def test_an_awkward_image_is_rgb_of_its_true_size_and_colour(name):
    data, shape, colour = whole_images()[name]
    pixels = np.asarray(decode_image(data))
    assert pixels.shape == (*shape, 3) and pixels.dtype == np.uint8
    np.testing.assert_allclose(pixels, np.broadcast_to(colour, pixels.shape), atol=3)


@pytest.mark.parametrize("name", broken_images())
def test_a_broken_image_is_a_decode_error_with_its_reason(name):
    data, reason = broken_images()[name]
    with pytest.raises(DecodeError, match=reason) as error:
        decode_image(data)
    assert not isinstance(error.value, TooManyPixelsError)


@pytest.mark.parametrize("name", bombs())
def test_a_bomb_is_told_apart_from_damage(name):
    with pytest.raises(TooManyPixelsError, match="limit of"):
        decode_image(bombs()[name])


@pytest.fixture(scope="module")
def files():
    """{name: (file, whether it is whole)}, all of the above."""
    return (
        {name: (data, True) for name, (data, *_) in whole_images().items()}
        | {name: (data, False) for name, (data, _) in broken_images().items()}
        | {name: (data, False) for name, data in bombs().items()}
    )


def test_the_loader_delivers_every_awkward_image_or_a_counted_substitute(files, tmp_path, caplog):
    path = tmp_path / "awkward.arrayrecord"
    items = [make_record(data, i, "any") for i, (data, _) in enumerate(files.values())]
    write_shard(path, [records.encode(item) for item in items])
    source = ArrayRecordSource(str(path))
    broken = {i for i, (_, whole) in enumerate(files.values()) if not whole}
    view = RandomResizedCropView(16)
    with TrainLoader(source, view, global_batch=len(files), seed=0, threads=4) as loader:
        batch = next(loader)
    assert batch["image"].shape == (len(files), 16, 16, 3) and batch["image"].dtype == np.uint8
    assert sorted(batch["record"]) == list(range(len(files)))
    assert set(batch["record"][batch["substituted"]]) == broken == set(loader.damage.records)
    assert loader.damage.substituted == len(broken)
    assert len([r for r in caplog.messages if "damaged record replaced" in r]) == len(broken)
    view = Preprocess(16, 18)
    found = [image for _, image in read_some(source, lambda record: view(record.image))]
    assert np.stack(found).shape == (len(files) - len(broken), 16, 16, 3)


def test_the_converter_keeps_what_is_whole_whatever_its_extension_and_counts_the_rest(
    files, tmp_path
):
    folder = tmp_path / "images"
    folder.mkdir()
    for name, (data, _) in files.items():
        (folder / f"{name}.jpg").write_bytes(data)
    command = [sys.executable, ROOT / "tools" / "make_records.py", "folder", "--workers", "1"]
    options = ["--min-side", "1", "--max-aspect", "1e9", "--input", folder]
    done = subprocess.run(
        [*command, *options, "--output", tmp_path / "out"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    summary = json.loads((tmp_path / "out" / "train.summary.json").read_text())
    dropped = {reason: row["count"] for reason, row in summary["dropped"].items()}
    assert dropped.pop("more pixels than the limit") == len(bombs())
    assert sum(dropped.values()) == len(broken_images())
    source = ArrayRecordSource(str(tmp_path / "out"))
    kept = [records.decode(source[i]) for i in range(len(source))]
    assert {pathlib.Path(r.key).stem for r in kept} == set(whole_images())
    assert {r.key: r.image for r in kept} == {
        f"{name}.jpg": data for name, (data, whole) in files.items() if whole
    }


def test_bombs_take_little_memory_and_time(files, tmp_path):
    for number, (data, _) in enumerate(files.values()):
        (tmp_path / f"{number:03d}").write_bytes(data)
    script = textwrap.dedent("""
        import pathlib, re, sys
        from concurrent import futures
        from webssl_jax.data.decode import DecodeError, decode_image
        def attempt(path):
            try:
                return decode_image(path.read_bytes()).size is not None
            except DecodeError:
                return False
        paths = sorted(pathlib.Path(sys.argv[1]).iterdir())
        with futures.ThreadPoolExecutor(16) as pool:
            print(sum(pool.map(attempt, paths)))
        # not ru_maxrss: that counts what pytest held when it started this
        print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
    """)
    child = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    count, kibibytes = child.stdout.read().split()
    child.stdout.close()
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    assert child.returncode == 0 and int(count) == len(whole_images())
    assert int(kibibytes) < 2 * 2**20
    assert usage.ru_utime < 30


def test_a_line_too_thin_for_an_evaluation_is_its_counted_damage():
    for name in ("1 x 2000", "4000 x 3"):
        data = whole_images()[name][0]
        assert RandomResizedCropView(224)(data, np.random.default_rng(0))["image"].shape == (
            224,
            224,
            3,
        )
        with pytest.raises(DecodeError, match="too thin"):
            Preprocess(224, 256)(data)
