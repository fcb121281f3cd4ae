"""Between the uint8 images of the loader and the numbers a network sees. Runs on the device."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
SIGLIP_MEAN = SIGLIP_STD = (0.5, 0.5, 0.5)


def check_crop(image_size: int, scale_min: float, scale_max: float) -> None:
    """Refuses a random resized crop to ``image_size`` pixels of an area share between the two
    scales that cannot be.

    Raises:
      ValueError: naming what is out of range.
    """
    if image_size < 1:
        raise ValueError(f"image_size = {image_size} must be at least 1")
    if not 0 < scale_min <= scale_max <= 1:
        raise ValueError(
            f"scale_min = {scale_min}, scale_max = {scale_max}: must satisfy "
            "0 < scale_min <= scale_max <= 1"
        )


def check(mean: Sequence[float], std: Sequence[float]) -> None:
    """Refuses colour statistics that :func:`normalise` cannot use.

    Raises:
      ValueError: one line.
    """
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != 3:
            raise ValueError(f"{name} = {values} must be three numbers, of red, green and blue")
    if min(std) <= 0:
        raise ValueError(f"std = {std} must be positive")


def normalise(images: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """uint8 (..., 3) -> float32 (image / 255 - mean) / std per colour."""
    return (images.astype(jnp.float32) / 255 - np.float32(mean)) / np.float32(std)


def denormalise(images: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """Inverse of :func:`normalise`, rounded and clipped to uint8."""
    pixels = (images * np.float32(std) + np.float32(mean)) * 255
    return jnp.clip(jnp.round(pixels), 0, 255).astype(jnp.uint8)
