"""Rendered characters and words, in fonts of which none is on both sides: what a network has to
read, where no set of photographed text can be had.

Font, size, place, tilt, colours and ground are drawn anew for every image, so neither colours nor
the place of a stroke tell what is written.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image, ImageDraw, ImageFont

from webssl_jax.config import UserError
from webssl_jax.corpus.mini_web import packages
from webssl_jax.corpus.mini_web.packages import Package
from webssl_jax.corpus.texts import KINDS
from webssl_jax.data import records

_TRAIN = (
    "architects-daughter audiowide comfortaa courier-prime crimson-text dosis exo inconsolata lato "
    "lora montserrat open-sans oswald playfair-display raleway roboto-slab"
).split()
_TEST = "kalam merriweather poppins source-code-pro titillium-web ubuntu".split()
FAMILIES = {"train": tuple(_TRAIN), "test": tuple(_TEST)}
PACKAGES = tuple(Package("npm", f"typeface-{x}", "1.1.13") for x in (*_TRAIN, *_TEST))
_FACES = re.compile(r"-(latin-)?[3-9]00(italic)?\.woff$")  # lighter ones vanish when they are small

_TILT = 10  # degrees, at most
_CONTRAST = 70  # of grey levels, at least
_PROBE = 100  # pixels: the size at which a text is measured

Fonts = Mapping[str, Sequence[bytes]]  # family -> the files of its faces


class Drawn(NamedTuple):
    """image: RGB, square. ink: share of its pixels that are text."""

    image: Image.Image
    ink: float


def read(cache: Path) -> dict[str, Fonts]:
    """{"train", "test": their fonts}, out of the packages in ``cache``.

    Raises:
      UserError: for a package without a face that can be used.
    """
    archives = {}
    for package in PACKAGES:
        archives[package.name.removeprefix("typeface-")] = package.archive(cache)
    fonts: dict[str, Fonts] = {}
    for part, families in FAMILIES.items():
        own = {}
        for family in families:
            archive = archives[family]
            assert archive is not None  # it was downloaded
            faces = [data for _, data in sorted(packages.read(archive, _FACES).items())]
            if not faces:
                raise UserError(f"{archive}: holds no face of {family}; delete it and start again")
            own[family] = faces
        fonts[part] = own
    return fonts


def draw(rng: np.random.Generator, fonts: Fonts, text: str, side: int) -> Drawn:
    """A text in a face drawn at random, half to 85 % of ``side`` pixels high or wide, whichever is
    more."""
    family = fonts[sorted(fonts)[int(rng.integers(len(fonts)))]]
    face = family[int(rng.integers(len(family)))]
    left, top, right, bottom = _font(face, _PROBE).getbbox(text)
    longer = max(float(right - left), float(bottom - top))
    size = round(_PROBE * rng.uniform(0.5, 0.85) * side / longer)
    font = _font(face, max(size, 4))
    left, top, right, bottom = font.getbbox(text)
    wide, high, tilt = right - left, bottom - top, rng.uniform(-_TILT, _TILT)
    turn = np.abs([np.cos(np.deg2rad(tilt)), np.sin(np.deg2rad(tilt))])
    taken = float(turn @ [wide, high]), float(turn @ [high, wide])  # of the tilted text
    x, y = (span / 2 + rng.uniform() * max(side - span, 0) for span in taken)  # its middle
    shape = Image.new("L", (side, side))
    corner = round(x - wide / 2 - left), round(y - high / 2 - top)
    ImageDraw.Draw(shape).text(corner, text, 255, font)
    shape = shape.rotate(tilt, Image.Resampling.BICUBIC, center=(x, y))
    ink = np.asarray(shape, np.float32)[..., None] / 255
    colour, ground = _colours(rng)
    pixels = ink * colour + (1 - ink) * _ground(rng, ground, side)
    image = Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))
    return Drawn(image, float(ink.mean()))


def _font(face: bytes, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(io.BytesIO(face), size, layout_engine=ImageFont.Layout.BASIC)


def _colours(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Of the text and of its ground, (3,): far enough apart for a greyscale copy."""
    while True:
        pair = rng.uniform(0, 255, (2, 3))
        if abs(np.diff(pair @ (0.299, 0.587, 0.114))[0]) >= _CONTRAST:
            return pair[0], pair[1]


def _ground(rng: np.random.Generator, colour: np.ndarray, side: int) -> np.ndarray:
    """(side, side, 3): the colour, brighter to one side, with soft blobs."""
    slope, angle = rng.uniform(0, 25), rng.uniform(0, 2 * np.pi)
    place = np.linspace(-1, 1, side)
    light = slope * (np.cos(angle) * place[:, None] + np.sin(angle) * place)
    blobs = Image.fromarray(rng.integers(0, 256, (5, 5), np.uint8))
    blobs = blobs.resize((side, side), Image.Resampling.BICUBIC)
    spots = (np.asarray(blobs, np.float32) / 127.5 - 1) * rng.uniform(0, 20)
    return colour + (light + spots)[..., None]


def write(
    output: Path, name: str, kind: str, fonts: Fonts, each: int, side: int, seed: int
) -> None:
    """``each`` images of every text of a kind, as a shard in ``output``, a folder that exists. The
    label is the text."""
    rng, texts = np.random.default_rng(seed), KINDS[kind]
    writer = ArrayRecordWriter(str(output / records.shard_name(name, 0, 1)), records.WRITER_OPTIONS)
    for number in range(each * len(texts)):
        text = texts[number % len(texts)]
        file = io.BytesIO()
        draw(rng, fonts, text, side).image.save(file, "JPEG", quality=95)
        key = f"{kind}/{name}/{number}"
        record = records.Record(file.getvalue(), (), key, side, side, "reading", text)
        writer.write(records.encode(record))
    writer.close()
