"""The sizes of CLIP by name: both towers.

``b32`` to ``bigg14`` are those of open_clip and MetaCLIP (arXiv 2309.16671). ``300m`` to ``7b`` are
the vision widths and depths of the Web-SSL paper (arXiv 2504.01017, Table 1). What else their
towers are made of, the paper does not say; assumed is MetaCLIP's block (quick-GELU MLP of 4 x
width, no LayerScale) and the text tower of ``bigg14``. ``micro`` and ``tiny`` are twins for laptops
and tests.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from webssl_jax.models import sizes
from webssl_jax.models.sizes import ViTConfig
from webssl_jax.models.text import TextConfig

_LARGE = dict(dtype="bfloat16", remat="full")

# name: fields of the vision tower. int(width x ratio) makes mlp_hidden where it is not 4 x width.
_VISION: dict[str, dict[str, Any]] = {
    "b32": dict(width=768, depth=12, heads=12, patch_size=32, **_LARGE),
    "b16": dict(width=768, depth=12, heads=12, patch_size=16, **_LARGE),
    "l14": dict(width=1024, depth=24, heads=16, patch_size=14, **_LARGE),
    "h14": dict(width=1280, depth=32, heads=16, patch_size=14, **_LARGE),
    "g14": dict(width=1408, depth=40, heads=16, patch_size=14, mlp_hidden=6144, **_LARGE),
    "bigg14": dict(width=1664, depth=48, heads=16, patch_size=14, mlp_hidden=8192, **_LARGE),
}
PAPER_SIZES = ("300m", "1b", "2b", "3b", "5b", "7b")
CLIP_SIZES = ("micro", "tiny", *_VISION, *PAPER_SIZES)

# name: (embedding, width, depth, heads) of the text tower.
_TEXT = {
    "micro": (16, 32, 2, 2),
    "tiny": (64, 128, 4, 4),
    "b32": (512, 512, 12, 8),
    "b16": (512, 512, 12, 8),
    "l14": (768, 768, 12, 12),
    "h14": (1024, 1024, 24, 16),
    "g14": (1024, 1024, 24, 16),
    "bigg14": (1280, 1280, 32, 20),
}


def vision(size: str, **overrides: Any) -> ViTConfig:
    """The image tower of that name; ``overrides`` replace any field of :class:`ViTConfig`.

    Raises:
      ValueError: for an unknown name or field, or fields that do not fit.
    """
    fields = _VISION.get(size) or sizes.shape("CLIP", size, CLIP_SIZES, patch_size=14)
    clip = dict(
        mlp="quick_gelu",
        position="learned",
        position_resize="plain",
        patch_bias=False,
        pre_norm=True,
        norm_eps=1e-5,
        init="clip",
    )
    return sizes.build(fields | clip | overrides)


def text(size: str, **overrides: Any) -> TextConfig:
    """The text tower that belongs to the image tower of that name; ``overrides`` replace any field
    of :class:`TextConfig`.

    Raises:
      ValueError: for an unknown name or field, or fields that do not fit.
    """
    if size not in CLIP_SIZES:
        raise ValueError(f"no CLIP size {size!r}; known: {', '.join(CLIP_SIZES)}")
    shape = _TEXT["bigg14" if size in PAPER_SIZES else size]
    fields = dict(zip(("embedding", "width", "depth", "heads"), shape))
    if size not in ("micro", "tiny"):
        fields |= _LARGE
    return build_text(fields | overrides)


def build_text(fields: Mapping[str, Any]) -> TextConfig:
    """``TextConfig(**fields)``, complaining about a wrong or missing field in one line for people.

    Raises:
      ValueError: for an unknown or missing field, a value of another type than the field's, or
        fields that do not fit.
    """
    return sizes.construct(TextConfig, fields, "a text tower")
