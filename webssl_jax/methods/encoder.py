"""A ViT as a feature function: what every method does with its encoder once it is frozen."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from webssl_jax.methods.base import Features, Inside, Params
from webssl_jax.models.attention import cls_attention
from webssl_jax.models.pooling import pool_attention
from webssl_jax.models.sizes import ViTConfig
from webssl_jax.models.vit import ViT


def encode(
    config: ViTConfig,
    params: Params,
    images: jax.Array,
    layers: Sequence[int] = (),
    inside: bool = False,
) -> Features:
    """Features of whole images, nothing hidden: normalised (B, H, W, 3) of any size the patches
    divide; see ``base.Method.features``."""
    grid = config.grid_of(*images.shape[1:3])
    seen = ViT(config).apply({"params": params}, images, layers=layers, inside=inside)

    def on_grid(patches: jax.Array) -> jax.Array:
        return patches.reshape(patches.shape[0], *grid, patches.shape[-1])

    asked = {layer: (cls, on_grid(patches)) for layer, (cls, patches) in seen.layers.items()}
    looked = None
    if inside:
        norms = jnp.linalg.norm(seen.x_prenorm.astype(jnp.float32), axis=-1)
        if config.pooling == "cls":
            last = jax.tree.map(lambda stacked: stacked[-1], params["blocks"])
            attention, cls_norm = cls_attention(config, last, seen.last_block_input), norms[:, 0]
        else:
            tokens = jnp.concatenate([seen.registers, seen.patches], axis=1)
            attention = pool_attention(config, params["pool"], tokens)
            cls_norm = jnp.linalg.norm(seen.cls, axis=-1)
        first = norms.shape[1] - seen.patches.shape[1]
        looked = Inside(
            attention[:, :, first:].reshape(*attention.shape[:2], *grid),
            cls_norm,
            norms[:, first - config.num_registers : first],
            norms[:, first:].reshape(-1, *grid),
        )
    return Features(seen.cls, on_grid(seen.patches), seen.registers, asked, looked)


def eval_view(side: int, margin: bool = True) -> Callable[[bytes], np.ndarray]:
    """The central ``side`` x ``side`` pixels of an image whose shorter side was resized to 256 /
    224 of that, with an even margin, so that the crop is central; without ``margin``, as CLIP, to
    ``side``."""
    from webssl_jax.data import views  # the loader's side of the house: not needed for features

    return views.EvalView(side, side + margin * 2 * round(side * (256 / 224 - 1) / 2))
