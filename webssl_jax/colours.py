"""The colour statistics that published networks expect: means and standard deviations of red, green
and blue in [0, 1]. ``models/pixels.py`` applies them on the device."""

from __future__ import annotations

from collections.abc import Sequence

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
SIGLIP_MEAN = SIGLIP_STD = (0.5, 0.5, 0.5)


def check(mean: Sequence[float], std: Sequence[float]) -> None:
    """Refuses statistics that images cannot be normalised by.

    Raises:
      ValueError: one line.
    """
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != 3:
            raise ValueError(f"{name} = {values} must be three numbers, of red, green and blue")
    if min(std) <= 0:
        raise ValueError(f"std = {std} must be positive")
