"""The crops of DINO: how they are made, and sizes that change from batch to batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from webssl_jax.data import photometric
from webssl_jax.data.decode import Size, sides
from webssl_jax.data.multicrop import MultiCropView
from webssl_jax.methods import distortions
from webssl_jax.models import pixels

GLOBAL_CROPS = 2


@dataclasses.dataclass(frozen=True)
class View:
    """The crops: two of ``global_size`` and ``local_count`` of ``local_size`` pixels (the side of a
    square, or (height, width)), each with an area share between its two scales, flipped and
    distorted as in ``data/multicrop.py``. Colour jitter and greyscale have one probability for all
    crops; ``blur`` and ``solarize`` have three: for the first global, the second global and the
    local crops. ``distort_on``: where the distortions, drawn by the loader in either case, are
    done: "host", or "device", in the compiled step (``methods/distortions.py``).

    Raises:
      ValueError: when a field is out of range.
    """

    global_size: Size = 224
    local_size: Size = 98
    local_count: int = 8
    global_scale: tuple[float, ...] = (0.32, 1.0)
    local_scale: tuple[float, ...] = (0.05, 0.32)
    flip: float = 0.5
    jitter: float = 0.8
    grayscale: float = 0.2
    blur: tuple[float, ...] = (0.0, 0.9, 0.5)
    solarize: tuple[float, ...] = (0.0, 0.2, 0.0)
    distort_on: str = "host"

    def __post_init__(self) -> None:
        for name in ("global_size", "local_size"):
            pixels.check_size(name, getattr(self, name))
        if self.local_count < 0:
            raise ValueError(f"local_count = {self.local_count} must be at least 0")
        for name in ("global_scale", "local_scale"):
            scale = getattr(self, name)
            if len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 1:
                raise ValueError(f"{name} = {scale} must be (least, most), 0 < least <= most <= 1")
        counts = {"flip": 1, "jitter": 1, "grayscale": 1, "blur": 3, "solarize": 3}
        for name, count in counts.items():
            chances = np.atleast_1d(getattr(self, name))
            if len(chances) != count or not all(0 <= p <= 1 for p in chances):
                what = "a probability" if count == 1 else f"{count} probabilities"
                raise ValueError(f"{name} = {getattr(self, name)} must be {what}")
        photometric.check_place(self.distort_on)

    @property
    def names(self) -> tuple[str, ...]:
        """Those of the crops in a batch, largest first."""
        return ("global_crops", "local_crops")[: 1 + (self.local_count > 0)]

    def crops(
        self, batch: Mapping[str, Any], mean: Sequence[float], std: Sequence[float]
    ) -> list[jax.Array]:
        """Of a batch of B images what networks see: of each of ``names`` (B * crops, H, W, 3)
        float32. Crops of an image stay together, so that images stay on their devices."""
        return [
            rearrange(distortions.normalised(batch, name, mean, std), "b v h w c -> (b v) h w c")
            for name in self.names
        ]

    def loader(self, gram_size: int = 0) -> MultiCropView:
        """What makes the crops of an image; with ``gram_size`` those of a Gram teacher too."""
        crops = dataclasses.asdict(self)
        distortion = photometric.Distortion(
            jitter=crops.pop("jitter"), grayscale=crops.pop("grayscale")
        )
        return MultiCropView(**crops, distortion=distortion, gram_size=gram_size)

    def batch_spec(self, batch: int, gram_size: int = 0) -> dict[str, jax.ShapeDtypeStruct]:
        """The crops of ``batch`` images: {name: (batch, crops, H, W, 3) uint8}, and for a device
        what is to be done to them."""
        crops = (
            ("global_crops", GLOBAL_CROPS, self.global_size),
            ("local_crops", self.local_count, self.local_size),
            ("gram_crops", GLOBAL_CROPS if gram_size else 0, gram_size),
        )
        spec = {
            name: jax.ShapeDtypeStruct((batch, count, *sides(size), 3), jnp.uint8)
            for name, count, size in crops
            if count
        }
        return spec | (distortions.spec(spec, self.names) if self.distort_on == "device" else {})


@dataclasses.dataclass(frozen=True)
class CropSizes:
    """Sizes of crops of which every batch takes one set (DINOv3's stage of high resolution,
    arXiv 2508.10104, section 5.1): the i-th of ``global_size``, ``local_size`` and, with a Gram
    teacher, ``gram_size``, sides of squares in pixels, with the chance ``shares[i]`` of their sum.

    Raises:
      ValueError: when they are not equally many, or a number is out of range.
    """

    global_size: tuple[int, ...]
    local_size: tuple[int, ...]
    shares: tuple[float, ...]
    gram_size: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        counts = {len(self.global_size), len(self.local_size), len(self.shares)}
        counts |= {len(self.gram_size)} if self.gram_size else set()
        if len(counts) > 1 or counts == {0}:
            raise ValueError("global_size, local_size, gram_size and shares must be equally many")
        if min(self.shares) <= 0:
            raise ValueError(f"shares = {self.shares}: must be positive")

    def triples(self, gram: bool) -> list[tuple[int, int, int]]:
        """(global, local, Gram) sizes; the last 0 where there is no Gram teacher.

        Raises:
          ValueError: if there are Gram sizes without a Gram teacher, or none with one.
        """
        if gram != bool(self.gram_size):
            raise ValueError("crop_sizes.gram_size: of a run with method.gram, and of no other")
        twins = self.gram_size or (0,) * len(self.shares)
        return list(zip(self.global_size, self.local_size, twins, strict=True))
