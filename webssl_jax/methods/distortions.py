"""The distortions of ``data/photometric.py`` on the device, for a loader that is too slow.

The host draws what a crop undergoes and hands over the crop as it was, with ``photometric.NUMBERS``
float32 that say it. Here that is done to all crops of a batch at once, as the host would have done
it, rounding after every operation: the pixels are the host's, but for a grey level where a product
falls on the edge of a rounding.

All values are whole numbers below 2^24, which float32 holds exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from webssl_jax.data import photometric
from webssl_jax.models import pixels

_LUMA = (19595, 38470, 7471)  # of red, green and blue, in 1/65536: Pillow's


def spec(
    crops: Mapping[str, jax.ShapeDtypeStruct], names: Sequence[str]
) -> dict[str, jax.ShapeDtypeStruct]:
    """What a batch holds beside the crops ``names`` of it, (B, V, H, W, 3) each, where they are
    distorted on the device."""
    return {
        photometric.numbers_of(name): jax.ShapeDtypeStruct(
            (*crops[name].shape[:-3], photometric.NUMBERS), jnp.float32
        )
        for name in names
    }


def normalised(
    batch: Mapping[str, Any], name: str, mean: Sequence[float], std: Sequence[float]
) -> jax.Array:
    """The crops ``name`` of a batch as a network takes them, (B, V, H, W, 3) float32: see
    :func:`seen` and ``pixels.normalise``."""
    return pixels.normalise(seen(batch, name), mean, std)


def seen(batch: Mapping[str, Any], name: str) -> Any:
    """The crops ``name`` of a batch, (B, V, H, W, 3) uint8, distorted if that was left to the
    device: then the batch has their numbers, too."""
    numbers = batch.get(photometric.numbers_of(name))
    return batch[name] if numbers is None else distort(batch[name], numbers)


@jax.jit
def distort(crops: jax.Array, numbers: jax.Array) -> jax.Array:
    """What ``photometric.Drawn`` does to one crop on the host, for many.

    Args:
      crops: (..., H, W, 3) uint8, H and W at least 5.
      numbers: (..., photometric.NUMBERS) float32, as of ``Drawn.numbers``.

    Returns:
      (..., H, W, 3) uint8.
    """
    # Red, green and blue apart: an innermost axis of 3 would fill 3 of a TPU's 128 lanes. Numbers
    # stand as (..., 1, 1) beside a plane's (..., H, W).
    planes = jnp.moveaxis(crops, -1, 0)
    jitter, gray, solarize, taps = photometric.parts(jnp.moveaxis(numbers, -1, 0)[..., None, None])

    def change(planes: jax.Array, drawn: jax.Array) -> tuple[jax.Array, None]:
        return _jitter(planes.astype(jnp.float32), *drawn).astype(jnp.uint8), None

    planes, _ = jax.lax.scan(change, planes, jitter)
    values = planes.astype(jnp.float32)
    values = jnp.where(gray > 0, _luma(values), values)
    values = _blur(values, taps)
    values = jnp.where(solarize > 0, jnp.minimum(values, 255 - values), values)
    return jnp.moveaxis(values.astype(jnp.uint8), 0, -1)


def _jitter(planes: jax.Array, which: jax.Array, amount: jax.Array) -> jax.Array:
    """One operation of the colour jitter: ``which`` is its place in ``photometric.JITTER`` plus 1,
    0 for none. planes: (3, ..., H, W), the others (..., 1, 1)."""
    is_brightness, is_contrast, is_saturation, is_hue = (
        which == i + 1 for i in range(len(photometric.JITTER))
    )
    luma = _luma(planes)
    # Brightness, contrast and saturation are the distance from black, from the mean grey and from
    # the pixel's own grey, times the amount.
    origin = jnp.where(is_contrast, _mean(luma), jnp.where(is_saturation, luma, 0.0))
    blended = jnp.floor(jnp.clip(origin + amount * (planes - origin), 0, 255))
    turned = _hue(planes, amount)
    planes = jnp.where(is_hue, turned, planes)
    return jnp.where(is_brightness | is_contrast | is_saturation, blended, planes)


def _luma(planes: jax.Array) -> jax.Array:
    """The grey of (3, ..., H, W)."""
    weighted = sum((w * plane for w, plane in zip(_LUMA, planes)), jnp.float32(1 << 15))
    return jnp.floor(weighted / (1 << 16))


def _mean(luma: jax.Array) -> jax.Array:
    """The rounded mean over a crop (..., H, W), as (..., 1, 1)."""
    count = luma.shape[-2] * luma.shape[-1]
    total = luma.astype(jnp.int32).sum(axis=(-2, -1), keepdims=True)
    return ((2 * total + count) // (2 * count)).astype(jnp.float32)


def _hue(planes: jax.Array, steps: jax.Array) -> jax.Array:
    """As ``photometric.hue``, which has the formula; steps: 0 to CIRCLE - 1 of the circle."""
    sextant, circle = photometric.SEXTANT, photometric.CIRCLE
    red, green, blue = planes
    value = planes.max(axis=0)
    chroma = value - planes.min(axis=0)
    is_red, is_green = red == value, green == value
    offset = jnp.where(is_red, green - blue, jnp.where(is_green, blue - red, red - green))
    start = jnp.where(is_red, 0.0, jnp.where(is_green, 2.0 * sextant, 4.0 * sextant))
    x = jnp.round(offset * sextant / jnp.maximum(chroma, 1)) + start + steps + circle
    x = _modulo_circle(_modulo_circle(x))  # of less than three circles
    turned = []
    for first in (5, 3, 1):
        k = _modulo_circle(x + first * sextant)
        share = jnp.clip(2 * sextant - jnp.abs(k - 2 * sextant), 0, sextant)
        turned.append(value - jnp.floor((share * chroma + sextant // 2) / sextant))
    return jnp.stack(turned)


def _modulo_circle(x: jax.Array) -> jax.Array:
    return jnp.where(x >= photometric.CIRCLE, x - photometric.CIRCLE, x)


def _blur(planes: jax.Array, taps: jax.Array) -> jax.Array:
    """As ``photometric.blur``. taps: (distances, ..., 1, 1), the weights at distances 1, 2, ... in
    1/256. A product with a matrix for each crop, along H, then along W: shifting rows of pixels
    takes a TPU several times as long."""
    height, width = planes.shape[-2:]
    planes = _rounded("...hg,c...gw->c...hw", _weights(taps, height), planes)
    return _rounded("...vw,c...hw->c...hv", _weights(taps, width), planes)


def _weights(taps: jax.Array, size: int) -> jax.Array:
    """(..., size, size), row by row what the pixels of a line give to one, mirrored at the ends."""
    made = (256 - 2 * taps.sum(axis=0)) * jnp.eye(size)
    here, there = jnp.arange(size)[:, None], jnp.arange(size)
    for distance, tap in enumerate(taps, 1):
        for place in (here - distance, here + distance):
            mirrored = size - 1 - jnp.abs(size - 1 - jnp.abs(place))
            made += tap * (mirrored == there)
    return made


def _rounded(product: str, weights: jax.Array, planes: jax.Array) -> jax.Array:
    """Their product over 256. Both are whole numbers up to 256: bfloat16 holds them exactly."""
    both = (x.astype(jnp.bfloat16) for x in (weights, planes))
    total = jnp.einsum(product, *both, preferred_element_type=jnp.float32)
    return jnp.floor((total + 128) / 256)
