"""The vision transformer of every method here (Dosovitskiy et al., arXiv 2010.11929).

The order of tokens is [CLS, registers, patches row-major]. CLS and patches have positions,
registers have none; rotated positions are of patches alone. A masked patch is replaced before its
position is added. With pooling ``map`` (SigLIP) there is no CLS token, and attention pooling of all
tokens takes the place of its output; with ``mean`` (I-JEPA) the mean of the patches does.

Shape letters: B images, H x W pixels, h x w = N patches, K kept patches, R registers,
T = 1 + R + N tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from webssl_jax.models.blocks import Placed, block_stack
from webssl_jax.models.layers import PatchEmbed, gather_tokens, layer_norm, patchify
from webssl_jax.models.pooling import AttentionPool
from webssl_jax.models.rope import grid_coordinates
from webssl_jax.models.sizes import BlockConfig, ViTConfig


class ViTOutput(NamedTuple):
    """The outputs of a :class:`ViT`. ``x_prenorm`` and ``last_block_input`` have the compute dtype;
    the others are float32 and after the final norm.

    cls (B, D): CLS, or without one the pooled tokens. patches (B, N or K, D). registers
    (B, R, D). layers {block: (cls (B, D), patches (B, N or K, D))}, without the norm where the call
    asked for that. x_prenorm (B, T, D): the last
    block's output, before the final norm (DINOv2's name). last_block_input (B, T, D): None unless
    asked for.
    """

    cls: jax.Array
    patches: jax.Array
    registers: jax.Array
    layers: dict[int, tuple[jax.Array, jax.Array]]
    x_prenorm: jax.Array
    last_block_input: jax.Array | None = None


def train_rngs(config: BlockConfig, rng: jax.Array) -> dict[str, jax.Array]:
    """What a network of ``config`` draws from in training, by the names of its collections."""
    rope = {"rope": jax.random.fold_in(rng, 1)} if config.rope else {}
    return {"drop_path": rng, **rope}


class ViT(nn.Module):
    """A ViT of any size. Its parameters do not depend on the size of the images that it is called
    with."""

    config: ViTConfig

    @nn.compact
    def __call__(
        self,
        images: jax.Array | tuple[jax.Array, ...],
        *,
        mask: jax.Array | tuple[jax.Array | None, ...] | None = None,
        keep: jax.Array | None = None,
        present: jax.Array | None = None,
        train: bool = False,
        layers: Sequence[int] = (),
        layers_norm: bool = True,
        inside: bool = False,
    ) -> ViTOutput | tuple[ViTOutput, ...]:
        """Encodes normalised images.

        images: (B, H, W, 3) float, H and W multiples of the patch size. Or a tuple of such, crops
          of several sizes that go through the blocks together; then ``mask`` is a tuple too, and so
          is the output; ``keep``, ``present``, ``layers`` and ``inside`` are for one size only.
        mask: (B, N) bool, patches to replace by the mask token.
        keep: (B, K) int, the patches to process, in this order (MAE); the others cost nothing.
        present: (B, K) bool, which of ``keep`` are there. The others fill images up to one number
          of patches: no token attends to them, and their outputs mean nothing.
        train: draw stochastic depth, from the rng collection ``drop_path`` when its rate is above
          0, and move rotated positions, from ``rope``, where the config says so.
        layers: 0-based blocks whose outputs to return as well; negative numbers count from the end.
        layers_norm: whether these go through the final norm.
        inside: return the last block's input as well (``last_block_input``).

        Raises:
          ValueError: for images that do not divide into patches, a mask without a mask token, a
            block that does not exist, or an argument that several sizes do not take.
        """
        c = self.config
        if isinstance(images, tuple):
            if keep is not None or present is not None or layers or inside:
                raise ValueError("keep, present, layers and inside are for images of one size")
            masks = (None,) * len(images) if mask is None else mask
            assert isinstance(masks, tuple)
            crops = self._embed(images, masks, (None,) * len(images))
            of_crops = tuple(self._placed(batch) for batch in images) if c.rope else None
            crops, _ = self._blocks(crops, None, np.zeros(c.depth, int), of_crops, train)
            normalise = self._final_norm()
            return tuple(ViTOutput(*normalise(x), {}, x) for x in crops)

        assert not isinstance(mask, tuple)
        (x,) = self._embed((images,), (mask,), (keep,))
        last_block_input = x if inside else None
        wanted = {layer: self._block_index(layer) for layer in layers}
        before_last = [c.depth - 2] if inside and c.depth > 1 else []
        stored = sorted({*wanted.values(), *before_last})
        store = jnp.zeros((len(stored), *x.shape), x.dtype) if stored else None
        slots = np.array([stored.index(i) if i in stored else len(stored) for i in range(c.depth)])
        plain = c.rope is None and present is None
        placed = None if plain else self._placed(images, keep, present)
        x, store = self._blocks(x, store, slots, placed, train)

        normalise = self._final_norm(present)
        outputs = {}
        for layer, index in wanted.items():
            layer_cls, layer_patches, _ = normalise(store[stored.index(index)], layers_norm)
            outputs[layer] = (layer_cls, layer_patches)
        if before_last:
            last_block_input = store[stored.index(c.depth - 2)]
        return ViTOutput(*normalise(x), outputs, x, last_block_input)

    def _embed(
        self,
        images: tuple[jax.Array, ...],
        masks: Sequence[jax.Array | None],
        keeps: Sequence[jax.Array | None],
    ) -> tuple[jax.Array, ...]:
        """The first block's input, (B, T, D) for each size of images."""
        c, init = self.config, self.config.init_scheme
        patch_embed = PatchEmbed(c, name="patch_embed")
        embedded = []
        for batch, keep in zip(images, keeps):
            c.grid_of(*batch.shape[1:3])  # raises if the patches do not divide it
            patches = patchify(batch, c.patch_size)
            # the embedding works on each patch by itself, so it may follow the choice of patches
            embedded.append(patch_embed(patches if keep is None else gather_tokens(patches, keep)))

        # The order of these matters: a parameter's initial value depends on how many came before.
        mask_token = cls = registers = None
        if c.mask_token:
            mask_token = self.param("mask_token", init.mask_token(), (1, c.width))
        if c.pooling == "cls":
            cls = self.param("cls_token", init.token(), (1, 1, c.width))
        position = c.position_scheme
        position_params = position.params(self.param, init.position())
        if c.num_registers:
            registers = self.param("register_tokens", init.token(), (1, c.num_registers, c.width))
        norm = layer_norm(c, "pre_norm") if c.pre_norm else None

        out = []
        for batch, x, mask, keep in zip(images, embedded, masks, keeps):
            if mask is not None:
                if mask_token is None:
                    raise ValueError("patches can only be masked in a ViT with mask_token = True")
                mask = mask if keep is None else jnp.take_along_axis(mask, keep, axis=1)
                x = jnp.where(mask[:, :, None], mask_token.astype(x.dtype), x)
            grid = c.grid_of(*batch.shape[1:3])
            placed_cls, x = position.add(position_params, grid, cls, x, keep)
            prefix = [t.astype(x.dtype) for t in (placed_cls, registers) if t is not None]
            if prefix:
                first = jnp.concatenate(prefix, axis=1)
                first = jnp.broadcast_to(first, (x.shape[0], *first.shape[1:]))
                x = jnp.concatenate([first, x], axis=1)
            out.append(norm(x) if norm else x)
        return tuple(out)

    def _blocks(
        self, x: Any, store: jax.Array | None, slots: np.ndarray, placed: Any, train: bool
    ) -> tuple[Any, Any]:
        """(tokens, store) after all blocks."""
        c = self.config
        if placed is None:
            return block_stack(c, train)((x, store), slots)[0]
        drawn = None
        if train and c.rope and c.rope.augments:
            sizes = 1 if isinstance(placed, Placed) else len(placed)
            drawn = c.rope.draw(self.make_rng("rope"), c.depth, sizes)
        return block_stack(c, train, placed=True)((x, store), slots, drawn, placed)[0]

    def _placed(
        self, images: jax.Array, keep: jax.Array | None = None, present: jax.Array | None = None
    ) -> Placed:
        """What the blocks are told of the tokens of ``images``."""
        c, coordinates, keys = self.config, None, None
        if c.rope:
            coordinates = jnp.asarray(grid_coordinates(c.grid_of(*images.shape[1:3])))
            coordinates = coordinates if keep is None else coordinates[keep]
        if present is not None:
            keys = jnp.pad(present, ((0, 0), (c.prefix, 0)), constant_values=True)
        return Placed(coordinates, keys)

    def _final_norm(
        self, present: jax.Array | None = None
    ) -> Callable[..., tuple[jax.Array, jax.Array, jax.Array]]:
        """A function that takes tokens (B, T, D) to CLS (or the pooled tokens), patches and
        registers, all after the final norm; with False as they are, except what is pooled."""
        c = self.config
        norm = layer_norm(c, "norm", dtype="float32")
        pool = AttentionPool(c, name="pool") if c.pooling == "map" else None

        def normalise(
            tokens: jax.Array, normed: bool = True
        ) -> tuple[jax.Array, jax.Array, jax.Array]:
            after, r = norm(tokens), c.num_registers
            tokens = after if normed else tokens.astype(jnp.float32)
            if pool:
                return pool(after), tokens[:, r:], tokens[:, :r]
            if c.pooling == "mean":
                where = None if present is None else present[:, :, None]
                return after[:, r:].mean(axis=1, where=where), tokens[:, r:], tokens[:, :r]
            return tokens[:, 0], tokens[:, 1 + r :], tokens[:, 1 : 1 + r]

        return normalise

    def _block_index(self, layer: int) -> int:
        depth = self.config.depth
        if not -depth <= layer < depth:
            raise ValueError(f"layer {layer} was asked of a ViT with blocks 0 to {depth - 1}")
        return layer % depth
