"""A frozen ViT as a source of features, and the words in which somebody says which of them are
wanted. What nobody wants is not computed: under jit the rest is pruned.

Shape letters: B images, h x w patches, R registers, D width.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from webssl_jax.models.attention import cls_attention
from webssl_jax.models.pooling import pool_attention
from webssl_jax.models.rope import Rotation, grid_coordinates
from webssl_jax.models.sizes import ViTConfig
from webssl_jax.models.vit import ViT, ViTOutput

PATCHES = ("none", "mean", "grid")  # each holds what those before it hold


@dataclasses.dataclass(frozen=True)
class Want:
    """Which features of an image are wanted.

    cls: the CLS token, or the pooled tokens of a network without one.
    patches: ``none``, their ``mean``, or the whole ``grid``. Means are taken on the device, in
      float32.
    blocks: 0-based numbers of blocks whose CLS and patches are wanted too; negative numbers count
      from the last.
    blocks_norm: whether those of ``blocks`` go through the final norm. Pooled tokens, which take
      the place of CLS in some networks, always do.
    pad: images may have any sides. Where the patches do not divide one, it gets normalised zeros on
      both sides (:func:`center_pad`), and the grid covers them too.
    registers: the register tokens.
    diagnostics: what pictures need of the last block; see :class:`Diagnostics`.

    Raises:
      ValueError: for another word for ``patches``.
    """

    cls: bool = True
    patches: str = "grid"
    blocks: tuple[int, ...] = ()
    blocks_norm: bool = True
    pad: bool = False
    registers: bool = False
    diagnostics: bool = False

    def __post_init__(self) -> None:
        if self.patches not in PATCHES:
            raise ValueError(f"patches = {self.patches!r} is not one of {', '.join(PATCHES)}")
        object.__setattr__(self, "blocks", tuple(self.blocks))


class Diagnostics(NamedTuple):
    """Attention and token norms of the last block of B images, in float32.

    attention: (B, heads, h, w), the CLS token's weights on patches; with those on itself and on
    registers they add up to 1. cls_norm (B,), register_norms (B, R), patch_norms (B, h, w): lengths
    of the block's output tokens before the final norm, which makes them alike. Where pooled tokens
    take the place of CLS, the weights are those of the pooling's probe, or where their mean does
    the mean weights of all tokens, and ``cls_norm`` is the length of what is pooled.
    """

    attention: jax.Array
    cls_norm: jax.Array
    register_norms: jax.Array
    patch_norms: jax.Array


class Features(NamedTuple):
    """Frozen features of B images after the final norm, in float32; None where not wanted.

    cls: (B, D). patches: (B, h, w, D), or their mean (B, D). registers: (B, R, D). blocks:
    {block, as it was asked for: (cls, patches)}, each through the final norm unless it was wanted
    without.
    """

    cls: jax.Array | None
    patches: jax.Array | None
    registers: jax.Array | None
    blocks: dict[int, tuple[jax.Array | None, jax.Array | None]]
    diagnostics: Diagnostics | None


def compute_features(
    config: ViTConfig, params: dict[str, Any], images: jax.Array, want: Want
) -> Features:
    """Features of whole images, nothing hidden.

    Args:
      params: of the encoder.
      images: normalised (B, H, W, 3), of any sides that the patch size divides; with ``want.pad``
        of any sides.

    Raises:
      ValueError: for images that do not divide into patches, or a block that is not there.
    """
    if want.pad:
        images = center_pad(images, config.patch_size)
    grid = config.grid_of(*images.shape[1:3])
    seen = ViT(config).apply(
        {"params": params},
        images,
        layers=want.blocks,
        layers_norm=want.blocks_norm,
        inside=want.diagnostics,
    )
    assert isinstance(seen, ViTOutput)  # of images of one size

    def shaped(patches: jax.Array) -> jax.Array | None:
        if want.patches == "none":
            return None
        if want.patches == "mean":
            return patches.mean(axis=1)
        return patches.reshape(patches.shape[0], *grid, patches.shape[-1])

    return Features(
        seen.cls if want.cls else None,
        shaped(seen.patches),
        seen.registers if want.registers else None,
        {b: (cls if want.cls else None, shaped(x)) for b, (cls, x) in seen.layers.items()},
        _diagnostics(config, params, seen, grid) if want.diagnostics else None,
    )


def center_pad(images: jax.Array, multiple: int) -> jax.Array:
    """Zeros around normalised images (B, H, W, 3), up to the next multiple on each axis; of an odd
    number of rows or columns the larger part comes after (DINOv2's ``CenterPadding``)."""
    wider = [-side % multiple for side in images.shape[1:3]]
    return jnp.pad(images, ((0, 0), *((n // 2, n - n // 2) for n in wider), (0, 0)))


def _diagnostics(
    config: ViTConfig, params: dict[str, Any], seen: ViTOutput, grid: tuple[int, int]
) -> Diagnostics:
    norms = jnp.linalg.norm(seen.x_prenorm.astype(jnp.float32), axis=-1)
    if config.pooling == "map":
        tokens = jnp.concatenate([seen.registers, seen.patches], axis=1)
        attention = pool_attention(config, params["pool"], tokens)
        cls_norm = jnp.linalg.norm(seen.cls, axis=-1)
    else:
        assert seen.last_block_input is not None  # it was asked for
        last = jax.tree.map(lambda stacked: stacked[-1], params["blocks"])
        rotation: Rotation | None = None
        queries: int | None = None
        if config.rope:
            places = jnp.asarray(grid_coordinates(grid))
            rotation = config.rope.rotation(places, prefix=config.prefix)
        if config.pooling == "cls":
            queries = 1
        attention = cls_attention(config, last, seen.last_block_input, rotation, queries)
        cls_norm = norms[:, 0] if queries else jnp.linalg.norm(seen.cls, axis=-1)
    first = norms.shape[1] - seen.patches.shape[1]
    return Diagnostics(
        attention[:, :, first:].reshape(*attention.shape[:2], *grid),
        cls_norm,
        norms[:, first - config.num_registers : first],
        norms[:, first:].reshape(-1, *grid),
    )
