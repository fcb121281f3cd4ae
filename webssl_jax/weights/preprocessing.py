"""How the images of a weight file are made: what its library's config files say, read and written.

Of transformers ``preprocessor_config.json``, of timm ``pretrained_cfg``, of open_clip
``preprocess_cfg``. Where nothing is said, it is as the family's own code does it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from webssl_jax import colours
from webssl_jax.data.views import Preprocess
from webssl_jax.weights.stored import WeightsError, shown

_PIL = {"bicubic": 3, "bilinear": 2, "lanczos": 1}
_NAMES = {number: name for name, number in _PIL.items()}
# Processors for which one number is both sides of a square; for the others it is the shorter side.
_SQUARE = ("ViT", "Siglip")


def one_way(size: Any) -> Any:
    """An image size in one spelling: a side of a square, else (height, width)."""
    size = tuple(size) if isinstance(size, list) else size
    return size[0] if isinstance(size, tuple) and size == size[:1] * 2 else size


def size_in_words(size: int | tuple[int, ...]) -> str:
    """As ``given.parse_size`` takes it."""
    return str(size) if isinstance(size, int) else "x".join(map(str, size))


def default(size: int | tuple[int, ...], towers: str = "") -> Preprocess:
    """As the originals evaluate: DINOv2's and MAE's, or those of ``towers``, ``clip`` or
    ``siglip``. What is no square is resized to, and nothing is cut off."""
    side = size if isinstance(size, int) else None
    if towers == "clip":
        return Preprocess(size, side, colours.CLIP_MEAN, colours.CLIP_STD)
    if towers == "siglip":
        return Preprocess(size, None, colours.SIGLIP_MEAN, colours.SIGLIP_STD)
    return Preprocess.of_view(size)


def of_transformers(file: Any, given: Mapping[str, Any], otherwise: Preprocess) -> Preprocess:
    """``preprocessor_config.json``, ``given``; ``otherwise`` where it says nothing.

    Raises:
      WeightsError: for values that make no sense, and for steps that this code does not have.
    """
    given = _said(given)
    mean = _colours(file, given, "image_mean", otherwise.mean)
    std = _colours(file, given, "image_std", otherwise.std)
    interpolation = otherwise.interpolation
    if "resample" in given:
        if type(given["resample"]) is not int or given["resample"] not in _NAMES:
            raise WeightsError(f"{file}: resample = {shown(given['resample'])} is unknown here")
        interpolation = _NAMES[given["resample"]]
    for step in ("do_resize", "do_rescale", "do_normalize"):
        if given.get(step, True) is not True:
            raise WeightsError(f"{file}: {step} = {shown(given[step])}: this code always does it")
    factor = given.get("rescale_factor", 1 / 255)
    if type(factor) is not float or not math.isclose(factor, 1 / 255, rel_tol=1e-6):
        raise WeightsError(f"{file}: rescale_factor = {shown(factor)}: here it is 1 / 255")
    if "size" not in given:
        return _make(file, otherwise.size, otherwise.resize, mean, std, interpolation)
    kind = given.get("image_processor_type", given.get("feature_extractor_type", ""))
    square = given.get("default_to_square", isinstance(kind, str) and kind.startswith(_SQUARE))
    asked = given["size"]
    if isinstance(asked, dict) and "shortest_edge" in asked:
        asked, square = asked["shortest_edge"], False
    elif isinstance(asked, dict):
        asked, square = _side(file, "size", asked), True
    asked = _size(file, "size", asked)
    crop = given.get("crop_size", asked) if given.get("do_center_crop", not square) else asked
    crop = _size(file, "crop_size", _side(file, "crop_size", crop))
    if square and crop != asked:
        raise WeightsError(
            f"{file}: crop_size = {crop} after both sides were resized to {asked} is not here"
        )
    if not square and not (isinstance(asked, int) and isinstance(crop, int)):
        raise WeightsError(f"{file}: crop_size = {shown(crop)} is no square")
    return _make(file, crop, None if square else asked, mean, std, interpolation)


def of_timm(file: Any, given: Mapping[str, Any], otherwise: Preprocess) -> Preprocess:
    """``pretrained_cfg``, ``given``. timm resizes the shorter side to size / crop_pct, rounded
    down."""
    given = _said(given)
    mean, std = (_colours(file, given, name, getattr(otherwise, name)) for name in ("mean", "std"))
    interpolation = given.get("interpolation", otherwise.interpolation)
    size = otherwise.size
    if "input_size" in given:
        sides = given["input_size"]
        if not isinstance(sides, list | tuple) or len(sides) != 3:
            raise WeightsError(f"{file}: input_size = {shown(sides)} is no image")
        size = _size(file, "input_size", one_way(list(sides[1:])))
    mode = given.get("crop_mode", "center")
    if not isinstance(size, int):
        if mode != "squash":
            raise WeightsError(f"{file}: crop_mode = {shown(mode)} to {size} pixels is not here")
        return _make(file, size, None, mean, std, interpolation)
    resize = otherwise.at(size).resize
    if "crop_pct" in given:
        share = given["crop_pct"]
        if type(share) not in (int, float) or not 0 < share <= 1:
            raise WeightsError(f"{file}: crop_pct = {shown(share)} makes no sense")
        resize = math.floor(size / share)
    if mode not in ("center", "squash") or mode == "squash" and resize != size:
        raise WeightsError(f"{file}: crop_mode = {shown(mode)} to {resize} pixels is not here")
    return _make(file, size, None if mode == "squash" else resize, mean, std, interpolation)


def of_open_clip(file: Any, given: Mapping[str, Any], otherwise: Preprocess) -> Preprocess:
    """``preprocess_cfg``, ``given``."""
    given = _said(given)
    mean, std = (_colours(file, given, name, getattr(otherwise, name)) for name in ("mean", "std"))
    mode = given.get("resize_mode", "shortest")
    if mode not in ("shortest", "squash"):
        raise WeightsError(f"{file}: resize_mode = {shown(mode)} is unknown here")
    resize = None if mode == "squash" else otherwise.resize
    interpolation = given.get("interpolation", otherwise.interpolation)
    return _make(file, otherwise.size, resize, mean, std, interpolation)


def for_transformers(preprocess: Preprocess, towers: str) -> dict[str, Any]:
    """``preprocessor_config.json`` of ``preprocess``, for a family of ``towers``.

    ViTImageProcessor can only resize an image into a square; BitImageProcessor resizes the shorter
    side and crops the centre, and is what DINOv2's own folders name. CLIPImageProcessor does the
    same.
    """
    height, width = preprocess.shape
    square = {"height": height, "width": width}
    if preprocess.resize is None:
        kind = "SiglipImageProcessor" if towers == "siglip" else "ViTImageProcessor"
        steps: dict[str, Any] = {"image_processor_type": kind, "size": square}
    else:
        kind = "CLIPImageProcessor" if towers else "BitImageProcessor"
        steps = {
            "image_processor_type": kind,
            "size": {"shortest_edge": preprocess.resize},
            "do_center_crop": True,
            "crop_size": square,
        }
    return steps | {
        "do_convert_rgb": True,
        "do_resize": True,
        "resample": _PIL[preprocess.interpolation],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocess.mean),
        "image_std": list(preprocess.std),
    }


def for_timm(preprocess: Preprocess) -> dict[str, Any]:
    """The part of ``pretrained_cfg`` that says how images are made."""
    crop = {"crop_pct": 1.0, "crop_mode": "squash"}
    if preprocess.resize is not None:
        side = preprocess.shape[0]
        share = side / preprocess.resize
        if math.floor(side / share) != preprocess.resize:  # by rounding
            share = math.nextafter(share, 0.0)
        crop = {"crop_pct": share}
    return {
        "interpolation": preprocess.interpolation,
        **crop,
        "mean": list(preprocess.mean),
        "std": list(preprocess.std),
    }


def for_open_clip(preprocess: Preprocess) -> dict[str, Any]:
    """``preprocess_cfg``.

    Raises:
      WeightsError: if open_clip cannot make such images.
    """
    if preprocess.resize not in (None, preprocess.size):
        raise WeightsError(
            f"open-clip: its code resizes to the size of the crop, not to {preprocess.resize} for "
            f"{preprocess.size} pixels; export in the format of transformers"
        )
    return {
        "mean": list(preprocess.mean),
        "std": list(preprocess.std),
        "interpolation": preprocess.interpolation,
        "resize_mode": "squash" if preprocess.resize is None else "shortest",
    }


def _said(given: Mapping[str, Any]) -> dict[str, Any]:
    """Without the keys that are null, which stands for the library's default."""
    return {key: value for key, value in given.items() if value is not None}


def _make(
    file: Any,
    size: int | tuple[int, ...],
    resize: int | None,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    interpolation: Any,
) -> Preprocess:
    if not isinstance(interpolation, str):
        raise WeightsError(f"{file}: interpolation = {shown(interpolation)} makes no sense")
    try:
        return Preprocess(size, resize, mean, std, interpolation)
    except ValueError as error:
        raise WeightsError(f"{file}: {error}") from None


def _side(file: Any, key: str, value: Any) -> Any:
    """Of {"height", "width"} a side or both; another value as it is."""
    if not isinstance(value, dict):
        return value
    return one_way([value.get("height"), value.get("width")])


def _size(file: Any, key: str, value: Any) -> Any:
    """A side of a square, or (height, width)."""
    for side in value if isinstance(value, tuple) else (value,):
        if type(side) is not int or side < 1:
            raise WeightsError(f"{file}: {key} = {shown(value)} makes no sense")
    return value


def _colours(
    file: Any, given: Mapping[str, Any], key: str, otherwise: tuple[float, ...]
) -> tuple[float, ...]:
    """Three finite numbers.

    Raises:
      WeightsError: if they are none.
    """
    value = given.get(key, otherwise)
    if (
        not isinstance(value, list | tuple)
        or len(value) != 3
        or not all(type(x) in (int, float) and math.isfinite(x) for x in value)
    ):
        raise WeightsError(f"{file}: colours {shown(value)} are no three numbers")
    return tuple(map(float, value))
