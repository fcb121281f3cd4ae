"""Between the uint8 images of the loader and the numbers a network sees. Runs on the device."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


def check_crop(image_size: int | tuple[int, ...], scale_min: float, scale_max: float) -> None:
    """Refuses a random resized crop to ``image_size`` pixels (of a side, or height and width) of an
    area share between the two scales that cannot be.

    Raises:
      ValueError: naming what is out of range.
    """
    check_size("image_size", image_size)
    if not 0 < scale_min <= scale_max <= 1:
        raise ValueError(
            f"scale_min = {scale_min}, scale_max = {scale_max}: must satisfy "
            "0 < scale_min <= scale_max <= 1"
        )


def check_size(name: str, size: int | tuple[int, ...]) -> None:
    """Refuses what is neither a side nor (height, width).

    Raises:
      ValueError: naming it.
    """
    both = size if isinstance(size, tuple) else (size, size)
    if len(both) != 2 or min(both) < 1:
        raise ValueError(f"{name} = {size} must be at least 1, or two sides")


def normalise(images: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """uint8 (..., 3) -> float32 (image / 255 - mean) / std per colour."""
    return (images.astype(jnp.float32) / 255 - np.asarray(mean, np.float32)) / np.asarray(
        std, np.float32
    )


def denormalise(images: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """Inverse of :func:`normalise`, rounded and clipped to uint8."""
    pixels = (images * np.asarray(std, np.float32) + np.asarray(mean, np.float32)) * 255
    return jnp.clip(jnp.round(pixels), 0, 255).astype(jnp.uint8)
