"""HEIC and JPEG XL, which Pillow does not read itself: the extra "formats" brings the decoders."""

from __future__ import annotations

import contextlib
import importlib

MODULES = {"HEIF": "pillow_heif", "JXL": "pillow_jxl"}  # by Pillow's name of the format
# width : height of JPEG XL's SizeHeader (ISO/IEC 18181-1), by its three bits; 0: the width follows
_RATIOS = (None, (1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))


def register() -> None:
    """Makes Pillow read those whose module is installed."""
    with contextlib.suppress(ImportError):
        importlib.import_module(MODULES["HEIF"]).register_heif_opener()
    with contextlib.suppress(ImportError):
        module = importlib.import_module(MODULES["JXL"])  # registers itself
        module.JpegXLImagePlugin.DECODE_THREADS = 0  # many images are decoded at once already


def jxl_size(data: bytes) -> tuple[int, int]:
    """(width, height) in a JPEG XL's header, as stored. Its plugin decodes while it opens, so what
    is too large must be refused before.

    Raises:
      ValueError: if there is no header.
    """
    stream = data if data[:2] == b"\xff\x0a" else _codestream(data)
    if stream[:2] != b"\xff\x0a":
        raise ValueError("JPEG XL without a codestream")
    bits, at = int.from_bytes(stream[2:34], "little"), 0

    def read(count: int) -> int:
        nonlocal at
        at += count
        return (bits >> (at - count)) & ((1 << count) - 1)

    def side(small: int) -> int:
        return 8 * (read(5) + 1) if small else read((9, 13, 18, 30)[read(2)]) + 1

    small = read(1)
    height = side(small)
    ratio = _RATIOS[read(3)]
    width = side(small) if ratio is None else height * ratio[0] // ratio[1]
    return width, height


def _codestream(data: bytes) -> bytes:
    """The beginning of the first codestream box."""
    at = 0
    while at + 8 <= len(data):
        size, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        head = 8
        if size == 1:
            size, head = int.from_bytes(data[at + 8 : at + 16], "big"), 16
        if kind in (b"jxlc", b"jxlp"):  # a part has its number first
            begin = at + head + (4 if kind == b"jxlp" else 0)
            return data[begin : begin + 64]
        if size < head:
            break
        at += size
    return b""
