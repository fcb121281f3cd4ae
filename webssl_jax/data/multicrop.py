"""The views of DINOv2: two large and several small crops of one image, each distorted on its own.

Oquab et al. 2023, "DINOv2: Learning Robust Visual Features without Supervision", and its public
training code; Web-DINO (Fan et al. 2025) keeps them, with local crops of 98 pixels.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from PIL import Image

from webssl_jax.data.decode import Size, least_scale, open_image, ratio_of, sides
from webssl_jax.data.photometric import Distortion, check_place, numbers_of
from webssl_jax.data.views import sample_crop

# Probabilities of blur for the first global crop, the second, and each local one. DINOv2's code
# asks for 1.0, 0.1 and 0.5, but its wrapper hands 1 - p to torchvision, so what runs, and what made
# the released DINOv2 and Web-DINO weights, is the other way round
# (github.com/facebookresearch/dinov3/issues/286).
BLUR_AS_EXECUTED = (0.0, 0.9, 0.5)
BLUR_AS_WRITTEN = (1.0, 0.1, 0.5)


@dataclasses.dataclass(frozen=True)
class MultiCropView:
    """Two global and ``local_count`` local crops, each drawn from the whole image.

    Sizes are the side of a square or (height, width). ``global_scale`` and ``local_scale`` bound a
    crop's share of the image area, ``ratio`` its width/height over that of its size; ``flip`` is
    the probability of a left-right flip of a crop. ``distortion`` holds what all crops share; its
    ``blur`` and ``solarize`` are replaced by those given here for the first global, the second
    global and the local crops. With ``gram_size`` the global crops, squares then, are cut out at
    that size, resized to ``global_size``, and also given as they were before they were distorted
    (DINOv3's Gram teacher). With ``distort_on`` "device" crops are given as they were, too, and
    beside them what is to be done to them (``methods/distortions.py``); what is drawn is the same.
    """

    global_size: Size = 224
    local_size: Size = 98
    local_count: int = 8
    global_scale: tuple[float, float] = (0.32, 1.0)
    local_scale: tuple[float, float] = (0.05, 0.32)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    blur: tuple[float, float, float] = BLUR_AS_EXECUTED
    solarize: tuple[float, float, float] = (0.0, 0.2, 0.0)
    distortion: Distortion = Distortion()
    gram_size: int = 0
    distort_on: str = "host"

    def __post_init__(self) -> None:
        if self.local_count < 0:
            raise ValueError(f"MultiCropView: local_count {self.local_count} is below 0")
        if (least := min(*sides(self.global_size), *sides(self.local_size))) < 5:
            raise ValueError(f"MultiCropView: crops of {least} pixels are too small to be blurred")
        check_place(self.distort_on)

    def __call__(self, data: bytes, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """``{"global_crops": (2, *G, 3), "local_crops": (local_count, *L, 3)}``, uint8; without
        local crops the first alone; with ``gram_size`` "gram_crops" (2, S, S, 3); with
        ``distort_on`` "device" "global_crops_distortions" (2, NUMBERS) and
        "local_crops_distortions", float32, as of ``photometric.Drawn.numbers``.

        Raises:
          DecodeError: if the image cannot be decoded.
        """
        opened = open_image(data)
        sizes = [self.gram_size or self.global_size] * 2 + [self.local_size] * self.local_count
        scales = [self.global_scale] * 2 + [self.local_scale] * self.local_count
        boxes = [
            sample_crop(opened.width, opened.height, scale, ratio_of(size, self.ratio), rng)
            for size, scale in zip(sizes, scales, strict=True)
        ]
        # One decode serves all crops: at the least scale that leaves none of them short of pixels.
        decoded = opened.decode(max(map(least_scale, sizes, boxes)))
        *globals_, local = (
            dataclasses.replace(self.distortion, blur=blur, solarize=solarize)
            for blur, solarize in zip(self.blur, self.solarize, strict=True)
        )
        distortions = globals_ + [local] * self.local_count
        crops: list[np.ndarray] = []
        twins: list[np.ndarray] = []
        numbers: list[np.ndarray] = []
        for box, size, distort in zip(boxes, sizes, distortions, strict=True):
            image = decoded.crop(box, size)
            if rng.random() < self.flip:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            if self.gram_size and len(crops) < 2:
                twins.append(np.asarray(image))
                height, width = sides(self.global_size)
                image = image.resize((width, height), Image.Resampling.BICUBIC)
            drawn = distort.draw(rng)
            if self.distort_on == "device":
                crops.append(np.asarray(image))
                numbers.append(drawn.numbers())
            else:
                crops.append(drawn(image))
        groups = {"global_crops": crops[:2], "local_crops": crops[2:], "gram_crops": twins}
        groups |= {numbers_of("global_crops"): numbers[:2], numbers_of("local_crops"): numbers[2:]}
        return {name: np.stack(group) for name, group in groups.items() if group}
