"""The vision transformer encoder of Web-DINO, Web-MAE, CLIP and SigLIP (Dosovitskiy et al., arXiv
2010.11929).

Tokens stand in the order [CLS, registers, patches row-major]. Positions are added to CLS and
patches before the registers come in, which have none; a masked patch is replaced before its
position is added. With pooling ``map`` (SigLIP) there is no CLS, and what attention pooling makes
of all tokens stands in for its output.

Shape letters: B images, H x W pixels, h x w = N patches, K kept patches, R registers,
T = 1 + R + N tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from webssl_jax.models import position
from webssl_jax.models.blocks import block_stack
from webssl_jax.models.layers import (
    PatchEmbed,
    gather_tokens,
    layer_norm,
    patchify,
    position_init,
    token_init,
)
from webssl_jax.models.pooling import AttentionPool
from webssl_jax.models.sizes import ViTConfig


class ViTOutput(NamedTuple):
    """All float32 and after the final norm, but for ``prenorm`` and ``entering``, which are before
    any norm and of the compute dtype.

    cls (B, D), or the pooled tokens; patches (B, N or K, D); registers (B, R, D); layers {block:
    (cls (B, D), patches (B, N or K, D))}; prenorm (B, T, D); entering (B, T, D), what went into the
    last block, or None unless asked for.
    """

    cls: jax.Array
    patches: jax.Array
    registers: jax.Array
    layers: dict[int, tuple[jax.Array, jax.Array]]
    prenorm: jax.Array
    entering: jax.Array | None = None


class ViT(nn.Module):
    """A ViT of any size; its parameters do not depend on the size of the images it is called
    with."""

    config: ViTConfig

    @nn.compact
    def __call__(
        self,
        images: jax.Array | tuple[jax.Array, ...],
        *,
        mask: jax.Array | tuple[jax.Array | None, ...] | None = None,
        keep: jax.Array | None = None,
        train: bool = False,
        layers: Sequence[int] = (),
        inside: bool = False,
    ) -> ViTOutput | tuple[ViTOutput, ...]:
        """Encodes normalised images.

        images: (B, H, W, 3) float, H and W multiples of the patch size. A tuple of such holds crops
          of several sizes: they go through the blocks together, with a mask or None for each, and
          the outputs come back as a tuple; ``keep``, ``layers`` and ``inside`` are for one size.
        mask: (B, N) bool, patches to replace by the mask token.
        keep: (B, K) int, the patches to process, in this order (MAE); the others cost nothing.
        train: draw stochastic depth, from the rng collection ``drop_path`` when its rate is above
          0.
        layers: 0-based blocks whose outputs are wanted as well; negative numbers count from the
          end.
        inside: return also what enters the last block (``entering``).

        Raises:
          ValueError: for images that do not divide into patches, a mask without a mask token, a
            layer that is not there, or what several sizes cannot have.
        """
        c = self.config
        if isinstance(images, tuple):
            if keep is not None or layers or inside:
                raise ValueError("keep, layers and inside are for images of one size")
            masks = mask or (None,) * len(images)
            x = self._tokens(images, masks, (None,) * len(images))
            (x, _), _ = block_stack(c, train)((x, None), np.zeros(c.depth, int))
            read = self._reader()
            return tuple(ViTOutput(*read(t), layers={}, prenorm=t) for t in x)

        (x,) = self._tokens((images,), (mask,), (keep,))
        entering = x if inside else None
        wanted = {layer: self._block_number(layer) for layer in layers}
        before_last = [c.depth - 2] if inside and c.depth > 1 else []
        stored = sorted({*wanted.values(), *before_last})
        store = jnp.zeros((len(stored), *x.shape), x.dtype) if stored else None
        slots = np.array([stored.index(i) if i in stored else len(stored) for i in range(c.depth)])
        (x, store), _ = block_stack(c, train)((x, store), slots)

        read = self._reader()
        outputs = {}
        for layer, number in wanted.items():
            layer_cls, layer_patches, _ = read(store[stored.index(number)])
            outputs[layer] = (layer_cls, layer_patches)
        if before_last:
            entering = store[stored.index(c.depth - 2)]
        return ViTOutput(*read(x), layers=outputs, prenorm=x, entering=entering)

    def _tokens(self, images, masks, keeps) -> tuple[jax.Array, ...]:
        """What enters the first block, (B, T, D) for each of the batches of images."""
        c = self.config
        embed = PatchEmbed(c, name="patch_embed")
        embedded = []
        for batch, keep in zip(images, keeps):
            c.grid_of(*batch.shape[1:3])
            patches = patchify(batch, c.patch_size)
            # positions and embedding work patch by patch, so choosing first gives the same
            embedded.append(embed(patches if keep is None else gather_tokens(patches, keep)))

        if c.mask_token:
            token = self.param(
                "mask_token",
                nn.initializers.normal(0.02) if c.init == "mae" else nn.initializers.zeros,
                (1, c.width),
            )
        elif any(mask is not None for mask in masks):
            raise ValueError("patches can only be masked in a ViT with mask_token = True")
        cls = table = None
        if c.pooling == "cls":
            cls = self.param("cls_token", token_init(c), (1, 1, c.width))
        if c.position == "learned":
            table = self.param("pos_embed", position_init(c), (1, c.num_positions, c.width))
        if c.num_registers:
            registers = self.param("register_tokens", token_init(c), (1, c.num_registers, c.width))
        norm = layer_norm(c, "pre_norm") if c.pre_norm else lambda tokens: tokens

        out = []
        for batch, x, mask, keep in zip(images, embedded, masks, keeps):
            if mask is not None:
                mask = mask if keep is None else jnp.take_along_axis(mask, keep, axis=1)
                x = jnp.where(mask[:, :, None], token.astype(x.dtype), x)
            cls_position, positions = self._positions(table, c.grid_of(*batch.shape[1:3]))
            positions = positions[None] if keep is None else positions[keep]
            x = x + positions.astype(x.dtype)
            first = [] if cls is None else [(cls + cls_position).astype(x.dtype)]
            if c.num_registers:
                first.append(registers.astype(x.dtype))
            if first:
                first = jnp.concatenate(first, axis=1)
                first = jnp.broadcast_to(first, (x.shape[0], *first.shape[1:]))
                x = jnp.concatenate([first, x], axis=1)
            out.append(norm(x))
        return tuple(out)

    def _positions(
        self, table: jax.Array | None, grid: position.Grid
    ) -> tuple[jax.Array, jax.Array]:
        """Positions of CLS (1, D), if there is one, and of the patches of ``grid`` (N, D);
        ``table`` (1, 1 + N, D) is the learned one."""
        c = self.config
        if table is None:
            cls, patches = jnp.zeros((1, c.width)), position.sincos_2d(c.width, c.grid)
        else:
            first = c.num_positions - c.num_patches
            cls, patches = table[0, :first], table[0, first:]
        return cls, jnp.asarray(position.resize(patches, c.grid, grid, c.position_resize))

    def _reader(self) -> Callable[[jax.Array], tuple[jax.Array, jax.Array, jax.Array]]:
        """A function from tokens to CLS, or what is pooled, patches and registers, all after the
        final norm."""
        c = self.config
        norm = layer_norm(c, "norm", dtype="float32")
        pool = AttentionPool(c, name="pool") if c.pooling == "map" else None

        def read(tokens: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            tokens, r = norm(tokens), c.num_registers
            if pool:
                return pool(tokens), tokens[:, r:], tokens[:, :r]
            return tokens[:, 0], tokens[:, 1 + r :], tokens[:, 1 : 1 + r]

        return read

    def _block_number(self, layer: int) -> int:
        depth = self.config.depth
        if not -depth <= layer < depth:
            raise ValueError(f"layer {layer} was asked of a ViT with blocks 0 to {depth - 1}")
        return layer % depth
