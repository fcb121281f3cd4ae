"""The sizes of CLIP and SigLIP by name: image tower and text tower.

``b32`` to ``bigg14`` are those of open_clip and MetaCLIP (arXiv 2309.16671), with quick-GELU as
MetaCLIP's, but ``g14``, of which there are LAION's weights alone, has GELU. ``300m`` to ``7b`` are
the vision widths and depths of the Web-SSL paper (arXiv 2504.01017, Table 1). The paper does not
describe their towers further; assumed are MetaCLIP's block (quick-GELU MLP of 4 x width, no
LayerScale) and the text tower of ``bigg14``. ``micro`` and ``tiny`` are for laptops and tests.

``siglip_...`` are SigLIP's towers (arXiv 2303.15343; shapes of big_vision's models/vit.py):
attention pooling instead of a CLS token, tanh-GELU, a bidirectional text tower that pools the last
token, and no projection except the linear head of the texts. The vocabulary of texts is CLIP's,
because SigLIP's own, 32,000 pieces of sentencepiece, is not shipped.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from webssl_jax.models import sizes
from webssl_jax.models.sizes import ViTConfig
from webssl_jax.models.text import TextConfig

_LARGE = dict(dtype="bfloat16", remat="full")

# name: fields of the image tower. int(width x ratio) makes mlp_hidden where it is not 4 x width.
_VISION: dict[str, dict[str, Any]] = {
    "b32": dict(width=768, depth=12, heads=12, patch_size=32, **_LARGE),
    "b16": dict(width=768, depth=12, heads=12, patch_size=16, **_LARGE),
    "l14": dict(width=1024, depth=24, heads=16, patch_size=14, **_LARGE),
    "h14": dict(width=1280, depth=32, heads=16, patch_size=14, **_LARGE),
    "g14": dict(
        width=1408, depth=40, heads=16, patch_size=14, mlp_hidden=6144, mlp="gelu", **_LARGE
    ),
    "bigg14": dict(width=1664, depth=48, heads=16, patch_size=14, mlp_hidden=8192, **_LARGE),
}
PAPER_SIZES = ("300m", "1b", "2b", "3b", "5b", "7b")
CLIP_SIZES = ("micro", "tiny", *_VISION, *PAPER_SIZES)
# name: fields of the image tower; the text tower has the same blocks.
_SIGLIP: dict[str, dict[str, Any]] = {
    "siglip_micro": dict(width=32, depth=2, heads=2, patch_size=8, image_size=32),
    "siglip_tiny": dict(width=128, depth=6, heads=4, patch_size=8, image_size=48),
    "siglip_b16": dict(width=768, depth=12, heads=12, patch_size=16, **_LARGE),
    "siglip_l16": dict(width=1024, depth=24, heads=16, patch_size=16, **_LARGE),
    "siglip_so400m": dict(width=1152, depth=27, heads=16, patch_size=14, mlp_hidden=4304, **_LARGE),
}
SIGLIP_SIZES = tuple(_SIGLIP)
_SIGLIP_SHARED = dict(mlp="gelu_tanh", norm_eps=1e-6, init="siglip")

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
    if size in _SIGLIP:
        vit = dict(position="learned", position_resize="plain", pooling="map")
        return sizes.build(_SIGLIP[size] | _SIGLIP_SHARED | vit | overrides)
    fields = _VISION.get(size) or sizes.shape(
        "CLIP", size, (*CLIP_SIZES, *SIGLIP_SIZES), patch_size=14
    )
    clip = dict(
        mlp="quick_gelu",
        position="learned",
        position_resize="plain",
        patch_bias=False,
        pre_norm=True,
        norm_eps=1e-5,
        init="clip",
    )
    return sizes.build(clip | fields | overrides)


def text(size: str, **overrides: Any) -> TextConfig:
    """The text tower that belongs to the image tower of that name; ``overrides`` replace any field
    of :class:`TextConfig`.

    Raises:
      ValueError: for an unknown name or field, or fields that do not fit.
    """
    if size in _SIGLIP:
        image = _SIGLIP[size]
        blocks = {key: x for key, x in image.items() if key not in ("patch_size", "image_size")}
        tower = dict(
            embedding=image["width"], context=64, causal=False, pooling="last", projection_bias=True
        )
        return build_text(blocks | _SIGLIP_SHARED | tower | overrides)
    if size not in CLIP_SIZES:
        known = ", ".join((*CLIP_SIZES, *SIGLIP_SIZES))
        raise ValueError(f"no CLIP size {size!r}; known: {known}")
    shape = _TEXT["bigg14" if size in PAPER_SIZES else size]
    fields: dict[str, Any] = dict(zip(("embedding", "width", "depth", "heads"), shape))
    if size not in ("micro", "tiny"):
        fields |= _LARGE
    if size == "g14":
        fields["mlp"] = "gelu"
    return build_text(fields | overrides)


def build_text(fields: Mapping[str, Any]) -> TextConfig:
    """``TextConfig(**fields)``, with errors in one line for people.

    Raises:
      ValueError: for an unknown or missing field, a value of another type than the field's, or
        fields that do not fit.
    """
    return sizes.construct(TextConfig, fields, "a text tower")
