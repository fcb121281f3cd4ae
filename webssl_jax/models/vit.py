"""The vision transformer encoder of Web-DINO and Web-MAE (Dosovitskiy et al., arXiv 2010.11929).

Tokens stand in the order [CLS, registers, patches row-major]. Positions are added to CLS and
patches before the registers come in, which have none; a masked patch is replaced before its
position is added.

Shape letters: B images, H x W pixels, h x w = N patches, K kept patches, R registers,
T = 1 + R + N tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from webssl_jax.models import position
from webssl_jax.models.blocks import block_stack
from webssl_jax.models.layers import PatchEmbed, gather_tokens, layer_norm, patchify, token_init
from webssl_jax.models.sizes import ViTConfig


class ViTOutput(NamedTuple):
    """All float32 and after the final norm, but for ``prenorm``, which is before it and of the
    compute dtype.

    cls (B, D); patches (B, N or K, D); registers (B, R, D); layers {block: (cls (B, D),
    patches (B, N or K, D))}; prenorm (B, T, D).
    """

    cls: jax.Array
    patches: jax.Array
    registers: jax.Array
    layers: dict[int, tuple[jax.Array, jax.Array]]
    prenorm: jax.Array


class ViT(nn.Module):
    """A ViT of any size; its parameters do not depend on the size of the images it is called
    with."""

    config: ViTConfig

    @nn.compact
    def __call__(
        self,
        images: jax.Array,
        *,
        mask: jax.Array | None = None,
        keep: jax.Array | None = None,
        train: bool = False,
        layers: Sequence[int] = (),
    ) -> ViTOutput:
        """Encodes normalised images.

        images: (B, H, W, 3) float, H and W multiples of the patch size.
        mask: (B, N) bool, patches to replace by the mask token.
        keep: (B, K) int, the patches to process, in this order (MAE); the others cost nothing.
        train: draw stochastic depth, from the rng collection ``drop_path`` when its rate is above
          0.
        layers: 0-based blocks whose outputs are wanted as well; negative numbers count from the
          end.

        Raises:
          ValueError: for images that do not divide into patches, a mask without a mask token, or a
            layer that is not there.
        """
        c = self.config
        grid = c.grid_of(*images.shape[1:3])

        patches = patchify(images, c.patch_size)
        # positions and embedding work patch by patch, so choosing first gives the same
        if keep is not None:
            patches = gather_tokens(patches, keep)
        x = PatchEmbed(c, name="patch_embed")(patches)
        if c.mask_token:
            token = self.param(
                "mask_token",
                nn.initializers.normal(0.02) if c.init == "mae" else nn.initializers.zeros,
                (1, c.width),
            )
        if mask is not None:
            if not c.mask_token:
                raise ValueError("patches can only be masked in a ViT with mask_token = True")
            mask = mask if keep is None else jnp.take_along_axis(mask, keep, axis=1)
            x = jnp.where(mask[:, :, None], token.astype(x.dtype), x)

        cls = self.param("cls_token", token_init(c), (1, 1, c.width))
        cls_position, positions = self._positions(grid)  # (1, D), (N, D)
        positions = positions[None] if keep is None else positions[keep]
        x = x + positions.astype(x.dtype)
        first = [jnp.broadcast_to((cls + cls_position).astype(x.dtype), (x.shape[0], 1, c.width))]
        if c.num_registers:
            registers = self.param("register_tokens", token_init(c), (1, c.num_registers, c.width))
            first.append(
                jnp.broadcast_to(registers.astype(x.dtype), (x.shape[0], c.num_registers, c.width))
            )
        x = jnp.concatenate([*first, x], axis=1)

        wanted = {layer: self._block_number(layer) for layer in layers}
        stored = sorted(set(wanted.values()))
        store = jnp.zeros((len(stored), *x.shape), x.dtype) if stored else None
        slots = np.array([stored.index(i) if i in stored else len(stored) for i in range(c.depth)])
        (x, store), _ = block_stack(c, train)((x, store), slots)

        norm = layer_norm(c, "norm", dtype="float32")
        cls, registers, patches = self._split(norm(x))
        outputs = {}
        for layer, number in wanted.items():
            layer_cls, _, layer_patches = self._split(norm(store[stored.index(number)]))
            outputs[layer] = (layer_cls, layer_patches)
        return ViTOutput(cls, patches, registers, outputs, prenorm=x)

    def _positions(self, grid: position.Grid) -> tuple[jax.Array, jax.Array]:
        """Positions of CLS (1, D) and of the patches of ``grid`` (N, D)."""
        c = self.config
        if c.position == "sincos":
            cls, patches = jnp.zeros((1, c.width)), position.sincos_2d(c.width, c.grid)
        else:
            table = self.param(
                "pos_embed", nn.initializers.normal(0.02), (1, c.num_patches + 1, c.width)
            )
            cls, patches = table[0, :1], table[0, 1:]
        return cls, jnp.asarray(position.resize(patches, c.grid, grid, c.position_resize))

    def _split(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        r = self.config.num_registers
        return tokens[:, 0], tokens[:, 1 : 1 + r], tokens[:, 1 + r :]

    def _block_number(self, layer: int) -> int:
        depth = self.config.depth
        if not -depth <= layer < depth:
            raise ValueError(f"layer {layer} was asked of a ViT with blocks 0 to {depth - 1}")
        return layer % depth
