"""What a user says of a weight file that does not say it itself."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

# Names alone, of ``families.FAMILIES``, ``clip.MLPS`` and ``position.INTERPOLATIONS``: to name them
# a parser imports no jax.
FORMATS = (
    "dinov2-heads dinov2-pth dinov2-teacher dinov3-pth dinov3-teacher hf-clip hf-clip-vision "
    "hf-dinov2 hf-dinov2-registers hf-dinov3 hf-ijepa hf-siglip hf-siglip-vision hf-vit hf-vit-mae "
    "ijepa-pth mae-pth mocov3-pth open-clip open-clip-pth timm timm-clip timm-dinov3 timm-ijepa "
    "timm-siglip"
).split()
MLPS = ("gelu", "quick_gelu")
RESIZES = ("antialias", "offset", "plain")


@dataclasses.dataclass(frozen=True)
class Given:
    """None stands for nothing said.

    heads, decoder_heads: of attention, of a network that the file has.
    mlp: of CLIP's towers, a name in ``clip.MLPS``.
    image_size: of the encoder, a side or (height, width): the grid of its positions.
    position_resize: how positions follow other image sizes (``ViTConfig.position_resize``). It is a
      choice, so it goes before what the file states.
    """

    heads: int | None = None
    decoder_heads: int | None = None
    mlp: str | None = None
    image_size: int | tuple[int, ...] | None = None
    position_resize: str | None = None


NOTHING = Given()


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds a flag for each field of :class:`Given`."""
    parser.add_argument("--heads", type=int, help="attention heads, where the file says none")
    parser.add_argument("--decoder-heads", type=int, help="those of a decoder")
    parser.add_argument("--mlp", choices=MLPS, help="of CLIP's towers, where the file says none")
    parser.add_argument(
        "--image-size",
        type=parse_size,
        metavar="HxW",
        help="pixels of the images, where the file says none: the grid of its positions",
    )
    parser.add_argument(
        "--position-resize",
        choices=RESIZES,
        help="how positions follow other image sizes, where the family's own way is not wanted",
    )


def parse_size(text: str) -> int | tuple[int, ...]:
    """``224`` or ``HEIGHTxWIDTH``.

    Raises:
      ValueError: for anything else.
    """
    words = text.split("x")
    sides = tuple(int(word) for word in words if word.isdecimal())
    if len(sides) != len(words) or len(sides) > 2 or min(sides) < 1:
        raise ValueError(f"image_size = {text}: must be N or HEIGHTxWIDTH")
    return sides if len(sides) == 2 else sides[0]


def options(args: argparse.Namespace) -> dict[str, Any]:
    """The flags of :func:`add_flags` that were given, as keywords of ``load.open_``."""
    values = {field.name: getattr(args, field.name) for field in dataclasses.fields(Given)}
    return {name: value for name, value in values.items() if value is not None}
