"""What a method tells the optimiser about its parameters, as tables over their paths."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

# A row of ``decay``: biases and the factors of norms and LayerScale are not decayed (timm's rule,
# which MAE uses: whatever is one-dimensional in one block).
ONE_DIMENSIONAL = (r"/(bias|scale|gamma)$", 0.0)


@dataclasses.dataclass(frozen=True)
class Tables:
    """What the optimiser and the exporter need to know, as (regex over parameter paths, value)
    rows.

    Each is an ordered table in the language of ``params.py``; the first match wins.

    decay: multiplier of the weight decay (default 1.0).
    learning_rate: multiplier of the learning rate (default 1.0): a number, a tuple of numbers, one
      for each block of a stacked parameter, or the name of one of the method's schedules.
    frozen: rows with True are not trained and hold no optimiser state.
    bounds: (least, most) that every step clamps a parameter to.
    """

    decay: Sequence[tuple[str, float]] = ()
    learning_rate: Sequence[tuple[str, float | tuple[float, ...] | str]] = ()
    frozen: Sequence[tuple[str, bool]] = ()
    bounds: Sequence[tuple[str, tuple[float, float]]] = ()


def falling_rates(
    depth: int, layer_decay: float, patch_embed_rate: float
) -> tuple[tuple[str, float | tuple[float, ...]], ...]:
    """DINOv2's rows of ``learning_rate``: block i of n has ``layer_decay`` to the n - i, tokens and
    the patch embedding one power more, and the embedding ``patch_embed_rate`` times that."""
    tokens = layer_decay ** (depth + 1)
    return (
        (r"^encoder/patch_embed/", tokens * patch_embed_rate),
        (r"^encoder/(cls_token|mask_token|pos_embed|register_tokens)$", tokens),
        (r"^encoder/blocks/", tuple(layer_decay ** (depth - i) for i in range(depth))),
    )
